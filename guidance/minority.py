"""Guidance towards rare samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Annotated

import torch

from ..schedules import Node, NoiseSchedule
from ..schedules.spec import Range, Share
from .gradient import gradient_at
from .method import Method, method
from .run import CONDITIONAL, Call, Run
from .tensors import like, wide

_KEY = 0x3140


@method(
    "minority",
    rank=79,
    reference="Self-Guided Generation of Minority Samples Using Diffusion Models, https://arxiv.org/abs/2407.11555",
)
@dataclass(frozen=True)
class SelfGuidedMinority(Method):
    """Self-guided minority guidance: up the gradient of what the network loses of its own estimate.

    Every ``every``-th step (0, n, 2 n, ...) the estimate D(x) is noised to diffusion time ``level``, ``x_p = alpha_p
    D + sigma_p e``, and denoised again; ``M = distance(D(x), D(x_p))`` with D(x_p) held constant. The gradient of M
    with respect to x, divided by its largest absolute value in each sample, times ``scale`` and the variance of
    DDPM's step, ``sigma_t^2 / sigma_s^2 (sigma_s^2 - (alpha_s / alpha_t)^2 sigma_t^2)``, moves the state after the
    step.

    ``scale`` 0.2 with ``every=2`` for ImageNet-64, 0.4 with 5 for CelebA. ``distance(a, b) -> (B,)`` is LPIPS in the
    paper, by default the norm of the difference. A guided step costs one evaluation more, and one backward pass. For
    solvers that keep nothing but the state. To follow a classifier of rarity instead, :class:`ClassifierGuidance`
    with its log p of the rarest level is minority guidance (Um and Ye, "Don't Play Favorites: Minority Guidance for
    Diffusion Models").
    """

    scale: float = 0.4
    _: KW_ONLY
    every: Annotated[int, Range(1)] = 5
    level: Share = 0.8
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    needs_steps = True
    needs_noise = True
    needs_autograd = True
    needs_gradients = True
    needs_evaluate = True
    needs_memoryless = True

    def begin(self, run: Run) -> dict[str, torch.Tensor]:
        return {}

    def plan(self, call: Call, state: dict[str, torch.Tensor]) -> None:
        if call.corrector is None and call.step % self.every == 0 and call.node.alpha > 0.0:
            call.gradient = True

    def branches(
        self, predictions: dict[str, torch.Tensor], call: Call, state: dict[str, torch.Tensor]
    ) -> None:
        if call.corrector is not None or call.step % self.every or call.node.alpha == 0.0:
            return
        assert call.run.noise is not None and call.evaluate is not None
        at = node_at(call.run.noise_schedule, self.level)
        estimate = call.to(predictions[CONDITIONAL], "denoised")
        noise = call.run.noise(call.x.detach(), _KEY, call.step)
        with torch.no_grad():
            noisy = at.alpha * estimate + at.sigma * wide(noise)
            again = Call(noisy, at, call.run, call.index, call.step, call.stage)
            answer = wide(call.evaluate(CONDITIONAL, noisy.to(call.x.dtype), at))
            lost = again.to(answer, "denoised")
        score = gradient_at((self.distance or _distance)(estimate, lost), call.x)
        largest = score.reshape(len(score), -1).abs().amax(dim=1)
        state["direction"] = wide(score) / like(torch.where(largest == 0, 1.0, largest), score)

    def move(self, x: torch.Tensor, call: Call, state: dict[str, torch.Tensor]) -> torch.Tensor:
        direction, s, t = state.pop("direction", None), call.previous, call.node
        if direction is None or s is None or t.sigma == 0.0:
            return x
        variance = (t.sigma / s.sigma) ** 2 * (s.sigma**2 - (s.alpha / t.alpha * t.sigma) ** 2)
        return torch.add(wide(x), direction, alpha=self.scale * variance).to(x.dtype)


def node_at(noise_schedule: NoiseSchedule, time: float) -> Node:
    """The node at a diffusion time in (0, 1], as :meth:`Run.time` counts it."""
    if noise_schedule.frame == "vp":
        t = time * float(noise_schedule.time(noise_schedule.level_max))
        return Node(t, *map(float, noise_schedule.alpha_sigma(t)))
    level = noise_schedule.level_at_ratio(time / (1.0 - time) if time < 1.0 else noise_schedule.level_max)
    alpha, sigma = noise_schedule.alpha_sigma_at(level)
    return Node(float(noise_schedule.time(level)), float(alpha), float(sigma))


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm((a - b).reshape(len(a), -1), dim=1)
