"""Exponential Adams methods in lambda = log(alpha / sigma): exact on any grid, of full order from the first step."""

from __future__ import annotations

from typing import Literal

from ..schedules import Node, TimeGrid
from .coefficients import Form, exponential_weights
from .registry import solver
from .steps import ddim, propagate, scale, step_length
from .trace import Evaluation, Linear, Trace, combination

Start = Literal["corrected", "runge_kutta", "euler"]
Corrector = Literal["none", "pec", "pece"]


def _order(order: int, start: Start, corrector: Corrector, **_: object) -> int:
    """What is asked for, unless the first step is Euler's, which leaves two, and three where it is corrected."""
    return min(order, 2 if corrector == "none" else 3) if start == "euler" else order


def _startup(order: int, start: Start, corrector: Corrector, **_: object) -> int:
    if order < 3 or start == "euler":
        return 0
    if start == "runge_kutta":
        return (order - 2) * (order - 2 - (corrector == "pece"))
    return (order - 2) * (order - 3) // 2


@solver(
    "exp_adams",
    family="exponential_adams",
    order=_order,
    evaluations_per_step=lambda corrector, **_: 2 if corrector == "pece" else 1,
    startup_evaluations=_startup,
    reference="Exponential integrators, https://doi.org/10.1017/S0962492910000048",
    aliases={"exp_abm": "exp_adams:corrector=pec", "res_3m": "exp_adams:start=euler"},
)
def exp_adams(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    order: int = 3,
    form: Form = "denoised",
    start: Start = "corrected",
    corrector: Corrector = "none",
) -> Linear:
    """Exponential Adams-Bashforth of any ``order``: DPM-Solver++(3M) with its last weight put right, and started well.

    ``x_t = base + c sum_j w_j m_j``, base and c as in DPM-Solver, ``w_j = int_0^h e^{-(h-u)} L_j(u) du`` with the
    Lagrange basis in lambda of the ``order`` newest predictions; ``form=epsilon`` extrapolates eps, with e^{h-u}. DDIM
    to sigma = 0 and from alpha = 0.

    ``start``, as long as there are fewer predictions than ``order``:

    * ``corrected``: integrate again from the first state through all predictions there are (in data form, of which a
      long first step amplifies nothing) and, until they are good enough for the order, evaluate again along the way:
      (order - 2)(order - 3) / 2 evaluations more, none for order 3;
    * ``runge_kutta``, to order 4: order - 2 exponential Runge-Kutta steps of order - 1 stages, evenly spaced;
    * ``euler``: through the predictions there are, which makes it second order.

    ``corrector`` is Adams-Moulton's: ``pec`` predicts through one prediction fewer, evaluates there, and integrates
    again with the new prediction added, which is kept; UniPC is this with approximate weights. ``pece`` evaluates once
    more at the corrected state.
    """
    if order < 1:
        raise ValueError(f"option 'order' of solver 'exp_adams' must be at least 1, got {order}")
    if start == "runge_kutta" and order > 4:
        raise ValueError(
            f"option 'order' of solver 'exp_adams:start=runge_kutta' must be 1 to 4, got {order}"
        )
    x, m = trace.evaluate(x, grid[0])
    first, history = x, [m]
    reach = order if corrector == "none" else max(order - 1, 1)
    for i, (s, t) in enumerate(grid.intervals()):
        last = i == grid.steps - 1
        if t.sigma == 0.0:
            return ddim(x, history[0], s, t)
        if s.alpha == 0.0:
            x = ddim(x, history[0], s, t)
            if not last:
                x, m = trace.evaluate(x, t)
                first, history = x, [m]
            continue
        staged = start == "runge_kutta" and len(history) < order - 1
        used = _stages(trace, x, history[0], t, grid, order - 1, form) if staged else history[:reach]
        predicted = _step(x, s, t, used, form)
        if last and corrector != "pece":
            return predicted
        predicted, m = trace.evaluate(predicted, t)
        starting = start == "corrected" and len(history) < order - 1
        history = [m, *history][:order]
        again = corrector == "pece" and not last
        if starting:
            # Newest first: every state of the start again, from the first through all predictions.
            states = [_step(first, history[-1].node, e.node, history, "denoised") for e in history[:-1]]
            x = trace.keep(states[0])
            if again or (len(history) < order - 1 and not last):
                redone = [trace.evaluate(y, e.node) for y, e in zip(states[::-1], history[-2::-1])]
                x, history = redone[-1][0], [*(m for _, m in redone[::-1]), history[-1]]
        elif corrector == "none" or staged:
            x = predicted
        else:
            x = trace.keep(_step(x, s, t, history, form))
            if again:
                x, history[0] = trace.evaluate(x, t)
    return x


def _step(x: Linear, s: Node, t: Node, evaluations: list[Evaluation], form: Form) -> Linear:
    """From s to t through predictions anywhere."""
    weights = exponential_weights(step_length(s, t), [step_length(s, e.node) for e in evaluations], form)
    integral = combination(*((w, getattr(e, form)) for w, e in zip(weights, evaluations)))
    return propagate(x, s, t, form) + scale(t, form) * integral


def _stages(
    trace: Trace, x: Linear, m: Evaluation, t: Node, grid: TimeGrid, n: int, form: Form
) -> list[Evaluation]:
    """Predictions at n evenly spaced points of the step from m's node to t, each stage through those before it."""
    stages = [m]
    for j in range(1, n):
        node = grid.between(m.node, t, j / n)
        stages.append(trace.evaluate(_step(x, m.node, node, stages, form), node)[1])
    return stages
