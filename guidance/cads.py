"""Condition-annealed sampling."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..schedules.spec import Fraction, NonNegative
from .method import Method, method
from .run import Call, Run
from .tensors import wide

if TYPE_CHECKING:
    from .composition import Guidance

_KEY = 0xCAD5


@method(
    "cads",
    rank=20,
    reference="CADS: Unleashing the Diversity of Diffusion Models through Condition-Annealed Sampling, "
    "https://arxiv.org/abs/2310.17347",
)
@dataclass(frozen=True)
class CADS(Method):
    """Condition-annealed sampling: noise on the condition early on, for variety at a high scale. It costs nothing.

    At diffusion time t, 1 at pure noise, ``gamma = 1`` for t <= tau1, 0 for t >= tau2, ``(tau2 - t) / (tau2 - tau1)``
    between. ``y' = sqrt(gamma) y + noise sqrt(1 - gamma) n`` with n ~ N(0, I) fresh in every step, one for all its
    evaluations; ``y'' = (y' - mean y') / std y' std y + mean y``; the network is given ``mix y'' + (1 - mix) y'``.
    Only the conditional branch is; u stays as it is. A y' without spread is not rescaled. ``noise = 0`` is not the
    identity where gamma = 0: there y' is zero.

    ``noise`` is s of the paper: 0.25 for text with tau1 = 0.6, tau2 = 0.9; 0.1 to 0.15 for a class with tau1 = 0.5.
    ``mix`` is psi. ``stats``: means and deviations (n - 1) of each ``sample``, or ``global``, of the whole batch, as
    in the paper's listing. ``time``: ``diffusion`` is t over its greatest value for VP models and sigma for flow
    models; ``index`` is 1 - i / N for step i. Adaptive guidance does not measure while gamma < 1.

    Defaults as recalled. ValueError for a denoiser without a condition that can be reached.
    """

    noise: NonNegative = 0.25
    _: KW_ONLY
    tau1: Fraction = 0.6
    tau2: Fraction = 0.9
    mix: Fraction = 1.0
    stats: Literal["sample", "global"] = "sample"
    time: Literal["diffusion", "index"] = "diffusion"

    needs_condition = True
    needs_noise = True

    def check(self, run: Run, guidance: Guidance) -> None:
        if self.tau1 > self.tau2:
            raise ValueError(f"guidance 'cads' needs tau1 <= tau2, got {self.tau1:g} and {self.tau2:g}")
        if not run.nodes:
            raise ValueError(
                "guidance 'cads' counts steps; use fs.sample, not a host that chooses them on the way"
            )

    def gamma(self, t: float) -> float:
        """The share of the true condition at diffusion time t."""
        if t <= self.tau1:
            return 1.0
        return 0.0 if t >= self.tau2 else (self.tau2 - t) / (self.tau2 - self.tau1)

    def plan(self, call: Call, state: None) -> None:
        call.noised = self._gamma(call) < 1.0

    def condition(self, y: torch.Tensor, call: Call, state: None) -> torch.Tensor:
        gamma = self._gamma(call)
        if gamma == 1.0:
            return y
        assert call.run.noise is not None
        return self.anneal(y, gamma, call.run.noise(y, _KEY, call.step))

    def anneal(self, y: torch.Tensor, gamma: float, noise: torch.Tensor) -> torch.Tensor:
        """The condition with a share ``gamma`` of itself left, given standard normal noise."""
        dtype, y = y.dtype, wide(y)
        noisy = gamma**0.5 * y + (self.noise * (1.0 - gamma) ** 0.5) * noise.to(y.dtype)
        dims = tuple(range(0 if self.stats == "global" else 1, y.ndim))
        spread, mean = torch.std_mean(noisy, dim=dims, keepdim=True)
        target, center = torch.std_mean(y, dim=dims, keepdim=True)
        flat = spread == 0
        rescaled = (noisy - mean) / torch.where(flat, 1.0, spread) * target + center
        rescaled = torch.where(flat, noisy, rescaled)
        return torch.lerp(noisy, rescaled, self.mix).to(dtype)

    def _gamma(self, call: Call) -> float:
        if self.time == "index":
            return self.gamma(1.0 - call.step / call.run.steps)
        return self.gamma(call.run.time(call.node))
