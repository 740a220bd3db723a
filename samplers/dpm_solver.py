"""DPM-Solver and DPM-Solver++, multistep: exponential Adams-Bashforth in lambda = log(alpha / sigma).

With ``h = lambda_t - lambda_s``, ``r_0 = h_prev / h``, ``r_1 = h_prevprev / h``, predictions m_0 (newest), m_1, m_2,
``D1 = (m_0 - m_1) / r_0`` and P_1 = 1 - e^{-h}, P_2 = 1 - P_1 / h, P_3 = 1/2 - P_2 / h (data form; epsilon form has
the signs of h reversed), a step is ``base + c (P_1 m_0 + ...)`` with base, c = (sigma_t / sigma_s) x, alpha_t in data
form and (alpha_t / alpha_s) x, -sigma_t in epsilon form.
"""

from __future__ import annotations

import math
from typing import Literal

from ..schedules import Node, TimeGrid
from .coefficients import Form, moments
from .registry import solver
from .steps import ddim, propagate, scale, step_length
from .trace import Evaluation, Linear, Trace, combination

SolverType = Literal["midpoint", "heun"]
PAPER = "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, https://arxiv.org/abs/2211.01095"
PAPER_EPS = "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling, https://arxiv.org/abs/2206.00927"


@solver(
    "dpmpp_2m",
    family="dpm_solver",
    order=2,
    reference=PAPER,
    aliases={
        "dpm_solver_multistep": "dpmpp_2m",
        "DPMSolverMultistepScheduler": "dpmpp_2m",
        "EDMDPMSolverMultistepScheduler": "dpmpp_2m",
        "res_multistep": "dpmpp_2m:solver_type=heun",
        "res_2m": "dpmpp_2m:solver_type=heun",
        "dpm_2m": "dpmpp_2m:form=epsilon",
    },
)
def dpmpp_2m(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    form: Form = "denoised",
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = False,
) -> Linear:
    """DPM-Solver++(2M); with ``form=epsilon`` DPM-Solver-2 multistep.

    ``solver_type=midpoint``: ``base + c P_1 (m_0 + D1 / 2)``; ``heun``: ``base + c (P_1 m_0 + P_2 D1)``. The first
    step, a step to sigma = 0 and, with ``lower_order_final``, the last step are DDIM's.
    """
    return _multistep(trace, x, grid, 2, form, solver_type, lower_order_final)


@solver(
    "dpmpp_3m",
    family="dpm_solver",
    order=2,
    reference=PAPER,
    aliases={"dpm_3m": "dpmpp_3m:form=epsilon"},
)
def dpmpp_3m(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    form: Form = "denoised",
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = False,
) -> Linear:
    """DPM-Solver++(3M) as every library ships it, which is second order.

    ``base + c (P_1 m_0 + P_2 D1' + P_3 D2)``, ``D1' = D1 + r_0 / (r_0 + r_1) (D1 - D1_prev)``,
    ``D2 = (D1 - D1_prev) / (r_0 + r_1)``. D2 is a second divided difference, half the second derivative that P_3
    belongs to; the published code has this half weight everywhere and it is kept under this name.
    ``form`` is the prediction that is extrapolated, ``solver_type`` the rule of the second-order steps;
    ``lower_order_final`` ends with orders 2 and 1.
    """
    return _multistep(trace, x, grid, 3, form, solver_type, lower_order_final)


def _multistep(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    order: int,
    form: Form,
    solver_type: SolverType,
    lower_order_final: bool,
) -> Linear:
    history: list[tuple[Node, Linear]] = []
    for i, (s, t) in enumerate(grid.intervals()):
        x, m = trace.evaluate(x, s)
        history = [(s, getattr(m, form)), *history][:order]
        last = grid.steps - i if lower_order_final else order
        x = _step(x, m, history[:last], t, form, solver_type)
    return x


def _step(
    x: Linear, m: Evaluation, history: list[tuple[Node, Linear]], t: Node, form: Form, solver_type: SolverType
) -> Linear:
    s, h = history[0][0], step_length(history[0][0], t)
    if len(history) == 1 or not math.isfinite(h):
        return ddim(x, m, s, t, form)
    return propagate(x, s, t, form) + scale(t, form) * integral(history, t, h, form, solver_type)


def integral(
    history: list[tuple[Node, Linear]], t: Node, h: float, form: Form, solver_type: SolverType
) -> Linear:
    """``P_1 m_0 + ...`` through one to three newest predictions, with P_1, P_2, P_3 of length ``h``.

    ``h`` is the step in lambda for the ODE and (1 + eta) times that for the SDE; the r are ratios of steps in lambda.
    """
    nodes, values = [n for n, _ in history], [v for _, v in history]
    p1 = moments(h, 1, form)[0]
    if len(history) == 1 or not math.isfinite(h):
        return p1 * values[0]
    # Distances may be infinite (a node without signal): every quotient below then has its limit, 0.
    step = step_length(nodes[0], t)
    r = [step_length(b, a) / step for a, b in zip(nodes, nodes[1:])]
    d1 = (values[0] - values[1]) / r[0]
    p2 = moments(h, 2, form)[1] / h
    if len(history) == 2:
        return p1 * values[0] + (p1 / 2 if solver_type == "midpoint" else p2) * d1
    d1_prev = (values[1] - values[2]) / r[1]
    d2 = (d1 - d1_prev) / (r[0] + r[1])
    p3 = moments(h, 3, form)[2] / h**2
    return combination((p1, values[0]), (p2, d1 + r[0] / (r[0] + r[1]) * (d1 - d1_prev)), (p3, d2))
