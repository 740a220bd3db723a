"""Rules of guidance that need norms and products of each sample: one pass to reduce, one to apply.

The rules have one form. ``p`` and ``q`` are weighted sums of the inputs, the reduction gives sums over each sample, and
the result is a weighted sum of the inputs plus ``a p + b q`` with a, b of each sample:

===========  ====================  ===================================================================================
rule         p, q                  a, b
===========  ====================  ===================================================================================
projected    the difference d      ``gain k``, ``-gain (1 - eta) k <p, q> / |q|^2`` with ``k = min(1, cap / |p|)``
             and its axis
rescaled     guided, conditional   ``gain (phi std(q) / std(p) + 1 - phi)``, 0
scaled       conditional,          ``gain``, ``(1 - gain) <p, q> / (|q|^2 + 1e-8)``
             unconditional
===========  ====================  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from . import reference
from .dispatch import backend, mode
from .layout import as_lines

Weights = Sequence[float]
"""A number for each input."""


@dataclass(frozen=True)
class Rule:
    """One row of the table; ``cap`` 0 is none."""

    name: Literal["projected", "rescaled", "scaled"]
    gain: float = 1.0
    eta: float = 0.0
    cap: float = 0.0
    phi: float = 0.0


def available(inputs: Sequence[torch.Tensor]) -> bool:
    """Whether two kernels do it: on the device of the inputs, for their layout, and with nothing to differentiate."""
    first = inputs[0]
    if not (first.is_cuda or mode() == "triton") or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return False
    same = all(x.shape == first.shape and x.dtype != torch.float64 for x in inputs)
    return same and first.numel() > 0 and as_lines(inputs) and backend(first) == "triton"


def guided(
    inputs: Sequence[torch.Tensor],
    p: Weights,
    q: Weights,
    base: Weights,
    rule: Rule,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``sum base x + a p + b q`` in the dtype of the first input, computed in fp32 and rounded once.

    ``inputs`` have the shape (B, ...). With ``keep`` p is returned too, in fp32 (momentum). Two kernels where
    :func:`available`, torch elsewhere. No value is read by the host.
    """
    if available(inputs):
        from . import triton_guidance

        return triton_guidance.guided(inputs, p, q, base, rule, keep)
    return reference_guided(inputs, p, q, base, rule, keep)


def products(inputs: Sequence[torch.Tensor], p: Weights, q: Weights) -> torch.Tensor:
    """``|p|^2, <p, q>, |q|^2`` of each sample, shape (3, B), in fp32 (float64)."""
    if available(inputs):
        from . import triton_guidance

        return triton_guidance.products(inputs, p, q)
    (a, b) = _forms(inputs, p, q)
    return torch.stack([(a * a).sum(1), (a * b).sum(1), (b * b).sum(1)])


def reference_guided(
    inputs: Sequence[torch.Tensor],
    p: Weights,
    q: Weights,
    base: Weights,
    rule: Rule,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`guided` in torch, the definition."""
    first = inputs[0]
    flat_p, flat_q = _forms(inputs, p, q)
    a, b = factors(flat_p, flat_q, rule)
    total = sum(w * x.to(flat_p.dtype).flatten(1) for w, x in zip(base, inputs) if w != 0.0)
    result = (total + a * flat_p + b * flat_q).to(first.dtype).reshape(first.shape)
    return result, flat_p.reshape(first.shape) if keep else None


def factors(p: torch.Tensor, q: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b of each sample, shape (B, 1), for p and q of shape (B, elements)."""
    pq = (p * q).sum(1, keepdim=True)
    qq = (q * q).sum(1, keepdim=True)
    if rule.name == "projected":
        k = torch.ones_like(pq)
        if rule.cap:
            length = torch.linalg.vector_norm(p, dim=1, keepdim=True)
            k = _ratio(torch.full_like(length, rule.cap), length, 1.0).clamp(max=1.0)
        return rule.gain * k, -rule.gain * (1.0 - rule.eta) * k * _ratio(pq, qq, 0.0)
    if rule.name == "rescaled":
        ratio = _ratio(q.std(1, keepdim=True), p.std(1, keepdim=True), 1.0)
        return rule.gain * (rule.phi * ratio + 1.0 - rule.phi), torch.zeros_like(pq)
    return torch.full_like(pq, rule.gain), (1.0 - rule.gain) * pq / (qq + 1e-8)


def _forms(inputs: Sequence[torch.Tensor], p: Weights, q: Weights) -> list[torch.Tensor]:
    work = reference.work_dtype(reference.promoted(inputs))
    wide = [x.to(work).flatten(1) for x in inputs]
    zero = torch.zeros_like(wide[0])
    return [sum((w * x for w, x in zip(form, wide) if w != 0.0), zero) for form in (p, q)]


def _ratio(a: torch.Tensor, b: torch.Tensor, otherwise: float) -> torch.Tensor:
    zero = b == 0
    return torch.where(zero, otherwise, a / torch.where(zero, 1.0, b))
