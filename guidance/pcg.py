"""Classifier-free guidance as a predictor-corrector."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from ..schedules import Node
from ..schedules.spec import NonNegative, Range
from .method import Method, method
from .run import Call, Run
from .tensors import wide

if TYPE_CHECKING:
    from .composition import Guidance

_KEY = 0x9C6


@method(
    "pcg",
    rank=19,
    reference="Classifier-Free Guidance is a Predictor-Corrector, https://arxiv.org/abs/2408.09000",
)
@dataclass(frozen=True)
class PCG(Method):
    """CFG as predictor-corrector: the solver's step without guidance, then Langevin steps on the sharpened density.

    After each step, at its end, ``steps`` times ``x <- x + (delta / 2) score_gamma(x) + sqrt(delta) n`` with
    ``score_gamma = (1 - gamma) score_u + gamma score_c`` and fresh normal n, for x in the variance preserving frame
    (others are scaled to it); nothing is corrected at sigma = 0. NFE is ``N (1 + 2 K) - 2 K``, K = steps. In the limit
    of small steps ``gamma = 2 w - 1`` with K = 1 is DDPM under CFG at w, and K -> infinity samples the density
    ``p_u^(1 - gamma) p_c^gamma`` of every level. Methods that shape the guided prediction act in the corrector only.

    ``gamma`` has the place of the scale. ``rule`` for delta, with abar = alpha^2 / (alpha^2 + sigma^2) at start and
    end of the step: ``ddpm`` is ``1 - abar_s / abar_t``, ``log`` is ``ln(abar_t / abar_s)``, the integral of beta;
    ``factor`` multiplies it. ``limit`` caps it at ``limit sigma_t^2`` of that frame (0: no cap); steps above ``4
    sigma^2`` diverge.

    For solvers that keep nothing but the state, since the corrector changes it. ValueError for others. The rule is the
    theory's; the constant of the paper's own experiments is not known here.
    """

    gamma: NonNegative = 3.0
    _: KW_ONLY
    steps: Annotated[int, Range(0)] = 1
    rule: Literal["ddpm", "log"] = "ddpm"
    factor: NonNegative = 1.0
    limit: NonNegative = 1.0

    needs_steps = True
    needs_noise = True
    needs_evaluate = True
    needs_memoryless = True

    @property
    def weight(self) -> float | None:
        return self.gamma

    @property
    def slots(self) -> frozenset[str]:
        return frozenset({"when the unconditional branch runs"})

    def check(self, run: Run, guidance: Guidance) -> None:
        if guidance.has("cfgpp", "extrapolate"):
            raise ValueError(
                "guidance 'pcg' makes its steps without guidance and then corrects them: 'cfgpp' and 'extrapolate', "
                "which belong to guided steps, cannot join it"
            )

    def plan(self, call: Call, state: None) -> None:
        if call.corrector is None:
            call.guided = False

    def move(self, x: torch.Tensor, call: Call, state: None) -> torch.Tensor:
        node, run = call.node, call.run
        if node.sigma == 0.0:
            return x
        assert call.previous is not None and call.predict is not None and run.noise is not None
        delta, scale = self.step_size(call.previous, node), math.hypot(node.alpha, node.sigma)
        for k in range(self.steps):
            epsilon = call.to(wide(call.predict(x, k)), "epsilon")
            noise = run.noise(x, _KEY, call.step, k)
            # in the frame of the state: score / scale and noise * scale
            drift = -0.5 * delta * scale * scale / node.sigma
            moved = wide(x) + drift * epsilon + (math.sqrt(delta) * scale) * wide(noise)
            call.x = x = moved.to(x.dtype)
        return x

    def step_size(self, s: Node, t: Node) -> float:
        """delta of the step from s to t, in the variance preserving frame."""
        before, after = (n.alpha**2 / (n.alpha**2 + n.sigma**2) for n in (s, t))
        if self.rule == "ddpm":
            delta = 1.0 - before / after
        else:
            delta = math.log(after / before) if before > 0.0 else math.inf
        delta *= self.factor
        level = t.sigma**2 / (t.alpha**2 + t.sigma**2)
        return min(delta, self.limit * level) if self.limit else delta
