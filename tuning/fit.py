r"""Coefficients from trajectories: in closed form step after step, then all together by Gauss-Newton.

Both start from a nominal method on a grid and change only the weights of the state and of the newest predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..samplers import NumericalError, Solver
from ..schedules import NoiseSchedule, TimeGrid
from .table import Table, advance, angle, levels_at, run, table_of
from .teacher import Source, Trajectories


def rms(x: torch.Tensor) -> float:
    """Root mean square of the elements."""
    return float(x.square().mean().sqrt())


def error(table: Table, source: Source, truth: Trajectories) -> float:
    """RMS distance per element between a table's results and the converged ones; infinite where it fails."""
    try:
        states, _ = run(table, table.grid(source.noise_schedule), truth.start, predictor(source, truth))
    except NumericalError:
        return math.inf
    return rms(states[-1] - truth.result)


def predictor(source: Source, truth: Trajectories):
    """The network on the samples of some trajectories."""
    return lambda z, node: source.predict(truth.indices, z, node)


def padded(row: Sequence[float], memory: int, available: int) -> list[float]:
    """A row with weights for ``memory`` predictions, as far as there are so many."""
    width = 1 + min(memory, available)
    return [*row, *[0.0] * (width - len(row))]


def ridge(
    nominal: Table, source: Source, truth: Trajectories, *, memory: int = 4, strength: float = 1e-4
) -> Table:
    r"""Weights in closed form, step after step along the table's own trajectory.

    At step i the next state is linear in the weights w of ``F = (z_i, D_i, ..., D_{i-K+1})``; ``w = nominal + argmin
    ||F w - (teacher's state - nominal step)||^2`` with ``strength`` times the identity on the Gram matrix of unit
    diagonal. The table then goes on with the fitted step, so later steps correct earlier errors. ``memory`` is K.
    Costs one run over the trajectories.
    """
    grid, predict = nominal.grid(source.noise_schedule), predictor(source, truth)
    z, history, rows = truth.start, [], []
    for (s, t), row in zip(grid.intervals(), nominal.rows):
        history = [predict(z, s), *history]
        row = padded(row, memory, len(history))
        base = advance(row, z, history)
        free = min(memory, len(history))
        features = torch.stack([z.flatten(), *(d.flatten() for d in history[:free])], 1).double()
        gram = features.T @ features
        scale = gram.diagonal().sqrt()
        system = gram / scale[:, None] / scale + strength * torch.eye(len(scale), device=gram.device).double()
        change = (
            torch.linalg.solve(system, features.T @ (truth.at(t) - base).flatten().double() / scale) / scale
        )
        for j, w in enumerate(change.tolist()):
            row[j] += w
        z = advance(row, z, history)
        rows.append(tuple(row))
    return replace(nominal, rows=tuple(rows))


@dataclass
class Family:
    """The tables that can be reached from a nominal method: moved levels, changed weights.

    Parameters: first the logarithms of the gaps between levels, as angles, relative to the grid's (all but the last;
    their sum is kept), then changes of the weights in units of ``1 / rms`` of what they multiply, so that a change of
    one changes the next state by one. The weights are added to those of the nominal method *on the moved levels*.
    """

    solver: str | Solver
    grid: TimeGrid
    memory: int
    entries: list[tuple[int, int]] = field(init=False)
    units: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        steps = self.grid.steps
        self.entries = [(i, j) for i in range(steps) for j in range(1 + min(self.memory, i + 1))]
        self.units = np.ones(len(self.entries))

    @property
    def gaps(self) -> int:
        """Number of parameters that move levels."""
        return self.grid.steps - 1

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.gaps + len(self.entries)

    def moved(self, parameters: np.ndarray) -> TimeGrid:
        """The grid with its levels moved; the ends stay."""
        nodes = list(self.grid)
        angles = np.array([angle(n) for n in nodes])
        gaps = -np.diff(angles)
        gaps[: self.gaps] *= np.exp(parameters[: self.gaps])
        gaps *= (angles[0] - angles[-1]) / gaps.sum()
        inner = levels_at(self.schedule, angles[0] - np.cumsum(gaps)[:-1])
        levels = [float(self.grid.level[0]), *inner, float(self.grid.level[-1])]
        return TimeGrid.from_levels(self.schedule, levels)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.grid.noise_schedule

    def table(self, parameters: np.ndarray) -> Table:
        """The table of some parameters."""
        nominal = table_of(self.solver, self.moved(parameters))
        rows = [padded(row, self.memory, i + 1) for i, row in enumerate(nominal.rows)]
        for (i, j), value, unit in zip(self.entries, parameters[self.gaps :], self.units):
            rows[i][j] += float(value * unit)
        return replace(nominal, rows=tuple(map(tuple, rows)))

    def start(self, table: Table, source: Source, truth: Trajectories) -> np.ndarray:
        """Sets the units along a table on this family's grid; that table's parameters."""
        states, predictions = run(table, self.grid, truth.start, predictor(source, truth))
        sizes = [rms(states[i] if j == 0 else predictions[i + 1 - j]) for i, j in self.entries]
        self.units = 1.0 / np.maximum(sizes, 1e-6)
        nominal = table_of(self.solver, self.grid)
        change = [
            padded(table.rows[i], self.memory, i + 1)[j] - padded(nominal.rows[i], self.memory, i + 1)[j]
            for i, j in self.entries
        ]
        return np.concatenate([np.zeros(self.gaps), np.array(change) / self.units])


