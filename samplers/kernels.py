"""The arithmetic of a sampling run on tensors: the sums of a pass, one by one or in one kernel."""

from __future__ import annotations

import torch

from ..kernels import fits, fused
from .passes import Pass

_EXACT = (torch.float32, torch.float64)


def write(following: Pass, registers: dict[int, torch.Tensor]) -> None:
    """Compute the outputs of a pass.

    A result has the promoted dtype of what it is the sum of; 16-bit tensors accumulate in fp32 and are rounded once.
    No tensor that was there before is written to, and no device value is read by the host.
    """
    if following.inputs and (kernel := fused(registers[following.inputs[0]])) is not None:
        inputs = [registers[r] for r in following.inputs]
        if fits(inputs, following.rows):
            registers.update(zip(following.outputs, kernel(inputs, following.rows)))
            return
    cast: dict[int, torch.Tensor] = {}
    for item in following.sums:
        first = registers[item.first]
        dtype = first.dtype
        for src, _ in item.terms:
            if (other := registers[src].dtype) is not dtype:
                dtype = torch.promote_types(dtype, other)
        exact = dtype in _EXACT
        work = dtype if exact else torch.float32
        if first.dtype is not work:
            first = cast.get(item.first)
            if first is None:
                first = cast[item.first] = registers[item.first].to(work)
        if item.factor is None:
            (src, coef), *terms = item.terms
            total = torch.add(first, registers[src], alpha=coef)
        else:
            total, terms = torch.mul(first, item.factor), item.terms
        for src, coef in terms:
            total.add_(registers[src], alpha=coef)
        registers[item.dst] = total if exact else total.to(dtype)
