"""Levels from the data's covariance spectrum, without a network: on Gaussian data a run is one factor an eigenvalue."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ..samplers import Solver
from ..schedules import NoiseSchedule, TimeGrid, make_grid
from .table import Table, angle, levels_at, table_of, unit


def gains(table: Table, grid: TimeGrid, eigenvalues: ArrayLike) -> np.ndarray:
    """What a run multiplies the start state x by along every eigenvector of the data's covariance."""
    variance = np.asarray(eigenvalues, dtype=np.float64)
    z, history = np.ones_like(variance) / unit(grid[0]), []
    for (s, _), (a, *weights) in zip(grid.intervals(), table.rows):
        history = [s.alpha * variance / (s.alpha**2 * variance + s.sigma**2) * unit(s) * z, *history]
        z = a * z + sum(b * d for b, d in zip(weights, history))
    return z * unit(grid[-1])


def spectrum_error(table: Table, grid: TimeGrid, eigenvalues: ArrayLike) -> float:
    """RMS error of the result against the exact one, started from noise of size sigma.

    The exact factor is ``sqrt((alpha_t^2 l + sigma_t^2) / (alpha_T^2 l + sigma_T^2))`` for the eigenvalue l.
    """
    variance, top, end = np.asarray(eigenvalues, dtype=np.float64), grid[0], grid[-1]
    ends = end.alpha**2 * variance + end.sigma**2
    exact = np.sqrt(ends / (top.alpha**2 * variance + top.sigma**2))
    return float(top.sigma * np.sqrt(np.mean(np.square(gains(table, grid, eigenvalues) - exact))))


def from_spectrum(
    noise_schedule: NoiseSchedule,
    steps: int,
    eigenvalues: ArrayLike,
    *,
    solver: str | Solver = "dpmpp_2m",
    sweeps: int = 60,
) -> np.ndarray:
    """Levels (steps + 1, the last 0) of least :func:`spectrum_error`, by a coordinate search over gaps of angles."""
    start = make_grid(noise_schedule, steps, "arctan")
    gaps = -np.diff([angle(node) for node in start])

    def levels(change: np.ndarray) -> np.ndarray:
        moved = gaps * np.exp(change)
        angles = angle(start[0]) - np.cumsum(moved * gaps.sum() / moved.sum())
        return np.array([start.level[0], *levels_at(noise_schedule, list(angles[:-1])), start.level[-1]])

    def cost(change: np.ndarray) -> float:
        try:
            grid = TimeGrid.from_levels(noise_schedule, levels(change))
        except ValueError:
            return math.inf
        return spectrum_error(table_of(solver, grid), grid, eigenvalues)

    best = np.zeros(steps)
    least, width = cost(best), 0.4
    for _ in range(sweeps):
        before = least
        for i in range(steps):
            for step in (-width, width):
                trial = best.copy()
                trial[i] += step
                if (value := cost(trial)) < least:
                    best, least = trial, value
        if least == before:
            width /= 2
        if width < 1e-3:
            break
    return levels(best)
