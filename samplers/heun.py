"""Heun's second-order method in the EDM and flow frames."""

from __future__ import annotations

import math

from ..schedules import TimeGrid
from .registry import solver
from .steps import FRAMES, FrameName, ddim, frame_name
from .steps import churn as add_churn
from .trace import Linear, Trace


@solver(
    "heun",
    family="heun",
    order=2,
    evaluations_per_step=2,
    stochastic=lambda churn, **_: churn > 0,
    aliases={"flow_match_heun": "heun:frame=flow", "heun_discrete": "heun"},
    reference="Elucidating the Design Space of Diffusion-Based Generative Models, https://arxiv.org/abs/2206.00364",
)
def heun(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    frame: FrameName = "auto",
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
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
