"""What one ``set_timesteps`` decides: levels, timesteps and program of a run, and where a run may start.

A plan is immutable and shared by every scheduler with the same settings. It knows neither tensors nor diffusers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ..samplers import Combine, Evaluate, Program, Solver, compile
from ..schedules import Node, TimeGrid
from ..schedules.diffusers_config import Source
from ..schedules.noise import Array
from ..schedules.parametrization import Prediction
from .diffusers_grid import VANISHING, Request, answer, by_evaluations, grid_of
from .diffusers_program import chained, first_order, hosted


@dataclass(frozen=True)
class Start:
    """How to begin at one evaluation: the program of the rest, whose first ``lead`` evaluations are others'."""

    program: Program
    lead: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """A compiled run on the grid of one ``set_timesteps``.

    ``timesteps`` has one entry per call of ``step``. ``prediction`` is what the program is fed.
    """

    source: Source
    solver: Solver
    grid: TimeGrid
    timesteps: Array
    prediction: Prediction
    integer_timesteps: bool = False
    _starts: dict[Any, Start] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: object) -> Plan:
        return self  # frozen; the dictionary is a cache

    @cached_property
    def program(self) -> Program:
        """The whole run."""
        return self._tail(0, {})

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The node of every call of ``step`` and the node that the run ends at."""
        return (*self.program.evaluations, self.grid[self.grid.steps])

    @cached_property
    def denoised(self) -> tuple[tuple[float, float], ...]:
        """``(c_x, c_m)`` of ``x_0 = c_x x + c_m output`` for every call; ValueError where that is not determined."""
        return tuple(self.source.denoised(node) for node in self.nodes[:-1])

    @cached_property
    def sigmas(self) -> Array:
        """What the scheduler publishes: the noise level of every node, shape (calls + 1,)."""
        if self.source.noise_schedule.frame == "flow":
            levels = np.array([n.sigma for n in self.nodes])
            return 1.0 - levels if self.source.inverted else levels
        return np.array([n.ratio for n in self.nodes])

    @cached_property
    def calls(self) -> int:
        """How often ``step`` is called."""
        return len(self.timesteps)

    @cached_property
    def feeds_output(self) -> bool:
        """Whether the program is fed the network's output as it is."""
        return self.prediction != "denoised" and self.source.output_sign == 1.0

    @cached_property
    def looks_back(self) -> bool:
        """Whether a step has to look at what the host has made of the state in between."""
        return self.keeps_states or self.source.sigma_data is not None

    @cached_property
    def published(self) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps (int64 if whole indices, else float32) and sigmas (float32) as hosts see them."""
        times, by_index = self.timesteps, self.source.clock == "index"
        if self.source.clock == "angle":  # pipelines of this flow leave off the last
            times = np.append(times, self.source.timesteps(self.grid.level[-1]))
        whole = by_index and (self.integer_timesteps or not np.any(times % 1.0))
        kind = np.rint(times).astype(np.int64) if whole else times.astype(np.float32)
        return kind, self.sigmas.astype(np.float32)

    @cached_property
    def clean(self) -> int:
        """The evaluation whose step ends without noise, -1 if there is none."""
        return self.program.nfe - 1 if self.grid.sigma[-1] == 0.0 and self.source.sigma_data is None else -1

    @cached_property
    def keeps_states(self) -> bool:
        """Whether the program reads a state again after a later evaluation, so that an edit of x is not all it sees."""
        evaluated = {op.dst: op.src for op in self.program.ops if isinstance(op, Evaluate)}
        predictions = set(evaluated)
        for (
            op
        ) in self.program.ops:  # a prediction in another form: a combination of one evaluation and its state
            if isinstance(op, Combine):
                sources = {src for src, _ in op.terms}
                if any(sources <= {dst, src} and dst in sources for dst, src in evaluated.items()):
                    predictions.add(op.dst)
        states = [(r, a, b) for r, (a, b) in self.program.lifetimes.items() if r not in predictions]
        return any(
            isinstance(op, Evaluate) and any(a < i < b and r != op.src for r, a, b in states)
            for i, op in enumerate(self.program.ops)
        )

    def start(self, index: int, options: Mapping[str, Any] | None = None) -> Start:
        """How to begin at evaluation ``index``, with a clean history; ``options`` are added to the solver's.

        Raises ValueError where the run cannot begin there, naming the evaluations where it can.
        """
        key = (index, tuple(sorted((options or {}).items())))
        found = self._starts.get(key)
        if found is None:
            found = self._starts[key] = self._find(index, dict(options or {}))
        return found

    def _find(self, index: int, options: dict[str, Any]) -> Start:
        total = self.program.nfe
        if not 0 <= index < total:
            raise ValueError(f"the run has {total} evaluations, 0 to {total - 1}; it cannot start at {index}")
        j, k = self._resume(index)
        rest = self._tail(k, options) if k < self.grid.steps else None
        if j == index and rest:
            return Start(rest)
        # Between the stages of a step: by first-order steps to where the next one begins.
        nodes = [*self.program.evaluations[index:j], self.grid[k]]
        return Start(chained(first_order(nodes, self.grid, self.prediction), rest), j - index)

    def _resume(self, index: int) -> tuple[int, int]:
        """The first evaluation from ``index`` on at which the solver can begin, and the node there; else the end."""
        steps, evaluations = self.grid.steps, self.program.evaluations
        total = len(evaluations)
        at = bisect_left(range(steps), index - total, key=lambda k: -self._tail(k, {}).nfe)
        for k in range(at, steps):
            tail = self._tail(k, {}).evaluations
            if tail == evaluations[total - len(tail) :]:
                return total - len(tail), k
        return total, steps

    def begins(self, index: int) -> bool:
        """Whether a step of the solver begins at an evaluation."""
        return self._resume(index)[0] == index

    def _tail(self, k: int, options: dict[str, Any]) -> Program:
        """The program from node ``k`` on, as if the run began there."""
        grid = self.grid.tail(k) if k else self.grid
        return hosted(compile(self.solver, grid, prediction=self.prediction, **options))

    def edited(self, sigmas: Sequence[float]) -> Plan:
        """The plan after a host has changed ``sigmas`` in place; timesteps stay what was published.

        Raises ValueError if the new levels cannot be stepped through.
        """
        given = np.asarray(sigmas, dtype=np.float64)
        if len(given) != len(self.sigmas):
            raise ValueError(f"sigmas had {len(self.sigmas)} elements and now have {len(given)}")
        touched = self.sigmas.astype(np.float32) != given
        levels = self.grid.level.copy()
        if not touched[:-1].any() and given[-1] == given[-2]:  # a last step of length zero
            if self.grid.steps == 1:
                return self
            levels[-1] = levels[-2] * (1.0 - VANISHING)
        elif set(self.grid) <= set(self.nodes):
            kept = [self.nodes.index(node) for node in self.grid]
            new = 1.0 - given[kept] if self.source.inverted else given[kept]
            if not np.all(np.diff(new) < 0):
                raise ValueError(
                    f"the changed sigmas must be strictly decreasing, got {given[kept].tolist()}"
                )
            levels = np.where(touched[kept], new, levels)
        else:
            raise ValueError(
                f"solver {self.solver.spec!r} evaluates elsewhere than on the grid; its sigmas cannot be changed"
            )
        grid = grid_of(self.source, levels, self.grid.t)
        plan = replace(self, grid=grid, _starts={})
        if len(plan.nodes) != len(self.nodes):
            raise ValueError(
                f"with the changed sigmas solver {self.solver.spec!r} has {plan.program.nfe} evaluations, "
                f"not {self.program.nfe} as published"
            )
        return plan


@lru_cache(maxsize=128)
def make_plan(request: Request) -> Plan:
    """The plan for one ``set_timesteps``.

    Raises ValueError for what the levels, the solver or the host's way of running it do not allow, before the network
    is called.
    """
    if request.count_evaluations:
        request = by_evaluations(request)
    found = answer(request)
    prediction = "denoised" if request.denoised else found.source.prediction
    whole = request.integer_timesteps
    plan = Plan(found.source, found.solver, found.grid, np.empty(0), prediction, whole)
    plan = replace(plan, timesteps=_published(plan, found.told))
    assert plan.denoised
    return plan


def _published(plan: Plan, told: Array | None) -> Array:
    """One timestep per call: of the node that is evaluated, or what the user said for it."""
    program, source = plan.program, plan.source
    nodes = program.evaluations
    if source.clock == "index":
        times = np.array([n.t for n in nodes])
        rounded = np.rint(times)  # inverting a table leaves 1e-12
        return np.where(np.abs(times - rounded) < 1e-6, rounded, times)
    levels = np.array([n.sigma if source.noise_schedule.frame == "flow" else n.ratio for n in nodes])
    times = source.timesteps(levels)
    if told is not None:  # timesteps are for the network, sigmas for the solver
        at = {plan.grid[k]: value for k, value in enumerate(told)}
        times = np.array([at.get(n, t) for n, t in zip(nodes, times)])
    return times
