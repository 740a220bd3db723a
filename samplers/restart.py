"""Restart sampling: go back up in noise and down again, several times, on the way.

Xu et al., "Restart Sampling for Improving Generative Processes", https://arxiv.org/abs/2306.14878.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..schedules import Node, NoiseSchedule, TimeGrid, make_grid
from ..schedules.spec import NonNegative, suggestion
from .registry import Solver, parse, transform
from .steps import renoise
from .trace import Linear, Trace


class Interval(NamedTuple):
    """``repeats`` times from t_min up to t_max and down in ``steps`` steps; t in sigma / alpha."""

    t_min: float
    t_max: float
    steps: int
    repeats: int


def _table(*rows: tuple[int, int, float, float]) -> tuple[Interval, ...]:
    """Rows as published: points of the way down (one more than steps), repeats, t_min, t_max."""
    return tuple(Interval(low, high, points - 1, repeats) for points, repeats, low, high in rows)


def _imagenet(*rows: tuple[int, int]) -> tuple[Interval, ...]:
    spans = ((19.35, 40.79), (1.09, 1.92), (0.59, 1.09), (0.30, 0.59), (0.06, 0.30))
    return _table(*((n, k, *span) for (n, k), span in zip(rows, spans)))


TABLES: dict[str, tuple[int, tuple[Interval, ...]]] = {
    "cifar10_vp_519": (20, _table((9, 30, 0.06, 0.20))),
    "cifar10_vp_115": (18, _table((3, 20, 0.06, 0.30))),
    "cifar10_vp_75": (18, _table((3, 10, 0.06, 0.30))),
    "cifar10_vp_55": (18, _table((3, 5, 0.06, 0.30))),
    "cifar10_vp_43": (18, _table((3, 2, 0.06, 0.30))),
    "cifar10_edm_43": (18, _table((3, 2, 0.14, 0.30))),
    "imagenet64_623": (36, _imagenet((10, 3), (10, 3), (7, 6), (7, 6), (7, 25))),
    "imagenet64_535": (36, _imagenet((6, 1), (6, 1), (7, 6), (7, 6), (7, 25))),
    "imagenet64_385": (36, _imagenet((3, 1), (6, 1), (6, 5), (6, 5), (6, 20))),
    "imagenet64_203": (36, _imagenet((4, 1), (4, 1), (4, 5), (4, 5), (6, 6))),
    "imagenet64_165": (18, _imagenet((3, 1), (4, 1), (4, 5), (4, 5), (4, 10))),
    "imagenet64_99": (18, _imagenet((3, 1), (4, 1), (4, 4), (4, 1), (4, 4))),
    "imagenet64_67": (
        18,
        _table((5, 1, 19.35, 40.79), (5, 1, 1.09, 1.92), (5, 1, 0.59, 1.09), (5, 1, 0.06, 0.30)),
    ),
    "imagenet64_39": (14, _table((3, 1, 19.35, 40.79), (3, 1, 1.09, 1.92), (3, 1, 0.06, 0.30))),
    "sd15_w2": (30, _table((5, 2, 1.0, 9.0), (5, 2, 5.0, 10.0))),
    "sd15_w3": (30, _table((10, 2, 0.1, 3.0))),
    "sd15_w5": (30, _table((10, 2, 0.1, 2.0))),
    "sd15_w8": (30, _table((10, 2, 0.1, 2.0))),
}
"""Published settings: steps of the main run, and the intervals. The number in a name counts evaluations with Heun;
``sd15_w2`` to ``w8`` are for Stable Diffusion 1.5 at that guidance scale, Euler outside the intervals, Heun inside."""


@transform(
    "restart",
    order=lambda order, inner, **_: min(order, 1),
    weak_order=lambda order, inner, **_: 0,  # the way down keeps its number of steps
    stochastic=lambda stochastic, inner, **_: True,
    reference="Restart Sampling for Improving Generative Processes, https://arxiv.org/abs/2306.14878",
)
def restart(
    inner: Solver,
    trace: Trace,
    x: Linear,
    grid: TimeGrid,
    *,
    t_min: tuple[float, ...] = (0.06,),
    t_max: tuple[float, ...] = (0.30,),
    steps: tuple[int, ...] = (2,),
    repeats: tuple[int, ...] = (2,),
    table: str = "",
    solver: str = "",
    spacing: str = "karras",
    s_noise: NonNegative = 1.0,
    gamma: NonNegative = 0.0,
    s_min: NonNegative = 0.01,
    s_max: NonNegative = 1.0,
) -> Linear:
    """Restart: at the node nearest to ``t_min``, ``repeats`` times up to ``t_max`` with noise, down in ``steps`` steps.

    Up: ``x <- (alpha_u / alpha_l) x + s_noise sqrt(sigma_u^2 - (alpha_u sigma_l / alpha_l)^2) z``, l to u. ``t_min``
    and ``t_max`` are noise levels sigma / alpha; lists (``0.06/1.09``) make several intervals, of which the later one
    wins where two begin at the same node. ``table`` names a published set of them instead (``cifar10_vp_43``,
    ``imagenet64_39``, ``sd15_w3`` and others; ``fewstep.samplers.restart.TABLES`` has the steps of the main run that
    belong to them). The way down has ``spacing`` and the inner solver, or the one that ``solver`` names. ``gamma`` >
    0 raises every level k of it that is in [``s_min``, ``s_max``] to k (1 + gamma) with noise first, as EDM's churn
    does. ``repeats=0`` is the inner solver in pieces: a multistep method begins anew at every restart. First order as
    a whole, since an interval begins at a node and not at t_min.
    """
    intervals = _intervals(t_min, t_max, steps, repeats, table)
    below = parse(solver) if solver else inner
    if "churn" in below.declaration.options:
        below = below.with_options(churn=0.0)
    nodes = list(grid)
    stops: dict[int, Interval] = {}
    for interval in intervals:
        inside = [i for i in range(1, len(nodes)) if nodes[i].sigma > 0.0]
        if not inside:
            continue
        at = min(inside, key=lambda i: abs(nodes[i].ratio - interval.t_min))
        if nodes[at].ratio >= interval.t_max:
            raise ValueError(
                f"restart from {interval.t_min:g} to {interval.t_max:g}: the nearest node of this grid has sigma / "
                f"alpha = {nodes[at].ratio:.4g}, above t_max; take more steps, a higher t_max or another interval"
            )
        stops[at] = interval
    position = 0
    for at, interval in sorted(stops.items()):
        x = inner.solve(trace, x, grid.part(position, at))
        low, high = nodes[at], grid.at_ratio(interval.t_max)
        down = _way_down(grid, low, high, interval.steps, spacing)
        named = grid.at_ratio(interval.t_min), high  # not the node: the same noise for any number of steps
        for _ in range(interval.repeats):
            x = renoise(trace, trace.keep(x), low, high, named, s_noise)
            if gamma == 0.0:
                x = below.solve(trace, x, down)
                continue
            for i, (s, _) in enumerate(down.intervals()):
                x, piece = _churned(trace, x, s, down.part(i, i + 1), gamma, s_min, s_max, s_noise)
                x = below.solve(trace, x, piece)
        position = at
    return inner.solve(trace, x, grid.part(position, grid.steps)) if position < grid.steps else x


def _intervals(
    t_min: tuple[float, ...],
    t_max: tuple[float, ...],
    steps: tuple[int, ...],
    repeats: tuple[int, ...],
    table: str,
) -> tuple[Interval, ...]:
    if table:
        if table not in TABLES:
            hint = suggestion(table, TABLES)
            raise ValueError(f"no restart table {table!r}; allowed: {', '.join(TABLES)}{hint}")
        return TABLES[table][1]
    n = max(map(len, (t_min, t_max, steps, repeats)))
    if any(len(values) not in (1, n) for values in (t_min, t_max, steps, repeats)):
        raise ValueError(
            f"restart needs one value or {n} of each of t_min, t_max, steps and repeats, got "
            f"{len(t_min)}, {len(t_max)}, {len(steps)} and {len(repeats)}"
        )
    columns = (values * n if len(values) == 1 else values for values in (t_min, t_max, steps, repeats))
    intervals = tuple(Interval(*row) for row in zip(*columns))
    for i in intervals:
        if not (0.0 < i.t_min < i.t_max < math.inf and i.steps >= 1 and i.repeats >= 0):
            raise ValueError(
                f"restart needs 0 < t_min < t_max, steps >= 1 and repeats >= 0, got t_min={i.t_min:g}, "
                f"t_max={i.t_max:g}, steps={i.steps}, repeats={i.repeats}"
            )
    return intervals


def _way_down(grid: TimeGrid, low: Node, high: Node, steps: int, spacing: str) -> TimeGrid:
    """``steps`` steps from one node to another, which both stand exactly."""
    schedule = grid.noise_schedule
    top, bottom = (float(schedule.level_at_ratio(n.ratio)) for n in (high, low))
    limits = f"{spacing}:sigma_max={top!r},sigma_min={bottom!r}"
    inside = list(make_grid(schedule, steps, limits, final_zero=False))[1:-1]
    return _grid([high, *inside, low], schedule)


def _churned(
    trace: Trace,
    x: Linear,
    s: Node,
    piece: TimeGrid,
    gamma: float,
    s_min: float,
    s_max: float,
    s_noise: float,
) -> tuple[Linear, TimeGrid]:
    """``x`` and a step's grid with its start raised by ``gamma`` where s lies in the range."""
    if not s_min <= s.ratio <= s_max:
        return x, piece
    high = piece.at_ratio(s.ratio * (1.0 + gamma))
    x = renoise(trace, trace.keep(x), s, high, (s, high), s_noise)
    return x, _grid([high, piece[1]], piece.noise_schedule)


def _grid(nodes: list[Node], schedule: NoiseSchedule) -> TimeGrid:
    t, alpha, sigma = np.array(nodes).T
    return TimeGrid(t, alpha, sigma, schedule)
