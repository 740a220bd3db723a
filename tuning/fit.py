"""Weights from trajectories in closed form, step after step, and how a table is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..samplers import NumericalError
from ..schedules import TimeGrid
from .table import Predict, Table, advance, run
from .teacher import Source, Trajectories


def rms(x: torch.Tensor) -> float:
    """Root mean square of the elements."""
    return float(x.square().mean().sqrt())


OMEGA = 0.2
"""Weight of the states on the way in the loss, that of the result is 1."""


def losses(
    states: Sequence[torch.Tensor], grid: TimeGrid, truth: Trajectories
) -> tuple[list[tuple[float, torch.Tensor]], torch.Tensor]:
    """Weight and distance from the trajectory of every state but the first; the loss of every sample, shape (B,).

    The loss is ``|z_n - truth|^2 + omega sum_i |z_i - truth at level i|^2``, each a mean over elements. The states on
    the way count a little: a model forgives most of their error, but not to the rare sample near the border between
    two modes, of which a few trajectories contain none.
    """
    weights = [OMEGA] * (grid.steps - 1) + [1.0]
    apart = [(w, z - truth.at(node)) for w, z, node in zip(weights, states[1:], list(grid)[1:])]
    return apart, torch.stack([w * r.flatten(1).double().square().mean(1) for w, r in apart]).sum(0)


def distances(table: Table, source: Source, truth: Trajectories) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS distance per element of every sample's result from the converged one, and the root of its loss, both (B,).

    Infinite where the network fails.
    """
    grid = table.grid(source.noise_schedule)
    try:
        states, _ = run(table, grid, truth.begin(grid), predictor(source, truth))
    except NumericalError:
        lost = torch.full((len(truth.indices),), torch.inf)
        return lost, lost
    return (states[-1] - truth.result).flatten(1).square().mean(1).sqrt(), losses(states, grid, truth)[
        1
    ].sqrt()


def error(table: Table, source: Source, truth: Trajectories) -> float:
    """RMS distance per element between a table's results and the converged ones; infinite where it fails."""
    return rms(distances(table, source, truth)[0])


def predictor(source: Source, truth: Trajectories) -> Predict:
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
    z, history, rows = truth.begin(grid), [], []
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
