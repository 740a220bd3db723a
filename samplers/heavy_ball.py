"""Heavy-ball momentum: generalised (GHVB) of any real order, which widens the region of stability.

Wizadwongsa et al., "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts",
https://arxiv.org/abs/2307.11118.
"""

from __future__ import annotations

import math
from typing import Literal

from ..schedules import TimeGrid
from ..schedules.parametrization import Prediction
from ..schedules.spec import Share
from .linear_multistep import advance
from .rebuilding import Rebuilding, Step
from .registry import Solver, solver, transform
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


Start = Literal["every", "higher", "first"]


@transform(
    "heavy_ball",
    order=lambda order, inner, beta, **_: order if beta == 1.0 else min(order, 1),
    reference=MOMENTUM,
)
def heavy_ball(
    inner: Solver,
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    beta: Share = 0.8,
    nesterov: bool = False,
    start: Start = "every",
) -> Linear:
    """Heavy-ball momentum (HB) on any linear multistep method: wider stability, first order for ``beta`` < 1.

    Where the method steps ``x_t = a x_s + W u``, u a combination of predictions whose weights add up to one, the step
    is ``v <- (1 - beta) v + beta u``, ``x_t = a x_s + W v``. With ``nesterov`` the filter acts on the new v once
    more. v starts at the first u. A corrector has a velocity of its
    own, and a step that keeps nothing of the state (to sigma = 0, data form) is left as it is. On Adams-Bashforth the
    stable real interval grows by (2 - beta) / beta.

    ``start``: ``every`` step is filtered (the paper); ``higher``: steps with a single prediction pass unfiltered and
    v starts at the first other one (the released Stable Diffusion scheduler); ``first``: they pass, but v starts at
    the first prediction (the released guided-diffusion code).
    """
    if inner.evaluations_per_step != 1:
        raise ValueError(
            f"heavy_ball needs a solver with one evaluation a step, {inner.spec!r} has {inner.evaluations_per_step}"
        )
    momentum = _Momentum(trace, inner, beta, nesterov, start)
    return momentum.run(lambda view, x: inner.solve(view, x, grid), x)


class _Momentum(Rebuilding):
    name = "heavy_ball"

    def __init__(self, inner: Trace, solver: Solver, beta: float, nesterov: bool, start: Start) -> None:
        super().__init__(inner, solver)
        self.beta, self.nesterov, self.convention = beta, nesterov, start
        self.velocities: dict[tuple[bool, Prediction], Linear] = {}

    def rebuild(self, step: Step, corrected: bool) -> Linear:
        forms: set[Prediction] = {form for _, form in step.weights}
        values = combination(*((w, self.value(key)) for key, w in step.weights.items()))
        total = sum(step.weights.values())
        if len(forms) > 1 or total == 0.0 or not any(step.base.terms.values()):
            return step.base + values
        key: tuple[bool, Prediction] = corrected, forms.pop()
        u, v = values / total, self.velocities.get(key)
        first_order = sum(w != 0.0 for w in step.weights.values()) == 1
        if self.convention != "every" and first_order and not (self.convention == "first" and v is None):
            return step.base + values
        v = u if v is None else (1.0 - self.beta) * v + self.beta * u
        self.velocities[key] = v = self.inner.keep(v)
        return step.base + total * ((1.0 - self.beta) * v + self.beta * u if self.nesterov else v)
