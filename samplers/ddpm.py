"""DDPM's ancestral sampling with either of the two variances of its paper."""

from __future__ import annotations

import math
from typing import Literal

from ..schedules import Node, TimeGrid
from .registry import solver
from .steps import ancestral_low, ddim
from .trace import Evaluation, Linear, Trace

Variance = Literal["small", "large"]


@solver(
    "ddpm",
    family="ddpm",
    order=1,
    stochastic=True,
    aliases={
        "DDPMScheduler": "ddpm",
        "DDPMParallelScheduler": "ddpm",
        "DDPMWuerstchenScheduler": "ddpm",
        "UnCLIPScheduler": "ddpm",
    },
    reference="Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2006.11239",
)
def ddpm(
    trace: Trace, x: Linear, grid: TimeGrid, *, variance: Variance = "small", final_noise: bool = False
) -> Linear:
    """DDPM: the mean of the posterior of x_t given x_s and x_0, with fresh noise.

    ``x_t = (alpha_s / alpha_t) (sigma_t / sigma_s)^2 x + alpha_t b x_0 + sd z``, ``b = 1 - (k_t / k_s)^2``,
    k = sigma / alpha. ``variance=small``: sd^2 = b sigma_t^2, the posterior's own (beta tilde), which is ``ddim:eta=1``
    and exact where the data are one point. ``variance=large``: sd^2 = b sigma_s^2, that of the forward step (beta),
    exact where they are standard normal and the model is VP; narrower data keep more noise than sigma_t. A step to
    sigma = 0 adds none, unless ``final_noise``: diffusers adds b sigma_s^2 there too if it does not start at index 0.
    """
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        x = ddpm_step(trace, x, m, s, t, variance, final_noise)
    return x


def ddpm_step(
    trace: Trace, x: Linear, m: Evaluation, s: Node, t: Node, variance: Variance, final_noise: bool = False
) -> Linear:
    """One step of ``ddpm``."""
    x = ddim(x, m, s, ancestral_low(s, t, 1.0))
    level = t.sigma if variance == "small" else s.sigma
    if t.sigma == 0.0 and not (final_noise and level > 0.0):
        return x
    return x + (level * math.sqrt(1.0 - (t.ratio / s.ratio) ** 2)) * trace.noise(s, t)
