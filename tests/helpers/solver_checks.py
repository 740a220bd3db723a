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
from fewstep.schedules import EDM, Flow, Node, NoiseSchedule, TimeGrid, VPContinuous

SCHEDULES: dict[str, NoiseSchedule] = {"vp": VPContinuous(), "edm": EDM(), "flow": Flow()}
SPAN = (1.0, 0.1)
"""sigma / alpha at both ends of the order measurements: where the mixture decides between its modes, from the first
step on, so that the start-up of a multistep method weighs as much as it ever does."""

UNLIKE = {("ddim", "final_index"), ("dpmpp_3s", "lower_order_final")}
"""Options that ask for something else than the default's result or order, whatever the number of steps."""

FEWER = {"heunpp2": 3}
"""Evaluations that the last steps of a solver do without: it looks two nodes ahead, and none where there is none."""

TRANSFORMED = [
    "ipndm:order=2+heavy_ball",
    "dpmpp_2m+heavy_ball:beta=0.9,start=higher",
    "dpmpp_2m+heavy_ball:nesterov=true",
    "unipc:order=3+heavy_ball",
    "dpmpp_2m_sde+heavy_ball",
    "euler+skip:h2/s2",
    "dpmpp_2m+skip:h3/s4,variable=denoised",
    "unipc+skip:h2/s3",
    "heun+skip:h4,sigma_aware=true",
    "heun+restart:t_min=0.2,t_max=0.6,steps=4",
    "dpmpp_2m+restart:t_min=0.2,t_max=0.6,steps=4",
    "ipndm+afs",
    "heun+afs",
    "dpmpp_2m_sde+afs",
    "ddim+dual_fast",
    "unipc+dual_fast:c=0.3",
    "heun+dual_fast",
]
"""Solvers under transforms that go through the whole suite as well."""

INEXACT = {"euler+skip:h2/s2", "ipndm:weights=published", "ipndm+afs", "heun+afs", "dpmpp_2m_sde+afs"}
"""Not exact on a point mass: FSampler continues k eps as a polynomial in the number of the step, which it is not even
where eps is constant; the published weights of iPNDM_v do not add up to one; an analytical first step assumes data
of unit variance."""

SIGNAL_ONLY = {
    "accelerated_ddpm",
    "ddpm:variance=large",
    "annealed_langevin",
    "predictor_corrector",
    "predictor_corrector:predictor=ancestral",
}
"""Exact on a point mass in the coefficient of x_0 only: the forward variance and the moves of Langevin dynamics leave
more noise than the level has, by their definition, and accelerated DDPM evaluates states noisier than it says."""

Factory = Callable[[TimeGrid], Program]


def variants() -> list[str]:
    """Every registered solver: as it is, and with every other value of each option that has few."""
    specs = []
    for name, declaration in fs.solvers().items():
        specs.append(name)
        for key, option in declaration.options.items():
            values: tuple = ()
            kinds = (option.annotation, *get_args(option.annotation))  # also of Literal[...] | str
            if literal := [kind for kind in kinds if get_origin(kind) is Literal]:
                values = get_args(literal[0])
            elif option.annotation is bool and (name, key) not in UNLIKE:
                values = (False, True)
            elif key == "order":
                values = (1, 2, 3, 4)
            elif key == "eta":
                values = (0.0, 0.5, 1.0)
            specs += [f"{name}:{key}={str(v).lower()}" for v in values if v != option.default]
    return specs + TRANSFORMED


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
    """Start states and converged solutions of the ODE at the ends of SPAN in the frame x / alpha: RK4, 4000 steps."""
    y = SPAN[0] * np.random.default_rng(0).standard_normal((24, 2))
    start, logs = y.copy(), np.log(np.geomspace(SPAN[0], SPAN[1], 4001))

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
    """Resolves the path down to 1 / 16384 of an octave, far below the steps taken here, and keeps its points: all
    solvers walk on the same paths, over nested grids."""

    DEPTH = 14
    POINTS: dict[tuple, tuple[int, torch.Tensor]] = {}

    def _offset(self, like: torch.Tensor, u: float) -> tuple[int, torch.Tensor]:
        key = (self.seeds, self._path, like.shape, u)
        if key not in self.POINTS:
            if len(self.POINTS) > 20_000:  # about 60 MB
                self.POINTS.clear()
            self.POINTS[key] = super()._offset(like, u)
        return self.POINTS[key]


