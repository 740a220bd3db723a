"""Guidance towards low energy or high reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch

from .classifier import times
from .gradient import gradient_at, towards
from .method import Method, method
from .run import Call, Run

if TYPE_CHECKING:
    from .composition import Guidance


@method(
    "energy",
    rank=77,
    reference="Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling in Offline Reinforcement "
    "Learning, https://arxiv.org/abs/2304.12824",
)
@dataclass(frozen=True)
class EnergyGuidance(Method):
    """Exact energy guidance, ``score - scale grad E_t(x_t)`` with the energy of noisy states.

    For samples of ``q(x_0) exp(-b E(x_0))`` the energy is ``E_t(x) = -ln E[exp(-b E(x_0)) | x_t = x]`` and ``scale``
    is 1. ``energy(x, t) -> (B,)`` gives it, trained with :func:`contrastive_energy_loss`. ``b E(D(x))`` in its place,
    the energy of the estimate, is biased; that is :class:`RewardGuidance`. No evaluation is added.
    """

    scale: float = 1.0
    _: KW_ONLY
    energy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    needs_autograd = True

    def check(self, run: Run, guidance: Guidance) -> None:
        if self.energy is None:
            raise ValueError("guidance 'energy' needs energy(x, t) -> (B,), the energy of noisy states")

    def add(
        self,
        g: torch.Tensor,
        c: torch.Tensor,
        predictions: Mapping[str, torch.Tensor],
        call: Call,
        state: None,
    ) -> torch.Tensor:
        assert self.energy is not None
        with torch.enable_grad():
            x = call.x.detach().requires_grad_()
            gradient = gradient_at(self.energy(x, times(call)), x)
        return towards(g, -self.scale * gradient, call)


def contrastive_energy_loss(predicted: torch.Tensor, energy: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """``-sum_i softmax(-beta E)_i log softmax(-f)_i``, smallest where f is the exact energy of the noisy states.

    ``predicted``: f(x_t^i, t) of K noisy samples at one time, (..., K). ``energy``: E of the clean ones they were
    made of.
    """
    weights = torch.softmax(-beta * energy, dim=-1)
    return -(weights * torch.log_softmax(-predicted, dim=-1)).sum(dim=-1).mean()


@method(
    "reward",
    rank=78,
    reference="Test-time scaling of diffusions with flow maps, https://arxiv.org/abs/2511.22688",
    experimental=True,
)
@dataclass(frozen=True)
class RewardGuidance(Method):
    """Reward gradient, ``score + scale grad_x r(X(x_t))`` with a look ahead X at the clean sample.

    ``reward(x_0) -> (B,)``. Without ``look_ahead`` X is the guided denoised prediction, and one differentiates
    through the network. ``look_ahead(x, t) -> x_0`` is a flow map, a model that jumps to the end; it counts no
    evaluation. ``ramp`` multiplies by ``alpha / (alpha + sigma)``, the time of the flow, 1 at data. ``scale`` is the
    weight of the reward.

    Samples are pulled towards reward; they are not those of the tilted density, which would need importance weights.
    Experimental: the published constants could not be read.
    """

    scale: float = 1.0
    _: KW_ONLY
    ramp: bool = False
    reward: Callable[[torch.Tensor], torch.Tensor] | None = None
    look_ahead: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    needs_autograd = True

    def check(self, run: Run, guidance: Guidance) -> None:
        if self.reward is None:
            raise ValueError("guidance 'reward' needs reward(x_0) -> (B,)")
        if self.look_ahead is None and not run.gradients:
            raise ValueError(
                "guidance 'reward' needs look_ahead(x, t) here: this host lets no gradient through the network"
            )

    def plan(self, call: Call, state: None) -> None:
        if self.look_ahead is None and call.node.alpha > 0.0:
            call.gradient = True

    def add(
        self,
        g: torch.Tensor,
        c: torch.Tensor,
        predictions: Mapping[str, torch.Tensor],
        call: Call,
        state: None,
    ) -> torch.Tensor:
        assert self.reward is not None
        node = call.node
        if node.alpha == 0.0:
            return g
        with torch.enable_grad():
            if self.look_ahead is None:
                x, clean = call.x, call.to(g, "denoised")
            else:
                x = call.x.detach().requires_grad_()
                clean = self.look_ahead(x, times(call))
            score = gradient_at(self.reward(clean), x)
        ramp = node.alpha / (node.alpha + node.sigma) if self.ramp else 1.0
        return towards(g, self.scale * ramp * score, call)
