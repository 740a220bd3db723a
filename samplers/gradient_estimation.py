"""Gradient estimation: Euler's method with the change of the last two slopes added."""

from __future__ import annotations

import math

from ..schedules import TimeGrid
from .registry import solver
from .steps import FRAMES, FrameName, ddim, frame_name
from .trace import Linear, Trace


@solver(
    "gradient_estimation",
    family="gradient_estimation",
    order=lambda gamma, **_: 2 if gamma == 1.5 else 1,
    reference="Interpreting and Improving Diffusion Models from an Optimization Perspective, "
    "https://openreview.net/pdf?id=o2ND9v0CeK",
)
def gradient_estimation(
    trace: Trace, x: Linear, grid: TimeGrid, *, gamma: float = 2.0, frame: FrameName = "auto"
) -> Linear:
    """Gradient-estimation sampler: ``z_t = z_s + (c_t - c_s)(gamma f_s + (1 - gamma) f_prev)``.

    z, c, f and ``frame`` as in ``heun``. ``gamma = 1`` is Euler, ``gamma = 3/2`` Adams-Bashforth of a uniform grid
    (``ipndm:order=2``). The first step and the one to sigma = 0 are Euler's.
    """
    where = FRAMES[frame_name(frame, grid)]
    previous: Linear | None = None
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        if t.sigma == 0.0 or not math.isfinite(where.coordinate(s)):
            x = ddim(x, m, s, t)
            continue
        slope = where.derivative(m)
        mean = slope if previous is None else gamma * slope + (1.0 - gamma) * previous
        x = where.scale(t) * (x / where.scale(s) + (where.coordinate(t) - where.coordinate(s)) * mean)
        previous = slope
    return x
