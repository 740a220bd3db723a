"""What can be measured of any solver: exactness by algebra, order on a mixture whose denoiser is known.

The same functions judge the shipped solvers and deliberately broken ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args, get_origin

import numpy as np
import torch
from golden_files import Mixture

import fewstep as fs
from fewstep.samplers import BrownianNoise, Combine, Evaluate, Noise, Program, Stepper
from fewstep.schedules import EDM, Flow, NoiseSchedule, TimeGrid, VPContinuous

SCHEDULES: dict[str, NoiseSchedule] = {"vp": VPContinuous(), "edm": EDM(), "flow": Flow()}
SPAN = (1.0, 0.1)
"""sigma / alpha at both ends of the order measurements: where the mixture decides between its modes, from the first
step on, so that the start-up of a multistep method weighs as much as it ever does."""

UNLIKE = {("ddim", "final_index"), ("ipndm", "afs"), ("dpmpp_3s", "lower_order_final")}
"""Options that ask for something else than the default's result or order, whatever the number of steps."""

Factory = Callable[[TimeGrid], Program]


def variants() -> list[str]:
    """Every registered solver: as it is, and with every other value of each option that has few."""
    specs = []
    for name, declaration in fs.solvers().items():
        specs.append(name)
        for key, option in declaration.options.items():
            values: tuple = ()
            if get_origin(option.annotation) is Literal:
                values = get_args(option.annotation)
            elif option.annotation is bool and (name, key) not in UNLIKE:
                values = (False, True)
            elif key == "order":
                values = (1, 2, 3, 4)
            elif key == "eta":
                values = (0.0, 0.5, 1.0)
            specs += [f"{name}:{key}={str(v).lower()}" for v in values if v != option.default]
    return specs


def ratio_grid(schedule: NoiseSchedule, steps: int, high: float = SPAN[0], low: float = SPAN[1]) -> TimeGrid:
    """A grid uniform in lambda between two ratios sigma / alpha."""
    return TimeGrid.from_levels(schedule, schedule.level_at_ratio(np.geomspace(high, low, steps + 1)))


@functools.cache
def mixture() -> Mixture:
    """Three modes in two dimensions."""
    mu = np.array([[1.0, 0.5], [-0.8, 0.9], [0.1, -1.1]])
    return Mixture(np.array([0.5, 0.3, 0.2]), mu, np.array([[0.04, 0.09], [0.06, 0.02], [0.05, 0.05]]))


@functools.cache
def start_and_truth() -> tuple[np.ndarray, np.ndarray]:
    """Start states and converged solutions of the ODE at the ends of SPAN in the frame x / alpha: RK4, 2000 steps."""
    y = SPAN[0] * np.random.default_rng(0).standard_normal((24, 2))
    start, logs = y.copy(), np.log(np.geomspace(SPAN[0], SPAN[1], 2001))

    def derivative(y: np.ndarray, log_ratio: float) -> np.ndarray:
        k = np.exp(log_ratio)
        return k * mixture().epsilon(y, 1.0, k)

    for a, b in zip(logs, logs[1:]):
        h, m = b - a, (a + b) / 2
        k1 = derivative(y, a)
        k2 = derivative(y + h / 2 * k1, m)
        k3 = derivative(y + h / 2 * k2, m)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + derivative(y + h * k3, b))
    return start, y


class CoarseBrownianNoise(BrownianNoise):
    """Resolves the path down to 1 / 16384 of an octave, far below the steps taken here, in half the time."""

    DEPTH = 14


def solve(program: Program, grid: TimeGrid, seed: int = 0) -> np.ndarray:
    """The result of a program on the mixture, in the frame x / alpha; noise on one Brownian path."""
    x = torch.from_numpy(start_and_truth()[0][None]) * grid[0].alpha
    stepper = Stepper(program, x, CoarseBrownianNoise([seed]))
    model = getattr(mixture(), program.prediction)
    while not stepper.done:
        node = stepper.node
        stepper.step(torch.from_numpy(model(stepper.x.numpy(), node.alpha, node.sigma)))
    return stepper.x.numpy()[0] / grid[-1].alpha


def slope(factory: Factory, schedule: NoiseSchedule, stochastic: bool) -> float:
    """Observed global order: minus the slope of log error against log steps.

    For a stochastic solver the strong order on one Brownian path, from the differences of successive refinements.
    """
    steps = (40, 80, 160, 320) if stochastic else (162, 324)
    grids = [ratio_grid(schedule, n) for n in steps]
    results = [solve(factory(grid), grid) for grid in grids]
    truths = results[1:] if stochastic else [start_and_truth()[1]] * len(steps)
    errors = [np.sqrt(np.mean((x - truth) ** 2)) for x, truth in zip(results, truths)]
    return float(-np.polyfit(np.log(steps[: len(errors)]), np.log(errors), 1)[0])


def exactness_error(program: Program, grid: TimeGrid) -> float:
    """How far a program is from exact on a point mass, for every state that it evaluates and for the result.

    With the denoised prediction constant, a state at (alpha, sigma) is ``alpha x_0 + sigma eps``: the coefficients of
    x_0 must add up to alpha, the squares of those of the start noise and the drawn noises to sigma^2.
    """
    assert program.prediction == "denoised"
    states, result = program.unroll()
    ends = [program.nodes[op.node] for op in program.ops if isinstance(op, Evaluate)]
    draws = {op.dst for op in program.ops if isinstance(op, Noise)}
    worst = 0.0
    for form, node in [*zip(states, ends), (result, grid[-1])]:
        signal = form.get(0, 0.0) * grid[0].alpha
        signal += sum(c for source, c in form.items() if source and source not in draws)
        variance = (form.get(0, 0.0) * grid[0].sigma) ** 2 + sum(form.get(d, 0.0) ** 2 for d in draws)
        worst = max(worst, abs(signal - node.alpha), abs(np.sqrt(variance) - node.sigma))
    return worst


def plant_inconsistent(program: Program) -> Program:
    """One coefficient of the operation in the middle, off by one per cent."""
    middle = [i for i, op in enumerate(program.ops) if isinstance(op, Combine) and len(op.terms) > 1]
    i = middle[len(middle) // 2]
    op = program.ops[i]
    assert isinstance(op, Combine)
    (source, coef), *rest = op.terms
    broken = replace(op, terms=((source, coef * 1.01), *rest))
    return replace(program, ops=(*program.ops[:i], broken, *program.ops[i + 1 :]))


def plant_lower_order(program: Program) -> Program:
    """Ten per cent of the newest prediction's weight moved to an older one in every step: exact on a point mass."""
    order = {op.dst: i for i, op in enumerate(o for o in program.ops if isinstance(o, Evaluate))}
    ops = []
    for op in program.ops:
        if isinstance(op, Combine):
            found = sorted((r for r, _ in op.terms if r in order), key=order.__getitem__)
            if len(found) > 1:
                moved = 0.1 * dict(op.terms)[found[-1]]
                shift = {found[-1]: -moved, found[-2]: moved}
                op = replace(op, terms=tuple((r, c + shift.get(r, 0.0)) for r, c in op.terms))
        ops.append(op)
    return replace(program, ops=tuple(ops))
