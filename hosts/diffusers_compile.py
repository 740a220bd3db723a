"""``step`` under torch.compile: one operator that the compiler does not look into.

What ``step`` does depends on where the run stands, which would be compiled anew for every step. As an operator it is
called at run time; its kernels are the same few as without compilation.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

_SCHEDULERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def handle_of(scheduler: Any) -> int:
    """A number for a scheduler, by which the operator finds it."""
    number = next(_NUMBERS)
    _SCHEDULERS[number] = scheduler
    return number


def _step(
    handle: int, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    previous, denoised = _SCHEDULERS[handle].step(output, timestep, sample, return_dict=False)
    # An operator may not return what it was given, nor one tensor twice.
    taken = {output.data_ptr(), sample.data_ptr()}
    if previous.data_ptr() in taken:
        previous = previous.clone()
    if denoised.data_ptr() in taken | {previous.data_ptr()}:
        denoised = denoised.clone()
    return previous, denoised


# The namespace is the package's, which may be imported under two names; a CUDA graph would not come back to Python.
_TAGS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)
_operator = torch.library.custom_op(f"{__name__.replace('.', '_')}::step", _step, mutates_args=(), **_TAGS)


@_operator.register_fake
def _(
    handle: int, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(output.dtype, sample.dtype)
    return torch.empty_like(sample, dtype=dtype), torch.empty_like(sample, dtype=dtype)


def compiled_step(
    handle: int, output: torch.Tensor, timestep: Any, sample: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``step`` is while it is compiled."""
    at = timestep if isinstance(timestep, torch.Tensor) else torch.tensor(timestep)
    return _operator(handle, output, at, sample)
