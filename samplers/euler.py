"""First-order methods: Euler, DDIM and their ancestral versions."""

from __future__ import annotations

import math

from ..schedules import Node, TimeGrid
from ..schedules.spec import NonNegative
from .registry import solver
from .steps import FrameName, ancestral_low, churn, ddim, frame_name, renoise
from .trace import Linear, Trace


@solver(
    "euler",
    family="euler",
    order=1,
    stochastic=lambda churn, **_: churn > 0,
    aliases={
        "flow_match_euler": "euler",
        "euler_discrete": "euler",
        "EulerDiscreteScheduler": "euler",
        "EDMEulerScheduler": "euler",
        "FlowMatchEulerDiscreteScheduler": "euler",
        "FlowMapEulerDiscreteScheduler": "euler",
        "MiniMaxH3Scheduler": "euler",
    },
    reference="Elucidating the Design Space of Diffusion-Based Generative Models, https://arxiv.org/abs/2206.00364",
)
def euler(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    churn: NonNegative = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: NonNegative = 1.0,
) -> Linear:
    """Euler's method, optionally with EDM churn; without churn the same as DDIM in every frame.

    ``y += (k_t - k_s) eps`` with y = x / alpha, k = sigma / alpha. ``churn`` first raises k by
    ``1 + min(churn / steps, sqrt(2) - 1)`` where ``s_min`` <= k <= ``s_max``, with noise scaled by ``s_noise``.
    """
    for s, t in grid.intervals():
        x, s = _churn(trace, x, s, grid, churn, s_min, s_max, s_noise)
        x, m = trace.evaluate(x, s)
        x = ddim(x, m, s, t)
    return x


_churn = churn  # the option of the same name hides the function inside the solver


@solver(
    "ddim",
    family="euler",
    order=1,
    stochastic=lambda eta, **_: eta > 0,
    aliases={"DDIMScheduler": "ddim", "DDIMParallelScheduler": "ddim", "CogVideoXDDIMScheduler": "ddim"},
    reference="Denoising Diffusion Implicit Models, https://arxiv.org/abs/2010.02502",
)
def ddim_eta(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    eta: NonNegative = 0.0,
    stride: int = 0,
    final_index: bool = False,
) -> Linear:
    """DDIM: deterministic for ``eta = 0``, DDPM's ancestral sampling for ``eta = 1``.

    ``x_t = alpha_t x_0 + sqrt(sigma_t^2 - sd^2) eps + sd z``,
    ``sd = eta sigma_t sqrt(1 - (alpha_s sigma_t / (alpha_t sigma_s))^2)``.

    ``stride`` > 0 reproduces diffusers, which steps to the training index ``t - stride`` whatever the grid says, and
    evaluates there as if it were on the grid; ``final_index`` then ends at index 0 instead of without noise.
    """
    for s, t in grid.intervals():
        if stride:
            t = _strided(grid, s.t - stride, final_index)
        x, m = trace.evaluate(x, s)
        low = ancestral_low(s, t, eta)
        x = renoise(trace, ddim(x, m, s, low), low, t, (s, t))
    return x


def _strided(grid: TimeGrid, index: float, final_index: bool) -> Node:
    if index >= 0 or final_index:
        return grid.at_time(max(index, 0.0))
    return Node(0.0, 1.0, 0.0)


@solver(
    "euler_ancestral",
    family="euler",
    order=1,
    stochastic=lambda eta, **_: eta > 0,
    aliases={
        "euler_a": "euler_ancestral",
        "euler_ancestral_RF": "euler_ancestral:frame=flow",
        "EulerAncestralDiscreteScheduler": "euler_ancestral",
        "LTXEulerAncestralRFScheduler": "euler_ancestral:frame=flow",
    },
    reference="k-diffusion, https://github.com/crowsonkb/k-diffusion",
)
def euler_ancestral(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    eta: NonNegative = 1.0,
    s_noise: NonNegative = 1.0,
    frame: FrameName = "auto",
) -> Linear:
    """Euler to less noise than asked for, then fresh noise up to the asked level.

    ``frame=edm``: down to ``k_d = sqrt(k_t^2 - k_u^2)``, ``k_u = min(k_t, eta k_t sqrt(1 - (k_t / k_s)^2))``; equals
    DDIM with the same ``eta`` on VP models. ``frame=flow`` (what ``auto`` is on flow models): down to the flow time
    ``c_d = c_t (1 + (c_t / c_s - 1) eta)``. ``s_noise`` scales the fresh noise.
    """
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        if t.sigma == 0.0:
            return ddim(x, m, s, t)
        flow = frame_name(frame, grid) == "flow"
        low = _flow_node(s, t, eta) if flow else ancestral_low(s, t, eta)
        x = renoise(trace, ddim(x, m, s, low), low, t, (s, t), s_noise)
    return x


def _flow_node(s: Node, t: Node, eta: float) -> Node:
    c_s, c_t = s.sigma / (s.alpha + s.sigma), t.sigma / (t.alpha + t.sigma)
    c = c_t * (1.0 + (c_t / c_s - 1.0) * eta)
    return Node(t.t, 1.0 - c, c)
