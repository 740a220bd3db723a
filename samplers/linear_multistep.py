"""Linear multistep methods: iPNDM, on the grid as if it were uniform or as it is, and PNDM (PLMS)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..schedules import Node, TimeGrid
from .registry import solver
from .steps import FRAMES, FrameName, ddim, frame_name
from .trace import Linear, Trace, combination

Start = Literal["multistep", "prk"]
Weights = Literal["uniform", "variable", "published"]
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
IPNDM = "Fast Sampling of Diffusion Models with Exponential Integrator, https://arxiv.org/abs/2204.13902"
PNDM = "Pseudo Numerical Methods for Diffusion Models on Manifolds, https://arxiv.org/abs/2202.09778"


def _order(order: int, **_: object) -> int:
    """The first step is Euler's, which caps a multistep method at two."""
    return min(order, 2)


def advance(x: Linear, slope: Linear, s: Node, t: Node) -> Linear:
    """``x_t / alpha_t = x_s / alpha_s + (sigma_t / alpha_t - sigma_s / alpha_s) slope``."""
    return (t.alpha / s.alpha) * x + t.alpha * (t.ratio - s.ratio) * slope


@solver(
    "ipndm",
    family="linear_multistep",
    order=_order,
    reference=IPNDM,
    aliases={"ipndm_v": "ipndm:weights=variable", "IPNDMScheduler": "ipndm:euler_at_final=false+afs"},
)
def ipndm(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    order: int = 4,
    weights: Weights = "uniform",
    frame: FrameName = "auto",
    euler_at_final: bool = True,
) -> Linear:
    """Improved PNDM: Adams-Bashforth of ``order`` 1 to 4, ``z_t = z_s + (c_t - c_s) sum_j w_j f_j``.

    z, c, f and ``frame`` as in ``heun``. ``weights=uniform`` are those of a uniform grid whatever the grid is,
    (3, -1) / 2, (23, -16, 5) / 12 and (55, -59, 37, -9) / 24. ``variable``, what iPNDM_v means, are those of the actual
    grid (in the EDM frame ``deis:variable=rho``). ``published`` is iPNDM_v as diff-sampler and ComfyUI have it, for
    parity only: wrong in order 3, and in order 4 the weights add up to one only where steps are a geometric series.

    Orders start at 1; the step to sigma = 0 is Euler's with ``euler_at_final``. What diff-sampler calls ``afs`` is
    ``ipndm+afs``.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"option 'order' of solver 'ipndm' must be 1 to 4, got {order}")
    where = FRAMES[frame_name(frame, grid)]
    history: list[tuple[float, Linear]] = []
    for s, t in grid.intervals():
        x, m = trace.evaluate(x, s)
        c_s, c_t = where.coordinate(s), where.coordinate(t)
        history = [(c_s, where.derivative(m)), *history][:order]
        if t.sigma == 0.0 and euler_at_final or not math.isfinite(c_s):
            x = ddim(x, m, s, t)
            continue
        w = _weights([c for c, _ in history], c_t, weights)
        slope = combination(*zip(w, (f for _, f in history)))
        x = where.scale(t) * (x / where.scale(s) + (c_t - c_s) * slope)
    return x


def _weights(nodes: Sequence[float], end: float, rule: Weights) -> Sequence[float]:
    """Weights of the slopes at ``nodes``, newest first, for a step from the newest to ``end``."""
    if rule == "uniform":
        return ADAMS_BASHFORTH[len(nodes)]
    near = [c for c in nodes if math.isfinite(c)]
    if rule == "published":
        return _published(-np.diff([end, *near]))
    # sum_j w_j u_j^q = 1 / (q + 1) with u = 0 and 1 at the step's ends
    u = (np.array(near) - near[0]) / (end - near[0])
    return np.linalg.solve(np.vander(u, increasing=True).T, 1.0 / np.arange(1, len(u) + 1)).tolist()


def _published(h: np.ndarray) -> list[float]:
    """iPNDM_v's weights as published, for steps of lengths ``h``, newest first: Newton's differences with three slips.

    ``third`` should be ``h_0 (2 h_0 + 3 h_1) / (6 h_1 (h_1 + h_2))``, the second term of ``fourth`` be subtracted, and
    the last weight have h_2 / h_3 in place of a = h_1 / h_2.
    """
    w = np.zeros(len(h))
    w[0] = 1.0
    if len(h) > 1:
        w[:2] += h[0] / h[1] / 2 * np.array([1.0, -1.0])
    a = h[1] / h[2] if len(h) > 2 else 0.0
    if len(h) > 2:
        third = (1 - h[0] ** 2 / (3 * h[1] * (h[1] + h[2]))) / 2
        w[:3] += third * np.array([1.0, -1 - a, a])
    if len(h) > 3:
        two, three = h[0] + h[1], h[0] + h[1] + h[2]
        fourth = (1 - h[0] / (3 * two)) / 2 + (1 - h[0] / (2 * two)) * h[0] / (6 * three)
        fourth *= h[0] * two * three / (h[1] * (h[1] + h[2]) * (h[1] + h[2] + h[3]))
        b = a * (h[1] + h[2]) / (h[2] + h[3])
        w += fourth * np.array([1.0, -1 - a - b, a + b * (1 + h[2] / h[3]), -b * a])
    return w.tolist()


@solver(
    "plms",
    family="linear_multistep",
    order=2,
    startup_evaluations=lambda start, **_: 9 if start == "prk" else 1,
    reference=PNDM,
    aliases={"pndm": "plms", "pndm_prk": "plms:start=prk", "PNDMScheduler": "plms:start=prk"},
)
def plms(trace: Trace, x: Linear, grid: TimeGrid, *, start: Start = "multistep") -> Linear:
    """PNDM: ``ipndm:frame=edm`` after a start of its own.

    ``start=multistep`` (diffusers' ``skip_prk_steps``): the first step evaluates again at Euler's prediction and takes
    the mean of both slopes, one evaluation more; orders 2, 3 and 4 follow. ``start=prk``, the paper's: three pseudo
    Runge-Kutta steps of four evaluations, ``(eps_1 + 2 eps_2 + 2 eps_3 + eps_4) / 6`` with the middle stages half way
    in t, where the classical rule has them half way in sigma / alpha; order 4 follows. Only the first evaluation of a
    step is kept.
    """
    history: list[Linear] = []
    for i, (s, t) in enumerate(grid.intervals()):
        x, m = trace.evaluate(x, s)
        inside = t.sigma > 0.0 and s.alpha > 0.0
        if inside and start == "prk" and len(history) < 3:
            history = [m.epsilon, *history]
            x = _pseudo_runge_kutta(trace, x, m.epsilon, s, t, grid)
        elif inside and start == "multistep" and i == 0:
            history = [m.epsilon]
            _, again = trace.evaluate(ddim(x, m, s, t), t)
            x = advance(x, 0.5 * (m.epsilon + again.epsilon), s, t)
        elif s.alpha > 0.0:
            history = [m.epsilon, *history][:4]
            x = advance(x, combination(*zip(ADAMS_BASHFORTH[len(history)], history)), s, t)
        else:
            x = ddim(x, m, s, t)
    return x


def _pseudo_runge_kutta(trace: Trace, x: Linear, epsilon: Linear, s: Node, t: Node, grid: TimeGrid) -> Linear:
    middle = grid.at_time((s.t + t.t) / 2)
    slope, total = epsilon, (1 / 6) * epsilon
    for node, weight in ((middle, 1 / 3), (middle, 1 / 3), (t, 1 / 6)):
        slope = trace.evaluate(advance(x, slope, s, node), node)[1].epsilon
        total = trace.keep(total + weight * slope)
    return advance(x, total, s, t)
