"""A two-mode mixture in one dimension on which the probability flow is known in closed form: the ruler of ``explain``.

Data p(x0) = 1/2 N(-1, s^2) + 1/2 N(1, s^2) with s = 0.5. In one dimension the probability-flow ODE keeps quantiles,
F_t(x_t) = constant, so the exact solution needs no integration: only the inverse of a sum of two normal distribution
functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..samplers import Combine, Evaluate, Program, compile
from ..schedules import EDM, VP, Flow, Node, NoiseSchedule, TimeGrid, make_grid

Array = NDArray[np.float64]

MEANS, SPREAD = np.array([-1.0, 1.0]), 0.5
QUANTILES = np.array([0.07, 0.19, 0.31, 0.42, 0.58, 0.66, 0.83, 0.94])
RATIOS = (10.0, 0.1)
"""sigma / alpha at the ends of the interval on which orders are measured; no solver is started or ended
specially there."""

NOISE_SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {"vp": VP.linear, "edm": EDM, "flow": Flow}


def run(program: Program, x: np.ndarray, predict: Callable[[np.ndarray, Node], np.ndarray]) -> np.ndarray:
    """Run a program on plain arrays in their own precision; noises are zero. ``predict(x, node)`` answers in the
    program's form.
    """
    registers: dict[int, np.ndarray] = {0: x}
    for i, op in enumerate(program.ops):
        if isinstance(op, Combine):
            registers[op.dst] = sum(coef * registers[src] for src, coef in op.terms)  # type: ignore[assignment]
        elif isinstance(op, Evaluate):
            registers[op.dst] = predict(registers[op.src], program.nodes[op.node])
        else:
            registers[op.dst] = np.zeros_like(x)
        for register in [r for r in registers if program.lifetimes[r][1] <= i and r != program.output]:
            del registers[register]
    return registers[program.output]


def denoised(x: Array, node: Node) -> Array:
    """E[x0 | x] of the mixture for x = alpha x0 + sigma eps."""
    variance = (node.alpha * SPREAD) ** 2 + node.sigma**2
    means = node.alpha * MEANS
    log_weight = -0.5 * np.square(x[..., None] - means) / variance
    weight = np.exp(log_weight - log_weight.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    gain = node.alpha * SPREAD**2 / variance
    return np.sum(weight * (MEANS + gain * (x[..., None] - means)), axis=-1)


def state_at(quantiles: Array, node: Node) -> Array:
    """The states x with F(x) = quantile at a time, by bisection to the last bit."""
    from scipy.special import ndtr

    width = np.sqrt((node.alpha * SPREAD) ** 2 + node.sigma**2)
    low = np.full_like(quantiles, -node.alpha - 9.0 * width)
    high = -low
    for _ in range(90):
        middle = 0.5 * (low + high)
        below = ndtr((middle[..., None] - node.alpha * MEANS) / width).mean(axis=-1) < quantiles
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)


def grid_on(noise_schedule: NoiseSchedule, steps: int, ratios: tuple[float, float] = RATIOS) -> TimeGrid:
    """``steps`` intervals uniform in lambda between two values of sigma / alpha."""
    top, bottom = (float(noise_schedule.level_at_ratio(r)) for r in ratios)
    return make_grid(
        noise_schedule, steps, f"log_snr:sigma_max={top!r},sigma_min={bottom!r}", final_zero=False
    )


def error(solver: str, noise_schedule: NoiseSchedule, steps: int) -> float:
    """RMS error of x / alpha at the end of the interval, over eight quantiles."""
    grid = grid_on(noise_schedule, steps)
    program = compile(solver, grid, prediction="denoised")
    end = grid[-1]
    difference = run(program, state_at(QUANTILES, grid[0]), denoised) - state_at(QUANTILES, end)
    return float(np.sqrt(np.mean(np.square(difference / end.alpha))))


def measured_order(
    solver: str, noise_schedule: NoiseSchedule, steps: Sequence[int] = (24, 48, 96, 192)
) -> tuple[float, list[float]]:
    """Slope of log error against log step, least squares over the three finest grids; and the errors."""
    errors = [error(solver, noise_schedule, n) for n in steps]
    tail = slice(max(0, len(steps) - 3), None)
    slope = np.polyfit(np.log(np.asarray(steps[tail], float)), np.log(np.maximum(errors[tail], 1e-300)), 1)[0]
    return -float(slope), errors
