"""What transforms of linear multistep methods share: they see each state a solver builds and may build another."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..schedules import Node
from ..schedules.parametrization import Prediction
from .registry import Solver
from .trace import Evaluation, Linear, Trace, View

Key = tuple[int, Prediction]
"""A prediction by the number of its evaluation and the form in which it is used."""


class Step(NamedTuple):
    """A state as a solver builds it: ``base + sum weight * prediction``; ``base`` holds an earlier state and noises."""

    base: Linear
    weights: dict[Key, float]


class Rebuilding(View):
    """Shows every state to :meth:`rebuild` before the network, a later step or the caller gets it.

    A state is what contains an earlier state: the argument of an evaluation, the result, and what a solver keeps
    besides (a *corrected* state, built with a prediction made at its own node).
    """

    name = "this transform"

    def __init__(self, inner: Trace, solver: Solver) -> None:
        super().__init__(inner)
        self.evaluations: list[Evaluation] = []
        self._solver = solver.spec
        self._states: set[int] = set()
        self._mixed: set[int] = set()
        self._predictions: dict[int, Key] = {}

    def run(self, solve: Callable[[Trace, Linear], Linear], x: Linear) -> Linear:
        """The result of a solver from ``x`` with its states rebuilt."""
        self._states.update(x.terms)
        return self._see(solve(self, x), False)

    def rebuild(self, step: Step, corrected: bool) -> Linear:
        """The state that takes the place of ``step``."""
        raise NotImplementedError

    def value(self, key: Key) -> Linear:
        """The register of a prediction."""
        return self.evaluations[key[0]].form(key[1])

    def evaluate(self, x: Linear, node: Node) -> tuple[Linear, Evaluation]:
        x, m = self.inner.evaluate(self._see(x, False), node)
        self._states.update(x.terms)
        self.evaluations.append(m)
        return x, _Noted(m, len(self.evaluations) - 1, self._predictions)

    def keep(self, value: Linear) -> Linear:
        state = not self._states.isdisjoint(value.terms)
        kept = self.inner.keep(self._see(value, True) if state else value)
        if state:
            self._states.update(kept.terms)
        elif kept.terms != value.terms:
            self._mixed.update(kept.terms)
        return kept

    def _see(self, value: Linear, corrected: bool) -> Linear:
        if not self._mixed.isdisjoint(value.terms):
            raise ValueError(
                f"{self.name} needs a solver whose steps combine predictions; those of {self._solver!r} combine values "
                "derived from them"
            )
        base = {r: c for r, c in value.terms.items() if r not in self._predictions}
        weights = {self._predictions[r]: c for r, c in value.terms.items() if r in self._predictions}
        return self.rebuild(Step(Linear(base), weights), corrected) if any(weights.values()) else value


class _Noted(Evaluation):
    """An evaluation whose registers are written down when a form is asked for."""

    def __init__(self, inner: Evaluation, number: int, registers: dict[int, Key]) -> None:
        self._inner, self._number, self._registers = inner, number, registers
        self.node, self.prediction = inner.node, inner.prediction

    def form(self, target: Prediction) -> Linear:
        value = self._inner.form(target)
        (register,) = value.terms
        self._registers[register] = self._number, target
        return value
