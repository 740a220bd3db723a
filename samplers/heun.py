"""Runge-Kutta methods of two stages: Heun's in the EDM and flow frames, DPM-Solver-2's midpoint rule; and Heun++."""

from __future__ import annotations

import math

from ..schedules import Node, TimeGrid
from ..schedules.spec import NonNegative, Share
from .registry import solver
from .steps import FRAMES, FrameName, ancestral_low, ddim, frame_name, renoise
from .steps import churn as add_churn
from .trace import Evaluation, Linear, Trace


@solver(
    "heun",
    family="heun",
    order=2,
    evaluations_per_step=2,
    stochastic=lambda churn, **_: churn > 0,
    aliases={
        "flow_match_heun": "heun:frame=flow",
        "heun_discrete": "heun",
        "HeunDiscreteScheduler": "heun",
        "FlowMatchHeunDiscreteScheduler": "heun:frame=flow",
        "KarrasVeScheduler": "heun:churn=80,s_min=0.05,s_max=50,s_noise=1.007",
    },
    reference="Elucidating the Design Space of Diffusion-Based Generative Models, https://arxiv.org/abs/2206.00364",
)
def heun(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    frame: FrameName = "auto",
    churn: NonNegative = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: NonNegative = 1.0,
) -> Linear:
    """Trapezoidal rule with an Euler predictor: ``z_t = z_s + (c_t - c_s)(f_s + f_t) / 2``.

    ``frame=edm``: z = x / alpha, c = sigma / alpha, f = eps. ``frame=flow`` (what ``auto`` is on flow models): z = x /
    (alpha + sigma), c = sigma / (alpha + sigma), f = velocity. The last step to sigma = 0 is Euler's, so n steps cost
    2 n - 1 evaluations. ``churn``, ``s_min``, ``s_max`` and ``s_noise`` as in ``euler``.
    """
    where = FRAMES[frame_name(frame, grid)]
    for s, t in grid.intervals():
        x, s = add_churn(trace, x, s, grid, churn, s_min, s_max, s_noise)
        x, m = trace.evaluate(x, s)
        euler = ddim(x, m, s, t)
        if t.sigma == 0.0 or not math.isfinite(where.coordinate(s)):
            x = euler
            continue
        slope = where.derivative(m)
        _, m_t = trace.evaluate(euler, t)
        half = 0.5 * (where.coordinate(t) - where.coordinate(s))
        x = where.scale(t) * (x / where.scale(s) + half * (slope + where.derivative(m_t)))
    return x


@solver(
    "heunpp2",
    family="heun",
    order=1,
    evaluations_per_step=3,
    stochastic=lambda churn, **_: churn > 0,
    reference="ComfyUI, https://github.com/Comfy-Org/ComfyUI",
)
def heunpp2(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    frame: FrameName = "auto",
    churn: NonNegative = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: NonNegative = 1.0,
) -> Linear:
    """Heun++ as ComfyUI has it: the slopes here and at the next two nodes, weighted by noise level; first order.

    ``z_t = z_s + (c_t - c_s)(f_s + w_1 (f_1 - f_s) + w_2 (f_2 - f_s))``, f_1 at Euler's prediction for node 1, which is
    t, and f_2 where Euler goes on to node 2; ``w_j = c_j / (3 c_0)``, c_0 the first finite coordinate of the grid. The
    last step but one has node 1 only, ``w_1 = c_1 / (2 c_0)``, and the last is Euler's: n steps cost 3 n - 3
    evaluations. Second order would need ``w_1 (c_1 - c_s) + w_2 (c_2 - c_s) = (c_t - c_s) / 2``.
    ``frame`` as in ``heun``; ``churn``, ``s_min``, ``s_max`` and ``s_noise`` as in ``euler``.
    """
    where, nodes = FRAMES[frame_name(frame, grid)], list(grid)
    first = max(filter(math.isfinite, map(where.coordinate, nodes)))
    for i, (s, t) in enumerate(grid.intervals()):
        x, s = add_churn(trace, x, s, grid, churn, s_min, s_max, s_noise)
        x, m = trace.evaluate(x, s)
        ahead = nodes[i + 1 : -1][:2] if math.isfinite(where.coordinate(s)) else []
        if not ahead:
            x = ddim(x, m, s, t)
            continue
        slope, change, u, m_u, at = where.derivative(m), Linear({}), x, m, s
        for node in ahead:
            u, m_u = trace.evaluate(ddim(u, m_u, at, node), node)
            weight = where.coordinate(node) / ((1 + len(ahead)) * first)
            change, at = change + weight * (where.derivative(m_u) - slope), node
        x = where.scale(t) * (
            x / where.scale(s) + (where.coordinate(t) - where.coordinate(s)) * (slope + change)
        )
    return x


@solver(
    "dpm_2",
    family="heun",
    order=2,
    evaluations_per_step=2,
    stochastic=lambda churn, **_: churn > 0,
    aliases={"kdpm2": "dpm_2", "KDPM2DiscreteScheduler": "dpm_2"},
    reference="Elucidating the Design Space of Diffusion-Based Generative Models, https://arxiv.org/abs/2206.00364",
)
def dpm_2(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    r: Share = 0.5,
    churn: NonNegative = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: NonNegative = 1.0,
) -> Linear:
    """Two-stage rule in x / alpha against k = sigma / alpha with its stage at ``k_t^r k_s^{1-r}`` (DPM-Solver-2, EDM).

    ``y_t = y_s + (k_t - k_s)((1 - 1/(2r)) eps_s + 1/(2r) eps_m)``: the midpoint in lambda for ``r = 1/2``. Euler to
    sigma = 0. ``churn``, ``s_min``, ``s_max`` and ``s_noise`` as in ``euler``.
    """
    for s, t in grid.intervals():
        x, s = add_churn(trace, x, s, grid, churn, s_min, s_max, s_noise)
        x, m = trace.evaluate(x, s)
        x = _two_stage(trace, x, m, s, t, grid, r)
    return x


@solver(
    "dpm_2_ancestral",
    family="heun",
    order=lambda eta, **_: 1 if eta > 0 else 2,
    weak_order=2,
    evaluations_per_step=2,
    stochastic=lambda eta, **_: eta > 0,
    aliases={
        "kdpm2_ancestral": "dpm_2_ancestral",
        "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    },
    reference="k-diffusion, https://github.com/crowsonkb/k-diffusion",
)
def dpm_2_ancestral(
    trace: Trace, x: Linear, grid: TimeGrid, *, eta: NonNegative = 1.0, s_noise: NonNegative = 1.0
) -> Linear:
    """``dpm_2`` down to less noise, then fresh noise: ``eta`` and ``s_noise`` as in ``euler_ancestral``."""
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        low = ancestral_low(s, t, eta)
        x = renoise(trace, _two_stage(trace, x, m, s, low, grid, 0.5), low, t, (s, t), s_noise)
    return x


def _two_stage(trace: Trace, x: Linear, m: Evaluation, s: Node, t: Node, grid: TimeGrid, r: float) -> Linear:
    if t.sigma == 0.0 or s.alpha == 0.0:
        return ddim(x, m, s, t)
    middle = grid.between(s, t, r)
    _, m_r = trace.evaluate(ddim(x, m, s, middle), middle)
    slope = (1 - 1 / (2 * r)) * m.epsilon + 1 / (2 * r) * m_r.epsilon
    return t.alpha * (x / s.alpha + (t.ratio - s.ratio) * slope)
