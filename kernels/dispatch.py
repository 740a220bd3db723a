"""Which implementation computes: ``FEWSTEP_KERNELS=auto|torch|triton|native``.

``auto``: Triton on CUDA where it is installed, torch elsewhere. ``torch``: never a kernel of our own. ``triton``: an
error where it cannot run; on the CPU it runs under ``TRITON_INTERPRET=1`` (slow, for tests). ``native``: on the CPU a
small C++ file, compiled once with the compiler at hand; on CUDA like ``auto``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch

Kernel = Callable[..., "list[torch.Tensor]"]

MODES = ("auto", "torch", "triton", "native")
LARGE = 1 << 16
"""Elements from which a single pass is worth the call of a kernel on the CPU."""


@cache
def mode() -> str:
    """The setting, read once; ValueError for a word that is not one of ``MODES``."""
    value = os.environ.get("FEWSTEP_KERNELS", "auto")
    if value not in MODES:
        raise ValueError(f"FEWSTEP_KERNELS must be one of {', '.join(MODES)}, got {value!r}")
    return value


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is imported when a kernel is called."""
    return importlib.util.find_spec("triton") is not None


@cache
def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


def backend(like: torch.Tensor) -> str:
    """``"torch"``, ``"triton"`` or ``"native"``: what computes on tensors like this one."""
    chosen = mode()
    if chosen == "torch":
        return "torch"
    if like.is_cuda:
        if has_triton():
            return "triton"
        if chosen == "triton":
            raise ValueError(
                "FEWSTEP_KERNELS=triton, but Triton is not installed; install triton or use 'auto'"
            )
        return "torch"
    if chosen == "triton":
        if like.device.type == "cpu" and _interprets():
            return "triton"
        raise ValueError(
            f"FEWSTEP_KERNELS=triton, but the tensors are on {like.device.type!r}: Triton needs CUDA, or "
            "TRITON_INTERPRET=1 on the CPU; use 'auto'"
        )
    if chosen == "native" and like.device.type == "cpu":
        return "native"
    return "torch"


def fused(like: torch.Tensor) -> Kernel | None:
    """What computes several sums of tensors like this one in a single pass; None where torch's operators do.

    On the CPU those are quicker for a small tensor. Autograd and the compiler see into them, but not into a kernel.
    """
    if not like.is_cuda and like.numel() < LARGE and mode() != "triton":
        return None
    kind = backend(like)
    if kind == "torch" or torch.compiler.is_compiling():
        return None
    if kind == "native":
        from .native import combine
    else:
        from .triton_combine import combine
    return combine


def fits(inputs: Sequence[torch.Tensor], rows: Sequence[Sequence[float]]) -> bool:
    """Whether the kernel of :func:`fused` gives what torch's operators would; not where there is a graph to record."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return False
    if inputs[0].is_cuda or mode() == "triton":
        dtype = inputs[0].dtype
        # With several dtypes a sum has the promoted one of its own terms: that of all, if it has all terms.
        return all(x.dtype is dtype for x in inputs) or all(c != 0.0 for row in rows for c in row)
    from .native import fits

    return fits(inputs, rows)
