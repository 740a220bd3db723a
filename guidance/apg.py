"""Adaptive projected guidance."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

import torch

from ..kernels import Rule, available, guided
from ..schedules import conversion
from ..schedules.spec import NonNegative, Range
from .method import Method, method
from .run import Call, Run
from .tensors import inner, norm, ratio


@dataclass
class _Momentum:
    """The running difference, before the cap and the projection, as the step began and as it is now."""

    before: torch.Tensor | None = None
    now: torch.Tensor | None = None


@method(
    "apg",
    rank=50,
    reference="Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models, "
    "https://arxiv.org/abs/2410.02416",
)
@dataclass(frozen=True)
class APG(Method):
    """Adaptive projected guidance: the part of the difference along the prediction is left out.

    On denoised predictions c and u of each sample, ``d = c - u``, in this order: momentum ``m <- d + momentum m``,
    with m in the place of d; a cap ``d <- d min(1, norm / |d|)``; the projection ``d <- d - (1 - eta) <d, c> c /
    |c|^2``. The result is ``c + (w - 1) d``. With ``eta=1,norm=0,momentum=0`` it is CFG.

    ``scale`` is w; left out, another method gives it. ``eta`` keeps a share of the parallel part. ``norm`` is the
    greatest |d|, 0 for none. It is a number for one size of latent, over all dimensions of a sample, and grows as the
    root of their number; ``size``, the number of elements that it is meant for, rescales it (0: it stays).
    ``momentum`` is negative: the direction of the steps before is taken out. It advances once a step, at its first
    evaluation. ``space`` ``network`` is what diffusers computes in; numbers for ``norm`` do not carry over.
    The first ``cfg_steps`` steps are CFG at ``cfg_scale`` (0: at w), while the momentum runs.
    ``form``: ``paper``; ``diffusers`` is ``u + w d`` and ``comfy`` is ``c + w d``, which with eta = 1 is CFG at w + 1.

    The defaults are the paper's for DiT-XL/2 but for the scale; its others, as recalled: SDXL norm=15, momentum=-0.5;
    SD 2.1 norm=7.5, momentum=-0.75; EDM2-S norm=2.5, momentum=-0.75.
    """

    scale: float | None = None
    _: KW_ONLY
    eta: NonNegative = 0.0
    norm: NonNegative = 5.0
    momentum: Annotated[float, Range(-1.0, 1.0)] = -0.5
    space: Literal["denoised", "network", "epsilon", "v", "flow"] = "denoised"
    form: Literal["paper", "diffusers", "comfy"] = "paper"
    size: Annotated[int, Range(0)] = 0
    cfg_steps: Annotated[int, Range(0)] = 0
    cfg_scale: NonNegative = 0.0

    needs_scale = True

    @property
    def weight(self) -> float | None:
        return self.scale

    @property
    def slots(self) -> frozenset[str]:
        return frozenset({"the combination"} if self.form != "paper" else ())

    def begin(self, run: Run) -> _Momentum:
        return _Momentum()

    def plan(self, call: Call, state: _Momentum) -> None:
        if call.step < self.cfg_steps and self.cfg_scale:
            call.scale = self.cfg_scale

    def difference(
        self, d: torch.Tensor, c: torch.Tensor, u: torch.Tensor, call: Call, state: _Momentum
    ) -> torch.Tensor:
        factor, plain = call.factor(self.space), d
        d, axis = factor * d, call.to(c, self.space)
        if self.momentum:
            if call.first:
                state.before = state.now
            if state.before is not None:
                d = torch.add(d, state.before, alpha=self.momentum)
            if call.first:
                state.now = d.detach()
        if call.step < self.cfg_steps:
            return plain
        if self.norm:
            d = d * ratio(torch.full_like(length := norm(d), self._cap(d)), length).clamp(max=1.0)
        if self.eta != 1.0:
            d = d - (1.0 - self.eta) * ratio(inner(d, axis), inner(axis, axis), 0.0) * axis
        return d / factor

    def fused(self, c: torch.Tensor, u: torch.Tensor, call: Call, state: _Momentum) -> torch.Tensor | None:
        if call.step < self.cfg_steps:
            return None
        factor = call.factor(self.space)
        c_x, c_m = conversion(call.run.prediction, call.space(self.space), call.node)
        before = (state.now if call.first else state.before) if self.momentum else None
        # The inputs are c, u, then the state where the axis needs it, then the momentum.
        inputs, p, q = [c, u], [factor, -factor], [c_m, 0.0]
        if c_x and self.eta != 1.0:
            inputs, p, q = [*inputs, call.x], [*p, 0.0], [*q, c_x]
        if before is not None:
            inputs, p, q = [*inputs, before], [*p, self.momentum], [*q, 0.0]
        if not available(inputs):
            return None
        w = call.scale
        onto_u = self.form == "diffusers"
        base = [0.0 if onto_u else 1.0, 1.0 if onto_u else 0.0, *(0.0 for _ in inputs[2:])]
        rule = Rule(
            "projected",
            gain=(w - 1.0 if self.form == "paper" else w) / factor,
            eta=self.eta,
            cap=self._cap(c),
        )
        g, now = guided(inputs, p, q, base, rule, keep=bool(self.momentum) and call.first)
        if self.momentum and call.first:
            state.before, state.now = state.now, now
        return g

    def _cap(self, d: torch.Tensor) -> float:
        return self.norm * ((d[0].numel() / self.size) ** 0.5 if self.size else 1.0)

    def combine(
        self, c: torch.Tensor, u: torch.Tensor, d: torch.Tensor, call: Call, state: _Momentum
    ) -> torch.Tensor | None:
        if self.form == "paper":
            return None
        return torch.add(u if self.form == "diffusers" else c, d, alpha=call.scale)
