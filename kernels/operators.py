"""``combine`` as an operator of torch: for autograd, torch.compile and export.

The namespace is the package's, which may be imported under two names.
"""

from __future__ import annotations

from typing import Any

import torch

from .combine import compute
from .reference import promoted, work_dtype


def _combine(
    inputs: list[torch.Tensor], coefs: torch.Tensor, counter: torch.Tensor | None
) -> list[torch.Tensor]:
    return compute(inputs, coefs, counter)


# Annotations are text in this file, which the registration of torch 2.4 cannot read; hence the schema.
combine = torch.library.custom_op(
    f"{__name__.replace('.', '_')}::combine",
    _combine,
    mutates_args=(),
    schema="(Tensor[] inputs, Tensor coefs, Tensor? counter) -> Tensor[]",
)


@combine.register_fake
def _(inputs: list[torch.Tensor], coefs: torch.Tensor, counter: torch.Tensor | None) -> list[torch.Tensor]:
    outputs = coefs.shape[0] if counter is None else coefs.shape[1]
    dtype = promoted(inputs)
    return [torch.empty_like(inputs[0], dtype=dtype) for _ in range(outputs)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    tensors, coefs, counter = inputs
    ctx.save_for_backward(*tensors, coefs, *(() if counter is None else (counter,)))
    ctx.count = len(tensors)


def _backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    """``d x_j = sum_i c_ij g_i``, a combination itself; ``d c_ij = <g_i, x_j>``, of each sample where c_ij is."""
    inputs, (table, *rest) = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    counter = rest[0].reshape(1) if rest else None
    coefs = table if counter is None else table.index_select(0, counter)[0]
    needs_inputs, needs_coefs, _ = ctx.needs_input_grad
    d_inputs: Any = [None] * len(inputs)
    if needs_inputs if isinstance(needs_inputs, bool) else any(needs_inputs):
        sums = combine(list(grads), coefs.transpose(0, 1).contiguous(), None)
        d_inputs = [d.to(x.dtype) for d, x in zip(sums, inputs)]
    d_table = None
    if needs_coefs:
        work = torch.promote_types(work_dtype(promoted(inputs)), coefs.dtype)
        keep = 1 if coefs.ndim == 3 else 0
        over = [[_inner(g.to(work), x.to(work), keep) for x in inputs] for g in grads]
        d_coefs = torch.stack([torch.stack(row) for row in over]).to(device=table.device, dtype=table.dtype)
        d_table = (
            d_coefs if counter is None else torch.zeros_like(table).index_copy(0, counter, d_coefs[None])
        )
    return d_inputs, d_table, None


def _inner(a: torch.Tensor, b: torch.Tensor, keep: int) -> torch.Tensor:
    return (a * b).flatten(keep).sum(-1) if a.ndim > keep else a * b


combine.register_autograd(_backward, setup_context=_save)
