"""The arithmetic of a sampling run on tensors: the sums of a pass, one by one or in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import fits, fused
from ..kernels.reference import philox_normal
from .passes import Pass

_EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Draw:
    """A standard normal that has not been computed: register, seeds (B,) and key of ``philox_normal``."""

    register: int
    seeds: torch.Tensor
    key: int


def write(following: Pass, registers: dict[int, torch.Tensor], draw: Draw | None = None) -> None:
    """Compute the outputs of a pass.

    A result has the promoted dtype of what it is the sum of; 16-bit tensors accumulate in fp32 and are rounded once.
    No tensor that was there before is written to, and no device value is read by the host.
    """
    if following.inputs and (kernel := fused(_first(following, registers))) is not None:
        columns = [j for j, r in enumerate(following.inputs) if draw is None or r != draw.register]
        inputs = [registers[following.inputs[j]] for j in columns]
        rows = following.rows if draw is None else [[row[j] for j in columns] for row in following.rows]
        if fits(inputs, rows):
            if draw is None:
                outputs = kernel(inputs, rows)
            else:
                column = following.inputs.index(draw.register)
                weights = [row[column] for row in following.rows]
                outputs = kernel(inputs, rows, noise=(draw.seeds, draw.key, weights))
            registers.update(zip(following.outputs, outputs))
            return
    if draw is not None:
        like = _first(following, registers)
        registers[draw.register] = philox_normal(draw.seeds, draw.key, like).to(like.dtype)
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


def _first(following: Pass, registers: dict[int, torch.Tensor]) -> torch.Tensor:
    return next(registers[r] for r in following.inputs if r in registers)
