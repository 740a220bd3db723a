"""Levels and weights fitted together by Gauss-Newton, so that a run follows the converged trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..samplers import NumericalError, Solver
from ..schedules import TimeGrid
from .fit import losses, padded, predictor, rms
from .table import Table, advance, angle, levels_at, run, table_of
from .teacher import Source, Trajectories

PUSH, SHIFT = 1e-3, 1e-2
"""Finite differences: of a state, relative to its size, and of a level's place between its neighbours."""
LONGEST = 0.7
"""Most that a level moves in one iteration, in units of half the way to its nearer neighbour."""


@dataclass
class Family:
    """The tables that can be reached from a nominal method: moved levels, changed weights.

    Parameters: first the angles of the levels, in units of half the way to the nearer neighbour on the grid (without
    the first if ``free_start`` is false, and never the last), then changes of the weights in units of ``1 / rms`` of
    what they multiply, so that a change of one changes the next state by one. The weights are added to those of the
    nominal method *on the moved levels*. A free first level stays at or below the model's noisiest.
    """

    solver: str | Solver
    grid: TimeGrid
    memory: int
    free_start: bool = False
    entries: list[tuple[int, int]] = field(init=False)
    units: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        steps = self.grid.steps
        self.entries = [(i, j) for i in range(steps) for j in range(1 + min(self.memory, i + 1))]
        self.units = np.ones(len(self.entries))

    @property
    def moving(self) -> range:
        """The levels that move; parameter p is that of level ``moving[p]``."""
        return range(0 if self.free_start else 1, self.grid.steps)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return len(self.moving) + len(self.entries)

    def moved(self, parameters: np.ndarray) -> TimeGrid:
        """The grid with its levels moved."""
        schedule, moving = self.grid.noise_schedule, list(self.moving)
        angles = np.array([angle(node) for node in self.grid])
        gaps = -np.diff(angles)
        reach = np.minimum(gaps, np.concatenate([gaps[:1], gaps[:-1]])) / 2
        levels = self.grid.level.copy()
        places = angles[moving] + parameters[: len(moving)] * reach[moving]
        levels[moving] = np.minimum(
            levels_at(schedule, np.minimum(places, math.pi / 2 - 1e-9)), schedule.level_max
        )
        return TimeGrid.from_levels(schedule, levels)

    def table(self, parameters: np.ndarray) -> Table:
        """The table of some parameters."""
        nominal = table_of(self.solver, self.moved(parameters))
        rows = [padded(row, self.memory, i + 1) for i, row in enumerate(nominal.rows)]
        for (i, j), value, unit in zip(self.entries, parameters[len(self.moving) :], self.units):
            rows[i][j] += float(value * unit)
        return replace(nominal, rows=tuple(map(tuple, rows)))

    def start(self, table: Table, source: Source, truth: Trajectories) -> np.ndarray:
        """Sets the units along a table on this family's grid; that table's parameters."""
        states, predictions = run(table, self.grid, truth.begin(self.grid), predictor(source, truth))
        sizes = [rms(states[i] if j == 0 else predictions[i + 1 - j]) for i, j in self.entries]
        self.units = 1.0 / np.maximum(sizes, 1e-6)
        nominal = table_of(self.solver, self.grid)
        change = [
            padded(table.rows[i], self.memory, i + 1)[j] - padded(nominal.rows[i], self.memory, i + 1)[j]
            for i, j in self.entries
        ]
        return np.concatenate([np.zeros(len(self.moving)), np.array(change) / self.units])


@dataclass(frozen=True)
class Run:
    """A run of a family's table: states (one more than steps), predictions, and the loss of every sample (B,)."""

    parameters: np.ndarray
    states: list[torch.Tensor]
    predictions: list[torch.Tensor]
    losses: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """Parameters, and what the loss of every sample is around them: slopes (B, P) and curvatures (B, P, P)."""

    run: Run
    slopes: np.ndarray
    curvatures: np.ndarray


def gauss_newton(
    family: Family,
    start: Fitted,
    source: Source,
    truth: Trajectories,
    *,
    prior: float = 1e-4,
    iterations: int = 8,
    tolerance: float = 1e-2,
) -> Fitted:
    r"""The parameters of least mean loss over the samples, plus ``prior |weights|^2``, by Levenberg-Marquardt.

    Ends when an iteration gains less than the share ``tolerance``. The result is never worse than ``start`` (see
    :func:`fitted`); a trial step on which the network fails is only rejected.
    """
    damping = 1e-3
    for _ in range(iterations):
        cost = there = None
        for _ in range(6):
            cost = _cost(family, start.run, prior)
            try:
                step = newton(family, start, prior, damping)
                there = attempt(family, start.run.parameters + step, source, truth)
            except (NumericalError, ValueError, np.linalg.LinAlgError):
                there = None
            if there is not None and _cost(family, there, prior) < cost:
                break
            there, damping = None, damping * 5.0
        if there is None or cost is None:
            break
        start, damping = fitted(family, there, source, truth), max(damping / 5.0, 1e-7)
        if _cost(family, there, prior) > (1.0 - tolerance) * cost:
            break
    return start


