"""DPM-Solver and DPM-Solver++, singlestep: exponential Runge-Kutta methods, with the nodes of the grid as stages."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ..schedules import Node, TimeGrid
from .coefficients import Form, moments
from .dpm_solver import PAPER, PAPER_EPS, SolverType
from .registry import solver
from .steps import ddim, scale, step_length
from .trace import Evaluation, Linear, Trace

Inner = Literal["exact", "midpoint"]


@solver(
    "dpmpp_2s",
    family="dpm_solver",
    order=2,
    reference=PAPER,
    aliases={
        "dpm_2s": "dpmpp_2s:form=epsilon",
        "dpm_solver_singlestep": "dpmpp_2s",
        "DPMSolverSinglestepScheduler": "dpmpp_2s",
    },
)
def dpmpp_2s(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    form: Form = "denoised",
    solver_type: SolverType = "midpoint",
) -> Linear:
    """DPM-Solver++(2S): pairs of evaluations, one an interval; with ``form=epsilon`` DPM-Solver-2.

    From node 0 through node 1 to t, ``r = (lambda_1 - lambda_0) / h``: DDIM to node 1, then
    ``base + c (P_1 m_0 + P_1 (m_1 - m_0) / (2 r))`` for ``solver_type=midpoint``, P_2 / r for ``heun``. An odd node and
    the step to sigma = 0 are DDIM's.
    """
    return _singlestep(trace, x, grid, 2, form, solver_type, "exact", True)


@solver(
    "dpmpp_3s",
    family="dpm_solver",
    order=lambda lower_order_final, **_: 2 if lower_order_final else 3,
    reference=PAPER_EPS,
    aliases={"dpm_3s": "dpmpp_3s:form=epsilon"},
)
def dpmpp_3s(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    form: Form = "denoised",
    solver_type: SolverType = "midpoint",
    inner: Inner = "exact",
    lower_order_final: bool = False,
) -> Linear:
    """DPM-Solver++(3S): triples of evaluations, one an interval; with ``form=epsilon`` DPM-Solver-3.

    With stages at r_1 h and r_2 h: DDIM to node 1; to node 2 ``P_1 m_0 + (r_2 / r_1) P_2 (m_1 - m_0)`` of length r_2 h,
    or with P_1 / 2 for P_2 if ``inner=midpoint`` (as diffusers has it); then ``P_1 m_0 + P_2 (m_2 - m_0) / r_2`` for
    ``solver_type=midpoint``, or through both stages for ``heun``. Third order where the evaluations
    are a multiple of three; with ``lower_order_final``, as DPM-Solver's repository has it, the last triple is a pair
    and a single, and the whole second order.
    """
    return _singlestep(trace, x, grid, 3, form, solver_type, inner, lower_order_final)


@solver(
    "dpm_fast",
    family="dpm_solver",
    order=2,
    reference=PAPER_EPS,
    aliases={"dpm_solver_fast": "dpm_fast"},
)
def dpm_fast(trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
    """DPM-Solver-fast: as many evaluations as the grid has steps, on stages and steps of its own.

    DPM-Solver-3 (``dpm_3s``: epsilon form, r_1 = 1/3, r_2 = 2/3) over steps of one length in lambda, the last ones
    DPM-Solver-2 and -1 where the number of evaluations asks for it. Of the grid only the ends and the number of steps
    count. A node at alpha = 0 and one at sigma = 0 are no ends of an interval in lambda: one DDIM step leads from the
    first to the second node of the grid, one to the last, and the method runs between.
    """
    first, last = int(grid[0].alpha == 0.0), grid.steps - int(grid[-1].sigma == 0.0)
    sizes = groups(last - first, 3, False) if last > first else []
    nodes, before, after = list(grid), [1] * first, [1] * (grid.steps - max(first, last))
    if sizes:
        nodes[first:last] = _stages(grid, nodes[first], nodes[last], sizes)
    return _run(trace, x, nodes, [*before, *sizes, *after], "epsilon", "midpoint", "exact")


def _stages(grid: TimeGrid, s: Node, t: Node, sizes: list[int]) -> list[Node]:
    """Evenly spaced stages, ``sizes`` of them in each of as many steps of one length in lambda from s to t."""
    ends = np.linspace(s.lam, t.lam, len(sizes) + 1)
    lam = np.concatenate([np.linspace(a, b, k + 1)[:-1] for a, b, k in zip(ends, ends[1:], sizes)])
    return [s, *(grid.at_ratio(math.exp(-value)) for value in lam[1:])]


def groups(steps: int, order: int, final_zero: bool, lower_order_final: bool = True) -> list[int]:
    """How many evaluations each step has: as many of ``order`` as fit, fewer at the end, one to sigma = 0."""
    sizes = [order] * (steps // order) + ([steps % order] if steps % order else [])
    if order == 3 and steps % 3 == 0 and lower_order_final:
        sizes[-1:] = [2, 1]
    if final_zero and sizes[-1] > 1:
        sizes[-1:] = [sizes[-1] - 1, 1]
    return sizes


def _singlestep(
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    order: int,
    form: Form,
    solver_type: SolverType,
    inner: Inner,
    lower_order_final: bool,
) -> Linear:
    nodes, zero = list(grid), grid[-1].sigma == 0.0
    # A node without signal is infinitely far in lambda: a stage of its own.
    alone = int(nodes[0].alpha == 0.0)
    sizes = [1] * alone + (
        groups(grid.steps - alone, order, zero, lower_order_final) if grid.steps > alone else []
    )
    return _run(trace, x, nodes, sizes, form, solver_type, inner)


def _run(
    trace: Trace,
    x: Linear,
    nodes: list[Node],
    sizes: list[int],
    form: Form,
    solver_type: SolverType,
    inner: Inner,
) -> Linear:
    """Steps that take ``sizes`` of the ``nodes`` each, the first of them their start and the others their stages."""
    i = 0
    for size in sizes:
        x, m = trace.evaluate(x, nodes[i])
        stages: list[Evaluation] = [m]
        for j in range(1, size):
            inside = _step(
                x,
                stages,
                nodes[i : i + j],
                nodes[i + j],
                form,
                solver_type if inner == "midpoint" else "heun",
            )
            stages.append(trace.evaluate(inside, nodes[i + j])[1])
        x = _step(x, stages, nodes[i : i + size], nodes[i + size], form, solver_type)
        i += size
    return x


def _step(
    x: Linear, stages: list[Evaluation], nodes: list[Node], t: Node, form: Form, solver_type: SolverType
) -> Linear:
    """From the first of ``nodes`` to ``t`` with the predictions at all of them."""
    s, first = nodes[0], ddim(x, stages[0], nodes[0], t, form)
    if len(stages) == 1:
        return first
    h = step_length(s, t)
    m = [getattr(e, form) for e in stages]
    r = [step_length(s, n) / h for n in nodes]
    p1, p2, p3 = (p / h**k for k, p in enumerate(moments(h, 3, form)))
    if len(stages) == 2:
        return first + scale(t, form) * ((p1 / 2 if solver_type == "midpoint" else p2) / r[1] * (m[1] - m[0]))
    if solver_type == "midpoint":
        return first + scale(t, form) * (p2 / r[2] * (m[2] - m[0]))
    d1, d2 = (m[1] - m[0]) / r[1], (m[2] - m[0]) / r[2]
    slope, curve = (r[2] * d1 - r[1] * d2) / (r[2] - r[1]), 2.0 * (d2 - d1) / (r[2] - r[1])
    return first + scale(t, form) * (p2 * slope + p3 * curve)
