"""A search for the solver itself: order, prediction space and corrector of every step, and the levels, all at once.

Liu et al., "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models",
https://arxiv.org/abs/2312.07243. Everything that a step decides makes a linear combination of past predictions, so
what is found is a :class:`Table`. An evolutionary search proposes designs, a predictor fitted to those that have
been run chooses which of them to run next, and few trajectories choose which are worth all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..samplers import Linear, Solver, Trace
from ..samplers.coefficients import Form
from ..samplers.registry import Declaration
from ..samplers.unipc import unipc_step
from ..schedules import NoiseSchedule, TimeGrid
from .fit import error
from .grids import SPACINGS, grid_of, starting_grids
from .table import Table, angle, levels_at, table_of
from .teacher import Source, Trajectories

ORDERS, SHARES = (1, 2, 3, 4), (0.2, 0.4, 0.3, 0.1)
FORMS: tuple[Form, ...] = ("denoised", "epsilon")
MUTATION, CROSSOVER, JITTER = 0.3, 0.3, 0.08
"""Probability of a change of each decision and of two parents; standard deviation of a level's move, in its gap."""
PARENTS, PROPOSALS, RUN = 15, 200, 10
"""The best that have children; children that the predictor ranks in a round, and how many of them are run."""
LEARNED = 200
"""The best designs that the predictor learns from."""
FEW = 8
"""Trajectories on which a proposal is run first."""


@dataclass(frozen=True)
class Choice:
    """One step: its order, the prediction it extrapolates, and whether the next evaluation corrects its result."""

    order: int
    form: Form
    corrector: bool


