"""Sampling from consistency models: the multistep rules of LCM and TCD."""

from __future__ import annotations

import math
from typing import Annotated

from ..schedules import VP, Node, TimeGrid
from ..schedules.spec import Fraction, Range
from .registry import solver
from .steps import ddim, renoise
from .trace import Linear, Trace


@solver(
    "lcm",
    family="consistency",
    order=0,
    stochastic=True,
    aliases={
        "LCMScheduler": "lcm:timestep_scaling=10",
        "FlowMatchLCMScheduler": "lcm",
        "HeliosDMDScheduler": "lcm",
        "CMStochasticIterativeScheduler": "lcm",
        "ConsistencyDecoderScheduler": "lcm",
        "SCMScheduler": "lcm",
    },
    reference="Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference, https://arxiv.org/abs/2310.04378",
)
def lcm(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    timestep_scaling: Annotated[float, Range(0.0, above=True)] = math.inf,
) -> Linear:
    """Multistep consistency sampling: the prediction, then fresh noise, ``x_t = alpha_t f + sigma_t z``.

    ``f = c_out x_0 + c_skip x``, ``c_skip = 1 / (1 + 4 u^2)``, ``c_out = u / sqrt(u^2 + 1/4)``,
    u = ``timestep_scaling`` t. At its default f is x_0, as in ComfyUI, and the step that of ``cps:eta=1``. 10 is the
    boundary condition that LCM was trained with, as in diffusers: t is a training index there, and f differs from x_0
    near index 0 only. There is no order: the noise does not shrink with the step.
    """
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        f = m.denoised
        if math.isfinite(timestep_scaling):
            u = timestep_scaling * s.t
            f = (u / math.hypot(u, 0.5)) * f + (0.25 / (u**2 + 0.25)) * x
        x = t.alpha * f
        if t.sigma > 0.0:
            x = x + t.sigma * trace.noise(s, t)
    return x


@solver(
    "tcd",
    family="consistency",
    order=lambda gamma, **_: 0 if gamma > 0 else 1,
    stochastic=lambda gamma, **_: gamma > 0,
    aliases={"TCDScheduler": "tcd"},
    reference="Trajectory Consistency Distillation, https://arxiv.org/abs/2402.19159",
)
def tcd(trace: Trace, x: Linear, grid: TimeGrid, *, gamma: Fraction = 0.3) -> Linear:
    """Strategic stochastic sampling: DDIM beyond t to the cleaner time ``(1 - gamma) t``, then noise back up to t.

    ``x_l = alpha_l x_0 + sigma_l eps``, ``x_t = b x_l + sqrt(sigma_t^2 - (b sigma_l)^2) z``, ``b = alpha_t / alpha_l``.
    Times of a discrete VP schedule are training indices, and (1 - gamma) t is rounded down to one. ``gamma = 0`` is
    DDIM, ``gamma = 1`` the step of LCM but for the noise that is left at index 0. To sigma = 0 the step is DDIM's; in
    diffusers a run ends at index 0, which is a grid that does. There is no order for gamma > 0: the noise does not
    shrink with the step.
    """
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        low = _cleaner(grid, t, gamma)
        x = renoise(trace, ddim(x, m, s, low), low, t, (s, t))
    return x


def _cleaner(grid: TimeGrid, t: Node, gamma: float) -> Node:
    if gamma == 0.0:
        return t
    time = (1.0 - gamma) * t.t
    low = grid.at_time(math.floor(time) if isinstance(grid.noise_schedule, VP) else time)
    return low if low.ratio < t.ratio else t