def gauss_newton(
    family: Family,
    parameters: np.ndarray,
    source: Source,
    truth: Trajectories,
    *,
    prior: float = 1e-4,
    iterations: int = 10,
    report: Callable[[int, float], None] = lambda iteration, error: None,
) -> np.ndarray:
    r"""Levels and weights together: the least mean square distance of the results from the converged ones.

    Levenberg-Marquardt on ``mean |z_n - truth|^2 + prior |weights|^2``. The derivative of the result in a weight is
    that of a run whose state at that step is pushed along what the weight multiplies, by finite differences: no
    gradient of the network is needed, all pushes of a step go through it as one batch, and an inexact derivative only
    costs iterations, as the residual itself is exact. Returns the best parameters found, never worse than the given.

    Raises NumericalError if the network fails at the start; a failing trial step is only rejected.
    """
    damping = 1e-3
    states, predictions = _trial(family, parameters, source, truth)
    cost = _cost(family, parameters, states, truth, prior)
    for iteration in range(iterations):
        derivative = _derivative(family, parameters, states, predictions, source, truth)
        residual = (states[-1] - truth.result).flatten().double().cpu().numpy()
        curvature = derivative.T @ derivative / len(residual)
        slope = derivative.T @ residual / len(residual)
        weights = np.arange(family.size) >= family.gaps
        slope += prior * weights * parameters
        curvature += np.diag(prior * weights)
        better = None
        for _ in range(6):
            step = -np.linalg.solve(curvature + damping * np.diag(np.diag(curvature) + 1e-9), slope)
            step[: family.gaps] = np.clip(step[: family.gaps], -0.5, 0.5)
            try:
                trial = _trial(family, parameters + step, source, truth)
                trial_cost = _cost(family, parameters + step, trial[0], truth, prior)
            except (NumericalError, ValueError):
                trial_cost = math.inf
            else:
                if trial_cost < cost:
                    better = parameters + step, trial, trial_cost
                    break
            damping *= 5.0
        if better is None:
            break
        gain = 1.0 - better[2] / cost
        parameters, (states, predictions), cost = better
        damping = max(damping / 5.0, 1e-7)
        report(iteration, rms(states[-1] - truth.result))
        if gain < 1e-3:
            break
    return parameters


def _trial(
    family: Family, parameters: np.ndarray, source: Source, truth: Trajectories
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return run(family.table(parameters), family.moved(parameters), truth.start, predictor(source, truth))


def _cost(
    family: Family, parameters: np.ndarray, states: list[torch.Tensor], truth: Trajectories, prior: float
) -> float:
    weights = parameters[family.gaps :]
    return rms(states[-1] - truth.result) ** 2 + prior * float(weights @ weights)


PUSH, SHIFT = 1e-3, 1e-2
"""Finite differences: of a state, relative to its size, and of the logarithm of a gap."""


def _derivative(
    family: Family,
    parameters: np.ndarray,
    states: list[torch.Tensor],
    predictions: list[torch.Tensor],
    source: Source,
    truth: Trajectories,
) -> np.ndarray:
    """d result / d parameters, shape (elements of the result, parameters)."""
    table, grid = family.table(parameters), family.moved(parameters)
    samples, columns = len(truth.indices), [np.zeros(0)] * family.size
    pushed: list[int] = []  # parameters whose push is under way
    z = states[0][:0]
    history: list[torch.Tensor] = []  # newest first
    for i, ((s, _), row) in enumerate(zip(grid.intervals(), table.rows)):
        if pushed:
            history = [source.predict(truth.indices, z, s), *history]
            z = advance(row, z, history)
        new = [q for q, (step, _) in enumerate(family.entries) if step == i]
        along = [
            states[i] if family.entries[q][1] == 0 else predictions[i + 1 - family.entries[q][1]] for q in new
        ]
        ends = [states[i + 1] + PUSH * float(family.units[q]) * d for q, d in zip(new, along)]
        z = torch.cat([z, *ends])
        repeats = (len(new),) + (1,) * (states[0].ndim - 1)
        before = [d.repeat(repeats) for d in predictions[i::-1]]
        history = [torch.cat([d, b]) for d, b in zip(history, before)] if pushed else before
        pushed += new
    for position, q in enumerate(pushed):
        end = z[position * samples : (position + 1) * samples]
        columns[family.gaps + q] = ((end - states[-1]) / PUSH).flatten().double().cpu().numpy()
    for q in range(family.gaps):
        shifted = parameters.copy()
        shifted[q] += SHIFT
        end = _trial(family, shifted, source, truth)[0][-1]
        columns[q] = ((end - states[-1]) / SHIFT).flatten().double().cpu().numpy()
    return np.stack(columns, 1)
