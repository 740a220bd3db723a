"""A sampler as numbers: the levels it visits and, for every step, weights of the state and of past predictions.

In the frame ``z = x / sqrt(alpha^2 + sigma^2)``, which is regular at both ends of a noise schedule and the same for
every frame that a host keeps its states in, a linear multistep method with one evaluation a step reads

``z_{i+1} = a_i z_i + sum_j b_ij D_{i-j}``,  D the denoised predictions, newest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..samplers import Evaluate, Linear, Solver, Trace, combination, compile, parse
from ..samplers.registry import Declaration
from ..schedules import Node, NoiseSchedule, TimeGrid

TAIL = "dpmpp_2m"
"""What steps where a run begins in the middle of the levels (image to image)."""

Predict = Callable[[torch.Tensor, Node], torch.Tensor]
"""A denoised prediction for a state in the frame z."""


def unit(node: Node) -> float:
    """``sqrt(alpha^2 + sigma^2)``, the size of the frame of x in units of z."""
    return math.hypot(node.alpha, node.sigma)


def angle(node: Node) -> float:
    """``atan(sigma / alpha)``, from 0 (clean) to pi / 2 (no signal): dz/dangle = cot(angle) z - D / sin(angle)."""
    return math.atan2(node.sigma, node.alpha)


def init_noise_sigma(frame: str, first: Node) -> float:
    """Standard deviation of x where a run starts, what diffusers calls by this name: a recipe is fitted from there.

    sigma_0 for EDM models, 1 for flow models, and for VP models a state of unit size, ``sqrt(alpha^2 + sigma^2)``, as
    their pipelines hand over unit noise whatever the first level is (those of DiT and DDPM ask no scheduler for it).
    """
    if frame == "vp":
        return unit(first)
    return first.sigma if frame == "edm" else 1.0


@dataclass(frozen=True)
class Table:
    """Levels (of the noise schedule, decreasing, the last of them of the result) and one row of weights a step.

    A row is ``(a, b_0, b_1, ...)``: the weight of the state, then of the predictions from the newest back, as many as
    are used.
    """

    levels: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.levels) - 1 or not self.rows:
            raise ValueError(
                f"{len(self.levels)} levels need {len(self.levels) - 1} rows, got {len(self.rows)}"
            )
        for i, row in enumerate(self.rows):
            if not 2 <= len(row) <= i + 2:
                raise ValueError(
                    f"row {i} must have the weight of the state and of 1 to {i + 1} predictions, got {len(row)} numbers"
                )
            if not all(map(math.isfinite, row)):
                raise ValueError(f"row {i} has a weight that is not finite")

    @property
    def steps(self) -> int:
        """Number of evaluations."""
        return len(self.rows)

    def grid(self, noise_schedule: NoiseSchedule) -> TimeGrid:
        """The nodes on a noise schedule."""
        return TimeGrid.from_levels(noise_schedule, self.levels)

    @cached_property
    def solver(self) -> Solver:
        """The steps as a solver for :meth:`grid`, or for the same levels in any other frame."""
        one = lambda **_: 1  # noqa: E731
        name = f"table_{hash((self.levels, self.rows)) & 0xFFFFFFFF:08x}"
        return Solver(
            Declaration(name, self._solve, "table", one, one, one, lambda **_: 0, lambda **_: False, {}, "")
        )

    def _solve(self, trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
        if grid.steps < self.steps:  # begun in the middle, without the history that the weights are for
            return parse(TAIL).solve(trace, x, grid)
        if grid.steps > self.steps:
            raise ValueError(f"these coefficients are for {self.steps} steps, the grid has {grid.steps}")
        history: list[Linear] = []
        for (s, t), (state, *weights) in zip(grid.intervals(), self.rows):
            x, m = trace.evaluate(x, s)
            history = [m.denoised, *history]
            x = unit(t) * (state / unit(s) * x + combination(*zip(weights, history)))
        return x


def table_of(solver: str | Solver, grid: TimeGrid) -> Table:
    """The table of a registered solver on a grid.

    Raises ValueError for a stochastic solver and one that does not evaluate every node of the grid once.
    """
    program = compile(parse(solver), grid)
    if program.stochastic or program.evaluations != tuple(grid)[:-1]:
        raise ValueError(f"solver {program.solver!r} is not one deterministic evaluation a step")
    states, result = program.unroll()
    predictions = [op.dst for op in program.ops if isinstance(op, Evaluate)]
    forms, nodes, rows = [*states, result], list(grid), []
    for i, (s, t) in enumerate(zip(nodes, nodes[1:])):
        a = forms[i + 1].get(0, 0.0) / forms[i].get(0, 1.0)
        row = [a * unit(s) / unit(t)]
        for register in predictions[i::-1]:
            row.append((forms[i + 1].get(register, 0.0) - a * forms[i].get(register, 0.0)) / unit(t))
        while len(row) > 2 and row[-1] == 0.0:
            row.pop()
        rows.append(tuple(row))
    return Table(tuple(map(float, grid.level)), tuple(rows))


def advance(row: Sequence[float], state: torch.Tensor, history: Sequence[torch.Tensor]) -> torch.Tensor:
    """One step: ``a z + sum_j b_j D_j``; ``history`` newest first."""
    a, *weights = row
    total = a * state
    for b, d in zip(weights, history):
        if b != 0.0:
            total = total + b * d
    return total


def run(
    table: Table, grid: TimeGrid, start: torch.Tensor, predict: Predict
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """States (one more than steps) and predictions from a start in the frame z."""
    states, predictions = [start], []
    for (s, _), row in zip(grid.intervals(), table.rows):
        predictions.append(predict(states[-1], s))
        states.append(advance(row, states[-1], predictions[::-1]))
    return states, predictions


def levels_at(noise_schedule: NoiseSchedule, angles: ArrayLike) -> np.ndarray:
    """Noise levels at angles below pi / 2."""
    return np.asarray(noise_schedule.level_at_ratio(np.tan(np.asarray(angles))), dtype=np.float64)