def solve(program: Program, grid: TimeGrid, seed: int = 0, copies: int = 1) -> np.ndarray:
    """The result of a program on the mixture, in the frame x / alpha; noise on one Brownian path a start state."""
    x = torch.from_numpy(np.tile(start_and_truth()[0], (copies, 1))[None]) * grid[0].alpha
    stepper = Stepper(program, x, CoarseBrownianNoise([seed]))
    model = getattr(mixture(), program.prediction)
    while not stepper.done:
        node = stepper.node
        stepper.step(torch.from_numpy(model(stepper.x.numpy(), node.alpha, node.sigma)))
    return stepper.x.numpy()[0] / grid[-1].alpha


def slope(factory: Factory, schedule: NoiseSchedule, stochastic: bool, fine: bool = False) -> float:
    """Observed global order: minus the slope of log error against log steps; ``fine`` for high orders.

    For a stochastic solver the strong order, from the differences of successive refinements on the same Brownian paths:
    the median over many, as the mean hangs on the few paths that pass where the modes part.
    """
    steps = (40, 80, 160, 320) if stochastic else (324, 648) if fine else (162, 324)
    grids = [ratio_grid(schedule, n) for n in steps]
    results = [solve(factory(grid), grid, copies=8 if stochastic else 1) for grid in grids]
    truths = results[1:] if stochastic else [start_and_truth()[1]] * len(steps)
    average = np.median if stochastic else np.mean
    errors = [np.sqrt(average((x - truth) ** 2)) for x, truth in zip(results, truths)]
    return float(-np.polyfit(np.log(steps[: len(errors)]), np.log(errors), 1)[0])


def gaussian_variance(program: Program, grid: TimeGrid | list[Node], square: float = 0.25) -> float:
    """The variance of a program's result on data ~ N(0, c^2), over the exact one: 1 where it is right.

    The denoised prediction is ``alpha c^2 / (alpha^2 c^2 + sigma^2) x``, so a result is a sum over the start state and
    the drawn noises; the true variance is ``alpha^2 c^2 + sigma^2``, and that is what the start state has.
    """
    assert program.prediction == "denoised"
    draws = {op.dst: i for i, op in enumerate((o for o in program.ops if isinstance(o, Noise)), 1)}
    unit = np.eye(len(draws) + 1)
    start, end = (node.alpha**2 * square + node.sigma**2 for node in (grid[0], grid[-1]))
    form = {0: np.sqrt(start) * unit[0]}
    for op, dead in zip(program.ops, program.releases):
        if isinstance(op, Combine):
            form[op.dst] = sum(coef * form[src] for src, coef in op.terms)
        elif isinstance(op, Evaluate):
            _, alpha, sigma = program.nodes[op.node]
            form[op.dst] = alpha * square / (alpha**2 * square + sigma**2) * form[op.src]
        else:
            form[op.dst] = unit[draws[op.dst]]
        for register in dead:
            del form[register]
    return float(form[program.output] @ form[program.output] / end)


def weak_slope(factory: Factory, schedule: NoiseSchedule) -> float:
    """Observed weak order in the second moment, where it is known exactly: on Gaussian data."""
    steps, errors = (160, 320), []
    for n in steps:
        grid = ratio_grid(schedule, n)
        errors.append(abs(gaussian_variance(factory(grid), grid) - 1.0))
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def stability_limit(spec: str) -> float:
    """The longest z = step * slope for which ``du = -slope u`` in the EDM frame does not grow, steps all equal."""
    steps = 400
    grid = TimeGrid.from_levels(EDM(sigma_max=steps + 9.0), np.arange(steps, -1.0, -1.0) + 1.0)
    program = fs.compile(spec, grid, prediction="epsilon")

    def grows(z: float) -> bool:
        form, seen = {0: 1.0}, []
        for op in program.ops:
            if isinstance(op, Combine):
                form[op.dst] = sum(coef * form[src] for src, coef in op.terms)
            else:
                assert isinstance(op, Evaluate)
                form[op.dst] = z * form[op.src]  # a step is minus one long
                seen.append(abs(form[op.src]))
                if seen[-1] > 1e100:
                    return True
        return max(seen[-steps // 4 :]) > max(seen[steps // 4 : steps // 2])

    low, high = 0.0, 20.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return low


def exactness_error(program: Program, grid: TimeGrid, signal_only: bool = False) -> float:
    """How far a program is from exact on a point mass, for every state that it evaluates and for the result.

    With the denoised prediction constant, a state at (alpha, sigma) is ``alpha x_0 + sigma eps``: the coefficients of
    x_0 must add up to alpha, the squares of those of the start noise and the drawn noises to sigma^2. ``signal_only``
    looks at the first.
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
        noise = 0.0 if signal_only else abs(np.sqrt(variance) - node.sigma)
        worst = max(worst, abs(signal - node.alpha), noise)
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
