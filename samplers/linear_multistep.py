"""Linear multistep methods with fixed weights: iPNDM and PNDM (PLMS).

All act in the EDM frame, ``d(x / alpha) / d(sigma / alpha) = eps``, with the Adams-Bashforth weights of a uniform grid
whatever the grid is. The exact rule for the actual grid is ``deis:variable=rho``.
"""

from __future__ import annotations

import math

from ..schedules import Node, TimeGrid
from .registry import solver
from .steps import ddim
from .trace import Evaluation, Linear, Trace, combination

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
IPNDM = "Fast Sampling of Diffusion Models with Exponential Integrator, https://arxiv.org/abs/2204.13902"
PNDM = "Pseudo Numerical Methods for Diffusion Models on Manifolds, https://arxiv.org/abs/2202.09778"


def _order(order: int, afs: bool, **_: object) -> int:
    """The first step is Euler's, which caps a multistep method at two; a slope that is assumed leaves one."""
    return 1 if afs else min(order, 2)


def advance(x: Linear, slope: Linear, s: Node, t: Node) -> Linear:
    """``x_t / alpha_t = x_s / alpha_s + (sigma_t / alpha_t - sigma_s / alpha_s) slope``."""
    return (t.alpha / s.alpha) * x + t.alpha * (t.ratio - s.ratio) * slope


@solver(
    "ipndm",
    family="linear_multistep",
    order=_order,
    reference=IPNDM,
    aliases={"ipndm_v": "deis:order=4,variable=rho"},
)
def ipndm(trace: Trace, x: Linear, grid: TimeGrid, *, order: int = 4, afs: bool = False) -> Linear:
    """Improved PNDM: Adams-Bashforth weights of a uniform grid on the noise predictions.

    ``x_t / alpha_t = x_s / alpha_s + (k_t - k_s) sum_j c_j eps_j``, c = (3, -1) / 2, (23, -16, 5) / 12 and
    (55, -59, 37, -9) / 24 for ``order`` 2, 3, 4; lower at the start, DDIM to sigma = 0. ``afs`` (analytical first step)
    takes ``eps = x / sqrt(alpha^2 + sigma^2)`` for the first evaluation, what data of unit variance have, and saves it.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"option 'order' of solver 'ipndm' must be 1 to 4, got {order}")
    history: list[Linear] = []
    for i, (s, t) in enumerate(grid.intervals()):
        if afs and i == 0 and grid.steps > 1 and s.alpha > 0.0:
            m, epsilon = None, trace.keep(x / math.hypot(s.alpha, s.sigma))
        else:
            x, m = trace.evaluate(x, s)
            epsilon = m.epsilon if s.alpha > 0.0 else None
        if t.sigma == 0.0 and m is not None:
            return ddim(x, m, s, t)
        x, history = _adams(x, m, epsilon, history, s, t, order)
    return x


def _adams(
    x: Linear,
    m: Evaluation | None,
    epsilon: Linear | None,
    history: list[Linear],
    s: Node,
    t: Node,
    order: int,
) -> tuple[Linear, list[Linear]]:
    if epsilon is None:  # no signal: the frame is infinite there, DDIM is not
        assert m is not None
        return ddim(x, m, s, t), history
    history = [epsilon, *history][:order]
    slope = combination(*zip(ADAMS_BASHFORTH[len(history)], history))
    return advance(x, slope, s, t), history


@solver(
    "plms",
    family="linear_multistep",
    order=2,
    startup_evaluations=1,
    reference=PNDM,
    aliases={"pndm": "plms"},
)
def plms(trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
    """PNDM with the linear multistep start of diffusers (``skip_prk_steps``): n + 1 evaluations for n steps.

    The first step evaluates again at Euler's prediction and takes the mean of both slopes; the second evaluation is
    not kept. From then on ``ipndm`` of orders 2, 3, 4.
    """
    history: list[Linear] = []
    for i, (s, t) in enumerate(grid.intervals()):
        x, m = trace.evaluate(x, s)
        if i == 0 and t.sigma > 0.0 and s.alpha > 0.0:
            history = [m.epsilon]
            _, again = trace.evaluate(ddim(x, m, s, t), t)
            x = advance(x, 0.5 * (m.epsilon + again.epsilon), s, t)
            continue
        x, history = _adams(x, m, m.epsilon if s.alpha > 0.0 else None, history, s, t, 4)
    return x
