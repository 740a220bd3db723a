"""Heavy-ball momentum: generalised (GHVB) of any real order, which widens the region of stability.

Wizadwongsa et al., "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts",
https://arxiv.org/abs/2307.11118. Momentum on other methods is the transform ``+heavy_ball``.
"""

from __future__ import annotations

import math

from ..schedules import TimeGrid
from .linear_multistep import advance
from .registry import solver
from .steps import ddim
from .trace import Linear, Trace, combination

MOMENTUM = (
    "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, https://arxiv.org/abs/2307.11118"
)


def weights(order: int, b: float) -> tuple[float, ...]:
    """Weights of the velocities, newest first: ``(b + (1 - b) D) sum_i a_i D^i / b`` in backward differences D.

    The Adams-Bashforth series (a_i = 1, 1/2, 5/12, 3/8, 251/720) corrected for the filter ``v = (1 - b) v_prev + b
    eps`` and cut at ``order`` terms; at b = 1 Adams-Bashforth itself. They add up to one.
    """
    a = (1.0, 1 / 2, 5 / 12, 3 / 8, 251 / 720)[:order]
    # the inverse of the filter is (1 - (1 - b)(1 - D)) / b = (b + (1 - b) D) / b
    series = [(b * a[i] + (1 - b) * (a[i - 1] if i else 0.0)) / b for i in range(order)]
    return tuple(sum(c * (-1) ** j * math.comb(i, j) for i, c in enumerate(series)) for j in range(order))


def _order(order: float, **_: object) -> int:
    return 1 if order <= 1.0 else 2


@solver("ghvb", family="heavy_ball", order=_order, reference=MOMENTUM)
def ghvb(trace: Trace, x: Linear, grid: TimeGrid, *, order: float = 3.8) -> Linear:
    """GHVB: heavy-ball momentum of any real ``order`` ("momentum number"), 0 < order <= 5.

    With r = ceil(order) and b its fractional part (1 for integers), k = sigma / alpha,

    ``v <- (1 - b) v + b eps``, ``x_t / alpha_t = x_s / alpha_s + (k_t - k_s) sum_j g_j v_j`` over the r newest v,

    g = (2 + b, -(2 - b)) / 2b for r = 2, and so on: Adams-Bashforth on a uniform grid for an integer order, more stable
    and less accurate in between. v starts at the first eps, orders at 1.
    """
    if not 0 < order <= 5:
        raise ValueError(f"option 'order' of solver 'ghvb' must be above 0 and at most 5, got {order:g}")
    r = math.ceil(order)
    b = order - r + 1.0
    velocities: list[Linear] = []
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        if s.alpha == 0.0:
            x = ddim(x, m, s, t)
            continue
        v = trace.keep((1 - b) * velocities[0] + b * m.epsilon) if velocities else m.epsilon
        velocities = [v, *velocities][:r]
        slope = combination(*zip(weights(len(velocities), b), velocities))
        x = advance(x, slope, s, t)
    return x
