"""CFG++: guided estimate, unguided noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..schedules import Node
from ..schedules.spec import Fraction
from .method import Method, method
from .run import Call, Run
from .tensors import wide

if TYPE_CHECKING:
    from .composition import Guidance


@dataclass
class _Before:
    """The last step: its unconditional and its returned denoised prediction, and where it began."""

    unconditional: torch.Tensor | None = None
    returned: torch.Tensor | None = None
    node: Node | None = None


@method(
    "cfgpp",
    rank=89,
    reference="CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models, https://arxiv.org/abs/2406.08070",
)
@dataclass(frozen=True)
class CFGPlusPlus(Method):
    """CFG++: a step to t takes the guided x_0 and the unconditional noise, ``x_t = alpha_t D_l + sigma_t eps_u``.

    ``D_l = u + scale (c - u)`` of denoised predictions, scale in [0, 1]; 0.6 is usual, 1 for distilled models. As a
    prediction for DDIM that is ``u + (D_l - u) / (1 - k_t / k_s)`` with k = sigma / alpha, in any space: CFG whose w
    depends on the step, large for short ones and ``scale`` in the last. Under ``dpmpp_2m`` the step is that of the
    published second-order version, whose history holds the unconditional prediction,
    ``x_t = D_l - e^{-h} D_u + (1 - e^{-h}) (D_l - D_u_old) / (2 r) + e^{-h} x`` (divided by alpha), r = h_old / h.

    Two evaluations a step, also at scale 1. Outside CFG's interval and after adaptive guidance's threshold the step is
    plainly conditional. ValueError under other solvers, in whose steps it means nothing.
    """

    scale: Fraction = 0.6

    needs_scale = True
    needs_steps = True

    @property
    def weight(self) -> float | None:
        return self.scale

    @property
    def guides(self) -> bool:
        return True

    @property
    def slots(self) -> frozenset[str]:
        return frozenset({"the combination"})

    def check(self, run: Run, guidance: Guidance) -> None:
        if not run.first_order and run.solver != "dpmpp_2m":
            raise ValueError(
                f"guidance 'cfgpp' changes the step itself and is defined for the solvers ddim, euler and dpmpp_2m, "
                f"not for {run.solver or 'this one'!r}"
            )

    def begin(self, run: Run) -> _Before:
        return _Before()

    def correct(
        self, g: torch.Tensor, c: torch.Tensor, u: torch.Tensor | None, call: Call, state: _Before
    ) -> torch.Tensor:
        assert u is not None
        end = call.run.after(call.index)
        decay = end.ratio / call.node.ratio if math.isfinite(call.node.ratio) else 0.0
        if call.run.first_order:
            return u + (g - u) / (1.0 - decay)
        return self._second_order(g, u, end, decay, call, state)

    def _second_order(
        self, g: torch.Tensor, u: torch.Tensor, end: Node, decay: float, call: Call, state: _Before
    ) -> torch.Tensor:
        """The prediction that takes DPM-Solver++(2M) to the published step."""
        s, guided, plain = call.node, call.to(g, "denoised"), call.to(u, "denoised")
        value = (guided - decay * plain) / (1.0 - decay)
        if state.node is not None and state.node.alpha > 0.0 and end.sigma > 0.0:
            assert state.unconditional is not None and state.returned is not None
            r = (s.lam - state.node.lam) / (end.lam - s.lam)
            value = value + (guided - state.unconditional + state.returned) / (2.0 * r)
            value = value / (1.0 + 1.0 / (2.0 * r))
        state.node, state.unconditional, state.returned = s, plain, value
        return call.back(value, "denoised")

    def observe(self, g: torch.Tensor, predictions: object, call: Call, state: _Before) -> None:
        if not call.guided and not call.run.first_order:  # the step was plain: so is the history
            state.node = call.node
            state.unconditional = state.returned = call.to(wide(g), "denoised")