@dataclass(frozen=True)
class Design:
    """A sampler: the angles of its levels but the last, which has no noise, and the choice of every step."""

    angles: tuple[float, ...]
    choices: tuple[Choice, ...]

    def table(self, noise_schedule: NoiseSchedule) -> Table:
        """What a recipe holds; ValueError for levels that do not descend."""
        levels = np.minimum(levels_at(noise_schedule, self.angles), noise_schedule.level_max)
        return table_of(self.solver, grid_of(noise_schedule, [*levels, 0.0]))

    @property
    def solver(self) -> Solver:
        """Steps of UniPC's family, each as its choice says."""
        one = lambda **_: 1  # noqa: E731
        name = f"searched_{hash(self) & 0xFFFFFFFF:08x}"
        return Solver(
            Declaration(name, self._solve, "table", one, one, one, lambda **_: 0, lambda **_: False, {}, "")
        )

    def _solve(self, trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
        x, m = trace.evaluate(x, grid[0])
        history = [(grid[0], m)]
        for i, (t, choice) in enumerate(zip(list(grid)[1:], self.choices)):
            past = history[: choice.order]
            predicted = unipc_step(x, past, None, t, "bh2", choice.form)
            if i == grid.steps - 1:
                return predicted
            predicted, m = trace.evaluate(predicted, t)
            corrected = unipc_step(x, past, m, t, "bh2", choice.form) if choice.corrector else predicted
            x = trace.keep(corrected)
            history = [(t, m), *history]
        return x

    @property
    def features(self) -> np.ndarray:
        """What the predictor sees: a move of a level by its jitter is as far as a changed decision."""
        gaps = -np.diff([*self.angles, 0.0])
        decisions = [(c.order, c.form == "epsilon", c.corrector) for c in self.choices]
        return np.concatenate([np.log(gaps) / (4 * JITTER), np.ravel(np.array(decisions, dtype=float))])


@dataclass
class Budget:
    """What a search may spend: network evaluations of single samples, seconds, or both."""

    evaluations: float = math.inf
    seconds: float = math.inf
    spent: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> bool:
        return self.spent < self.evaluations and time.monotonic() - self.began < self.seconds


def search_solver(
    source: Source,
    truth: Trajectories,
    nfe: int,
    *,
    grids: Mapping[str, TimeGrid] | None = None,
    evaluations: float = 100_000,
    seconds: float = math.inf,
    seed: int = 0,
    say: Callable[[str, float], None] = lambda what, error: None,
) -> Table:
    """The best design of ``nfe`` evaluations that was found before the budget was spent.

    Starts from methods made by hand on ``grids`` (the spacings, if not given). ``evaluations`` are those of single
    samples (a guided one counts once); ``seconds`` end the search as well, and then its result depends on the machine.
    Raises ValueError for a budget that does not allow one design, and a model on which none works.
    """
    budget, rng = Budget(evaluations, seconds), np.random.default_rng(seed)
    few = truth.subset(range(min(FEW, len(truth.indices))))
    rough: dict[Design, float] = {}
    exact: dict[Design, float] = {}

    def run(design: Design, on: Trajectories, into: dict[Design, float]) -> None:
        if design in into or not budget.left:
            return
        try:
            into[design] = error(design.table(source.noise_schedule), source, on)
        except ValueError:
            into[design] = math.inf
        budget.spent += nfe * len(on.indices)

    grids = starting_grids(source, truth, nfe, SPACINGS) if grids is None else grids
    population = _by_hand(grids.values(), nfe)
    while budget.left:
        for design in population:
            run(design, few, rough)
        ranked = sorted(rough, key=rough.__getitem__)
        for design in ranked[:RUN]:
            run(design, truth, exact)
        if exact:
            say(f"{len(rough)} designs, {len(exact)} on all trajectories", min(exact.values()))
        parents = ranked[:PARENTS]
        proposals = {_child(parents, rng) for _ in range(PROPOSALS)} - set(rough)
        guess = _predictor(rough)
        population = sorted(proposals, key=lambda d: (guess(d), d.angles))[:RUN]
        if not population:
            break
    if not exact or not math.isfinite(min(exact.values())):
        raise ValueError(
            f"a budget of {evaluations:g} evaluations and {seconds:g} seconds is too small, "
            "or nothing is finite on this model"
        )
    return min(exact, key=exact.__getitem__).table(source.noise_schedule)


def _by_hand(grids: Iterable[TimeGrid], nfe: int) -> list[Design]:
    """Familiar methods on all grids: orders 2 and 3, with and without corrector, and in noise."""
    kinds = [
        Choice(2, "denoised", False),
        Choice(2, "denoised", True),
        Choice(3, "denoised", True),
        Choice(3, "epsilon", False),
    ]
    return [
        Design(tuple(angle(node) for node in list(grid)[:-1]), (kind,) * nfe)
        for grid in grids
        for kind in kinds
    ]


def _child(parents: Sequence[Design], rng: np.random.Generator) -> Design:
    """A parent, or a mix of two, with some decisions changed and its levels moved."""
    one, other = (parents[i] for i in rng.integers(len(parents), size=2))
    cut = int(rng.integers(len(one.choices) + 1)) if rng.random() < CROSSOVER else len(one.choices)
    choices = [_mutated(c, rng) for c in (*one.choices[:cut], *other.choices[cut:])]
    angles = [*one.angles[:cut], *other.angles[cut:]]
    if any(a <= b for a, b in zip(angles, angles[1:])):
        angles = list(one.angles)
    gaps = -np.diff([*angles, 0.0]) * np.exp(JITTER * rng.standard_normal(len(angles)))
    moved = np.cumsum(gaps[::-1])[::-1]
    moved *= min(1.0, max(p.angles[0] for p in parents) / moved[0])
    return Design(tuple(map(float, moved)), tuple(choices))


def _mutated(choice: Choice, rng: np.random.Generator) -> Choice:
    if rng.random() < MUTATION:
        choice = replace(choice, order=int(rng.choice(ORDERS, p=SHARES)))
    if rng.random() < MUTATION:
        choice = replace(choice, form=FORMS[int(rng.integers(2))])
    if rng.random() < MUTATION:
        choice = replace(choice, corrector=bool(rng.random() < 0.5))
    return choice


def _predictor(known: dict[Design, float], ridge: float = 1e-2) -> Callable[[Design], float]:
    """Kernel ridge regression of the logarithm of the error on the features of the best that has been run."""
    finite = {d: e for d, e in known.items() if 0.0 < e < math.inf}
    if not finite:
        return lambda design: 0.0
    finite = {d: finite[d] for d in sorted(finite, key=finite.__getitem__)[:LEARNED]}
    x, y = np.stack([d.features for d in finite]), np.log(list(finite.values()))
    apart = np.square(x[:, None] - x).sum(-1)
    width = np.median(apart[apart > 0.0]) if len(x) > 1 else 1.0
    weights = np.linalg.solve(np.exp(-apart / width) + ridge * np.eye(len(x)), y - y.mean())

    def predict(design: Design) -> float:
        near = np.exp(-np.square(x - design.features).sum(-1) / width)
        return float(y.mean() + near @ weights)

    return predict
