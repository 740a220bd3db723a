"""SA-Solver: stochastic Adams predictor and corrector for the reverse SDE with any amount of noise.

With ``h = lambda_t - lambda_s`` and ``k = 1 + tau^2`` the exact step of the reverse SDE with noise ``tau`` is

* state    ``x_t = (sigma_t / sigma_s) e^{-tau^2 h} x + alpha_t k I + sigma_t sqrt(1 - e^{-2 tau^2 h}) z``
* integral ``I = int_0^h e^{-k (h - u)} x_0(u) du``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from ..schedules import Node, TimeGrid
from ..schedules.spec import NonNegative, Range
from .coefficients import exponential_weights, moments
from .registry import solver
from .sde import decay
from .steps import ddim, step_length
from .trace import Linear, Trace, combination


def _order(tau: float, **options: Any) -> int:
    """Strong order 1 with noise, the ODE's without."""
    return 1 if tau > 0 else _ode_order(**options)


def _weak_order(tau: float, **options: Any) -> int:
    return min(2, _ode_order(**options)) if tau > 0 else _ode_order(**options)


def _ode_order(predictor_order: int, corrector_order: int, lower_order_final: bool, **_: object) -> int:
    """The corrector's, one more than the predictor's at most; the first step leaves 2, with correction 3."""
    if not corrector_order:
        return min(predictor_order, 2)
    return min(corrector_order, predictor_order + 1, 2 if lower_order_final else 3)


def _evaluations(pece: bool, corrector_order: int, **_: object) -> int:
    return 2 if pece and corrector_order else 1


@solver(
    "sa_solver",
    family="sa_solver",
    order=_order,
    weak_order=_weak_order,
    evaluations_per_step=_evaluations,
    startup_evaluations=lambda **options: 1 - _evaluations(**options),  # nothing to correct at the start
    stochastic=lambda tau, **_: tau > 0,
    reference="SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models, https://arxiv.org/abs/2309.05019",
    aliases={
        "sa_solver_pece": "sa_solver:pece=true",
        "SASolverScheduler": "sa_solver:predictor_order=2,corrector_order=2,tau_at=start,simple_order_2=true",
    },
)
def sa_solver(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    predictor_order: Annotated[int, Range(1)] = 3,
    corrector_order: Annotated[int, Range(0)] = 4,
    tau: NonNegative = 1.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    tau_at: Literal["target", "start"] = "target",
    s_noise: NonNegative = 1.0,
    pece: bool = False,
    simple_order_2: bool = False,
    lower_order_final: bool = True,
) -> Linear:
    """SA-Solver: the x_0 in the integral is a polynomial in lambda through past predictions.

    ``x_t = (sigma_t / sigma_s) e^{-tau^2 h} x + sum_j b_j m_j + sigma_t sqrt(1 - e^{-2 tau^2 h}) z``,
    ``b_j = alpha_t k int_0^h e^{-k (h - u)} L_j(u) du``. The predictor goes through the ``predictor_order`` newest
    predictions. The corrector repeats the step with the same z through the prediction at the predicted state and
    ``corrector_order`` - 1 older ones; 0 is no corrector. With ``pece`` the corrected state is evaluated as well: two
    evaluations a step.

    ``tau`` = 0 is the ODE, 1 the usual reverse SDE. There is noise where ``s_min`` <= sigma / alpha <= ``s_max`` at the
    node ``tau_at``: the ``target`` of the step, as in the original and ComfyUI, or its ``start``, as in diffusers.
    The original draws none in a last step that leaves noise, which is an ``s_min`` above it. ``s_noise`` scales z.
    ``simple_order_2`` is the rule for two nodes of the original and diffusers, which gives their slope the weight
    ``alpha_t k h^2 / 2``. Orders start at 1, with ``lower_order_final`` they end so; at both ends the corrector's is
    one more than the predictor's, except before a step to sigma = 0, which is DDIM's: there it is equal, as in ComfyUI.
    ``predictor_order=1,corrector_order=0`` is ``ddim:eta=1``.
    """
    final_zero = grid[-1].sigma == 0.0
    steps = grid.steps - final_zero
    x, m = trace.evaluate(x, grid[0])
    nodes, values = [grid[0]], [m.denoised]
    for i, (s, t) in enumerate(grid.intervals()):
        if t.sigma == 0.0:
            return ddim(x, m, s, t)
        left = steps - i if lower_order_final else grid.steps
        at = t if tau_at == "target" else s
        eta = tau**2 if s_min <= at.ratio <= s_max else 0.0
        h = step_length(s, t)
        base = (t.sigma / s.sigma * decay(eta, h)) * x
        if eta > 0.0:
            base = base + (s_noise * t.sigma * math.sqrt(-math.expm1(-2.0 * eta * h))) * trace.noise(s, t)
        p = min(predictor_order, left)
        c = 0 if i == grid.steps - 1 else min(corrector_order, left if final_zero else left + 1)
        base = trace.keep(base) if c else base
        x = base + _integral(nodes[:p], values[:p], s, t, eta, simple_order_2)
        if i == grid.steps - 1:
            return x
        x, m = trace.evaluate(x, t)
        nodes, values = [t, *nodes], [m.denoised, *values]
        if c:
            x = trace.keep(base + _integral(nodes[:c], values[:c], s, t, eta, simple_order_2))
            if pece:
                x, m = trace.evaluate(x, t)
                values[0] = m.denoised
    return x


def _integral(
    nodes: Sequence[Node], values: Sequence[Linear], s: Node, t: Node, eta: float, simple_order_2: bool
) -> Linear:
    """``sum_j b_j m_j``, newest node first. In the variable k lambda the weights are those of the ODE."""
    k = 1.0 + eta
    h = k * step_length(s, t)
    if not math.isfinite(h):  # all weight is at the cleaner end
        return t.alpha * values[0]
    offsets = [k * step_length(s, n) for n in nodes]
    if simple_order_2 and len(nodes) == 2:
        slope = h**2 / 2 / (offsets[0] - offsets[1])
        weights = [slope, -slope]
        weights[offsets.index(0.0)] += moments(h, 1, "denoised")[0]
    else:
        weights = exponential_weights(h, offsets, "denoised")
    return t.alpha * combination(*zip(weights, values))
