"""``combine``: several weighted sums of several tensors in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import reference
from .dispatch import backend

Rows = Sequence[Sequence[float]]


def combine(
    inputs: Sequence[torch.Tensor],
    coefs: Rows | torch.Tensor,
    counter: torch.Tensor | int | None = None,
) -> list[torch.Tensor]:
    """``outputs[i] = sum_j coefs[i][j] inputs[j]``, accumulated in fp32 (float64) and rounded once.

    Args:
        inputs: tensors of one shape, of any rank and layout; they may overlap or be the same. Mixed dtypes promote.
        coefs: numbers; or a tensor (outputs, inputs), or (outputs, inputs, B) with numbers for each sample.
        counter: which entry of ``coefs`` to use, if it has a first dimension more (a :func:`table` of all steps): a
            number, or an integer tensor of one element on the device of the inputs, which the host does not read.

    Returns:
        One new tensor for each row of ``coefs``, in the layout of the first input if that is dense.

    Raises:
        ValueError for shapes that do not fit together.

    Differentiable in the inputs and, where it is a tensor, in ``coefs``. Under torch.compile it is one operator.
    """
    shape = inputs[0].shape
    for x in inputs[1:]:
        if x.shape != shape:
            raise ValueError(f"tensors of one shape can be combined, got {tuple(shape)} and {tuple(x.shape)}")
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _differentiable(inputs, coefs)):
        from . import operators

        if not isinstance(coefs, torch.Tensor):
            coefs = torch.tensor(coefs, dtype=torch.float64)
        if isinstance(counter, int):
            coefs, counter = coefs[counter], None
        return operators.combine(list(inputs), coefs, counter)
    return compute(inputs, coefs, counter)


def table(rows: Sequence[Rows], device: torch.device | str | None = None) -> torch.Tensor:
    """The coefficients of all steps as one float64 tensor (steps, outputs, inputs)."""
    return torch.tensor(rows, dtype=torch.float64, device=device)


def compute(
    inputs: Sequence[torch.Tensor], coefs: Rows | torch.Tensor, counter: torch.Tensor | int | None
) -> list[torch.Tensor]:
    """As :func:`combine`, by the fastest implementation, without autograd."""
    _check(inputs, coefs, counter)
    kind = backend(inputs[0])
    if kind == "triton":
        from . import triton_combine

        return triton_combine.combine(inputs, coefs, counter)
    if counter is not None:
        assert isinstance(coefs, torch.Tensor)
        index = counter if isinstance(counter, int) else counter.reshape(1)
        coefs = coefs[index] if isinstance(index, int) else coefs.index_select(0, index)[0]
    if kind == "native":
        from . import native

        if native.fits(inputs, coefs):
            return native.combine(inputs, coefs)
    if isinstance(coefs, torch.Tensor):
        if coefs.ndim == 3 or coefs.device.type != "cpu":
            return reference.combine(inputs, coefs)
        coefs = coefs.tolist()
    return reference.combine_numbers(inputs, coefs)


def _differentiable(inputs: Sequence[torch.Tensor], coefs: Rows | torch.Tensor) -> bool:
    return any(x.requires_grad for x in inputs) or (isinstance(coefs, torch.Tensor) and coefs.requires_grad)


def _check(
    inputs: Sequence[torch.Tensor], coefs: Rows | torch.Tensor, counter: torch.Tensor | int | None
) -> None:
    if not isinstance(coefs, torch.Tensor):
        if any(len(row) != len(inputs) for row in coefs):
            raise ValueError(f"{len(inputs)} tensors need {len(inputs)} coefficients in every row")
        return
    shape = coefs.shape if counter is None else coefs.shape[1:]
    if len(shape) not in (2, 3) or shape[1] != len(inputs):
        raise ValueError(
            f"coefficients of {len(inputs)} tensors have shape (outputs, {len(inputs)}) or (outputs, {len(inputs)}, B)"
            f"{' for every step' if counter is not None else ''}, got {tuple(coefs.shape)}"
        )
    if len(shape) == 3 and shape[2] != inputs[0].shape[0]:
        raise ValueError(f"coefficients for {shape[2]} samples, but the tensors have {inputs[0].shape[0]}")
