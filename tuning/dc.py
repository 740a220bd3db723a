"""DC-Solver's searches: compensation ratios from a few trajectories, and a polynomial that predicts them elsewhere.

Zhao et al., "DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation",
https://arxiv.org/abs/2409.03755. The transform ``dc`` (samplers/compensation.py) runs what is found here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..samplers import Linear, Solver, Trace, combination, parse
from ..samplers.coefficients import lagrange
from ..samplers.compensation import FIRST, monomials
from ..samplers.rebuilding import Rebuilding, Step
from ..schedules import Node, TimeGrid, conversion
from ..schedules.parametrization import Prediction
from .table import unit
from .teacher import Source, Trajectories

SOLVER = "unipc:order=3"
"""The host of the published searches."""
ORDER = 2
ITERATIONS, RATE, DECAY, MOMENTS = 40, 0.1, 0.01, (0.9, 0.999)
"""Of AdamW, as published."""
PUSH = 1e-3
"""Half the distance over which the derivative in a ratio is taken."""
DEGREE = 3
"""Of the polynomial in i / NFE; the paper says 4, the released coefficients have 3."""


def spec_of(ratios: Sequence[float], solver: str = SOLVER, order: int = ORDER) -> str:
    """The solver with ratios."""
    return f"{solver}+dc:ratios={'/'.join(map(repr, ratios))},order={order}"


def search_ratios(
    source: Source,
    truth: Trajectories,
    grid: TimeGrid,
    *,
    solver: str | Solver = SOLVER,
    order: int = ORDER,
    iterations: int = ITERATIONS,
    say: Callable[[int, float], None] = lambda step, error: None,
) -> tuple[float, ...]:
    """The ratios of every step, one after the other: each makes the next state nearest to the converged trajectories.

    Ratio r_i minimises the mean squared distance of the state after step i, corrected if the solver corrects, from the
    trajectory there, by AdamW from 1; then the run goes on with it. The first ``order`` ratios are 1. The published
    search takes 10 trajectories. The derivative in r_i is a central difference, so the network needs no gradient.

    Raises ValueError for a solver whose steps are no combination of one state and predictions at the nodes.
    """
    steps = _steps(parse(solver), grid)
    search = _Search(source, truth, grid, order)
    ratios = []
    for i, step in enumerate(steps):
        ratio = 1.0 if i < order else search.best(step, iterations)
        search.go(step, ratio)
        say(i, search.error)
        ratios.append(ratio)
    return tuple(ratios)


@dataclass
class _Formula:
    """A state as a solver builds it: ``state * (the state before) + sum weights[j] * (prediction of evaluation j)``."""

    state: float
    weights: dict[int, float]
    form: Prediction


class _Recorder(Rebuilding):
    name = "the search for ratios"

    def __init__(self, inner: Trace, solver: Solver) -> None:
        super().__init__(inner, solver)
        self.steps: list[
            list[_Formula]
        ] = []  # a step: the predicted state, then the corrected one if there is one

    def rebuild(self, step: Step, corrected: bool) -> Linear:
        forms: set[Prediction] = {form for _, form in step.weights}
        if len(step.base.terms) != 1 or len(forms) != 1:
            raise ValueError(f"{self.name} needs steps that combine one state and one kind of prediction")
        (state,) = step.base.terms.values()
        formula = _Formula(state, {j: w for (j, _), w in step.weights.items()}, forms.pop())
        if corrected:
            self.steps[-1].append(formula)
        else:
            self.steps.append([formula])
        return step.base + combination(*((w, self.value(key)) for key, w in step.weights.items()))


def _steps(solver: Solver, grid: TimeGrid) -> list[list[_Formula]]:
    trace = Trace(grid)
    recorder = _Recorder(trace, solver)
    recorder.run(lambda view, x: solver.solve(view, x, grid), trace.start)
    if len(recorder.steps) != grid.steps or len(recorder.evaluations) != grid.steps:
        raise ValueError(
            f"the search for ratios needs one evaluation a step, {solver.spec!r} has another number"
        )
    return recorder.steps


@dataclass
class _Search:
    """A run that goes on step by step: the state, and the predictions as later steps see them."""

    source: Source
    truth: Trajectories
    grid: TimeGrid
    order: int
    values: list[torch.Tensor] = field(default_factory=list)
    new: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.x = self.truth.begin(self.grid) * unit(self.grid[0])

    def predict(self, x: torch.Tensor, node: Node, form: Prediction) -> torch.Tensor:
        denoised = self.source.predict(self.truth.indices, x / unit(node), node)
        c_x, c_m = conversion("denoised", form, node)
        return c_x * x + c_m * denoised

    def step(
        self, formulas: Sequence[_Formula], ratio: float
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
        """The next state, the predictions with the newest replaced, and that at the next node if it was made."""
        i, form = len(self.values), formulas[0].form
        new = self.predict(self.x, self.grid[i], form) if self.new is None else self.new
        self.new = new  # the same for every ratio
        values = [*self.values, new]
        if ratio != 1.0:
            times = [self.grid[i - k].t for k in range(self.order + 1)]
            weights = lagrange(times, np.array([ratio * times[0] + (1.0 - ratio) * times[1]]))
            values[i] = torch.stack([float(w[0]) * values[i - k] for k, w in enumerate(weights)]).sum(0)
        x, ahead = _state(formulas[0], self.x, values), None
        if len(formulas) > 1:
            ahead = self.predict(x, self.grid[i + 1], form)
            x = _state(formulas[1], self.x, [*values, ahead])
        return x, values, ahead

    def distance(self, x: torch.Tensor) -> float:
        """Mean squared, from the trajectories at the next node."""
        node = self.grid[len(self.values) + 1]
        return float((x - unit(node) * self.truth.at(node)).square().mean())

    def best(self, formulas: Sequence[_Formula], iterations: int) -> float:
        ratio, mean, square = 1.0, 0.0, 0.0
        for k in range(1, iterations + 1):  # AdamW; torch's own takes five seconds to import
            low, high = (self.distance(self.step(formulas, ratio + h)[0]) for h in (-PUSH, PUSH))
            slope = (high - low) / (2.0 * PUSH)
            mean += (1.0 - MOMENTS[0]) * (slope - mean)
            square += (1.0 - MOMENTS[1]) * (slope**2 - square)
            size = math.sqrt(square / (1.0 - MOMENTS[1] ** k)) + 1e-8
            ratio -= RATE * (mean / (1.0 - MOMENTS[0] ** k) / size + DECAY * ratio)
        return ratio

    def go(self, formulas: Sequence[_Formula], ratio: float) -> None:
        """Take the step."""
        x, values, ahead = self.step(formulas, ratio)
        self.error = self.distance(x) ** 0.5
        self.x, self.values, self.new = x, values, ahead


def _state(formula: _Formula, x: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
    return formula.state * x + torch.stack([w * values[j] for j, w in formula.weights.items()]).sum(0)


def fit_cascade(
    ratios: Mapping[tuple[int, float], Sequence[float]], degree: int = DEGREE
) -> tuple[float, ...]:
    """Coefficients that give ratios for other numbers of evaluations and guidance scales, from searched ones.

    ``ratios[nfe, scale]`` are those of one search. The model is the published cascade: r_i a polynomial in i / NFE
    whose coefficients are quadratics in scale / 12, whose coefficients are quadratics in NFE / 50. All are fitted in
    one least squares problem over every ratio that was free, of which the least solution is taken: with fewer than
    three different scales or numbers of evaluations the quadratics are not determined otherwise.

    Raises ValueError without a free ratio.
    """
    rows, values = [], []
    for (nfe, scale), found in ratios.items():
        if len(found) != nfe:
            raise ValueError(f"{len(found)} ratios for {nfe} evaluations; there must be one for each")
        rows += [monomials(i, nfe, scale, degree) for i in range(FIRST, nfe + 1)]
        values += found[FIRST - 1 :]
    if not rows:
        raise ValueError(f"no free ratio: searches need at least {FIRST} evaluations")
    design = np.array(rows)
    size = np.maximum(np.abs(design).max(0), 1e-300)
    return tuple((np.linalg.lstsq(design / size, np.array(values), rcond=1e-12)[0] / size).tolist())