def fitted(family: Family, at: Run, source: Source, truth: Trajectories) -> Fitted:
    """A run with what the losses are around it."""
    return Fitted(at, *linearise(family, at, source, truth))


def newton(
    family: Family, at: Fitted, prior: float, damping: float = 1e-6, without: Sequence[int] = ()
) -> np.ndarray:
    """The step to the least loss of the linear model around a fit, over all samples but some."""
    kept = [i for i in range(len(at.slopes)) if i not in set(without)]
    weights = np.arange(family.size) >= len(family.moving)
    slope = at.slopes[kept].mean(0) + prior * weights * at.run.parameters
    curvature = at.curvatures[kept].mean(0) + np.diag(prior * weights)
    curvature += damping * np.diag(np.diag(curvature) + 1e-9)
    step = -np.linalg.solve(curvature, slope)
    step[~weights] = np.clip(step[~weights], -LONGEST, LONGEST)
    return step


def attempt(family: Family, parameters: np.ndarray, source: Source, truth: Trajectories) -> Run:
    """The run of some parameters. Raises NumericalError, and ValueError where levels do not descend."""
    grid = family.moved(parameters)
    states, predictions = run(family.table(parameters), grid, truth.begin(grid), predictor(source, truth))
    return Run(parameters, states, predictions, losses(states, grid, truth)[1].cpu().numpy())


def _cost(family: Family, at: Run, prior: float) -> float:
    weights = at.parameters[len(family.moving) :]
    return float(at.losses.mean()) + prior * float(weights @ weights)


def linearise(family: Family, at: Run, source: Source, truth: Trajectories) -> tuple[np.ndarray, np.ndarray]:
    """Half the gradient of every sample's loss (B, P), and its Gauss-Newton curvature (B, P, P).

    The derivative of the states in a weight is that of a run whose state at that step is pushed along what the weight
    multiplies, by finite differences: no gradient of the network is needed, and all pushes of a step go through it as
    one batch. An inexact derivative only costs iterations, as the residual itself is exact.
    """
    table, grid = family.table(at.parameters), family.moved(at.parameters)
    samples, first = len(truth.indices), len(family.moving)
    residuals, _ = losses(at.states, grid, truth)
    shifted = [_shifted(family, at, p, residuals, source, truth) for p in range(first)]
    slopes = np.zeros((samples, family.size))
    curvatures = np.zeros((samples, family.size, family.size))
    z, history = at.states[0][:0], []
    pushed: list[int] = []  # parameters whose push is under way
    for i, ((s, _), row) in enumerate(zip(grid.intervals(), table.rows)):
        if pushed:
            history = [source.predict(truth.indices, z, s), *history]
            z = advance(row, z, history)
        new = [q for q, (step, _) in enumerate(family.entries) if step == i]
        along = [_factor(at, *family.entries[q]) for q in new]
        z = torch.cat(
            [z, *(at.states[i + 1] + PUSH * float(family.units[q]) * d for q, d in zip(new, along))]
        )
        before = [d.repeat(len(new), *[1] * (d.ndim - 1)) for d in at.predictions[i::-1]]
        history = [torch.cat([d, b]) for d, b in zip(history, before)] if pushed else before
        pushed += new
        weight, residual = residuals[i]
        ends = z.reshape(len(pushed), samples, -1)
        columns = torch.cat(
            [
                torch.stack([d[i].flatten(1) for d in shifted]) if shifted else ends[:0],
                (ends - at.states[i + 1].flatten(1)) / PUSH,
            ]
        ).double()
        where = [*range(first), *(first + q for q in pushed)]
        gram = torch.einsum("pbe,qbe->bpq", columns, columns) * (weight / columns.shape[-1])
        slope = torch.einsum("pbe,be->bp", columns, residual.flatten(1).double()) * (
            weight / columns.shape[-1]
        )
        slopes[:, where] += slope.cpu().numpy()
        curvatures[np.ix_(range(samples), where, where)] += gram.cpu().numpy()
    return slopes, curvatures


def _factor(at: Run, step: int, j: int) -> torch.Tensor:
    """What weight j of a step multiplies."""
    return at.states[step] if j == 0 else at.predictions[step + 1 - j]


def _shifted(
    family: Family,
    at: Run,
    parameter: int,
    residuals: Sequence[tuple[float, torch.Tensor]],
    source: Source,
    truth: Trajectories,
) -> list[torch.Tensor]:
    """d residual / d the parameter of a level, for every state but the first. A run up to that level is the same."""
    level = family.moving[parameter]
    shift = -SHIFT if level == 0 else SHIFT  # the first may be at its limit
    parameters = at.parameters.copy()
    parameters[parameter] += shift
    grid, table = family.moved(parameters), family.table(parameters)
    same = max(level - 1, 0)
    states = [truth.begin(grid)] if level == 0 else at.states[: same + 1]
    predictions = at.predictions[: same + (level > 0)]
    for i in range(same, grid.steps):
        if len(predictions) == i:
            predictions = [*predictions, source.predict(truth.indices, states[-1], grid[i])]
        states = [*states, advance(table.rows[i], states[-1], predictions[::-1])]
    moved, _ = losses(states, grid, truth)
    return [(r - r0) / shift for (_, r), (_, r0) in zip(moved, residuals)]
