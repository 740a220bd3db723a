"""Symbolic values: run a solver's loop on them once and it leaves a :class:`~fewstep.samplers.program.Program`.

A :class:`Linear` is a weighted sum of registers; ``+``, ``-`` and multiplication by a number build new ones. Only
three things reach the program: a state that is evaluated, a value that is kept, a noise that is drawn.
"""

from __future__ import annotations

from collections import Counter

from ..schedules import Node, TimeGrid, conversion
from ..schedules.parametrization import Prediction
from .program import Combine, Evaluate, Noise, Op, Program, reads


class Linear:
    """A weighted sum of registers."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[int, float]) -> None:
        self.terms = terms

    def __add__(self, other: Linear) -> Linear:
        terms = dict(self.terms)
        for register, coef in other.terms.items():
            terms[register] = terms.get(register, 0.0) + coef
        return Linear(terms)

    def __mul__(self, number: float) -> Linear:
        return Linear({register: coef * float(number) for register, coef in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, number: float) -> Linear:
        return self * (1.0 / number)

    def __neg__(self) -> Linear:
        return self * -1.0

    def __sub__(self, other: Linear) -> Linear:
        return self + -other


def combination(*terms: tuple[float, Linear]) -> Linear:
    """``sum coef * value``."""
    total = Linear({})
    for coef, value in terms:
        total = total + coef * value
    return total


class Evaluation:
    """The network's answer at a node, in whichever form the solver asks for; each form is one register.

    ``raw`` is the answer for the state ``x`` as a ``prediction``.
    """

    def __init__(self, trace: Trace, x: Linear, raw: Linear, node: Node, prediction: Prediction) -> None:
        self._trace, self._x, self._raw, self.node = trace, x, raw, node
        self.prediction: Prediction = prediction
        self._forms: dict[Prediction, Linear] = {}

    def form(self, target: Prediction) -> Linear:
        """The prediction converted to ``target``, once."""
        if target not in self._forms:
            c_x, c_m = conversion(self.prediction, target, self.node)
            self._forms[target] = self._trace.keep(c_x * self._x + c_m * self._raw)
        return self._forms[target]

    @property
    def denoised(self) -> Linear:
        """The prediction of the clean sample x_0."""
        return self.form("denoised")

    @property
    def epsilon(self) -> Linear:
        """The prediction of the noise."""
        return self.form("epsilon")

    @property
    def velocity(self) -> Linear:
        """The flow velocity eps - x_0."""
        return self.form("flow")


class Trace:
    """Records what a solver does; see the module's description."""

    def __init__(self, grid: TimeGrid, prediction: Prediction = "denoised") -> None:
        self.prediction: Prediction = prediction
        self._nodes: dict[Node, int] = {node: i for i, node in enumerate(grid)}
        self._ops: list[Op] = []
        self._registers = 1

    @property
    def start(self) -> Linear:
        """The start state."""
        return Linear({0: 1.0})

    def keep(self, value: Linear) -> Linear:
        """``value`` in a register of its own: what a history should hold."""
        terms = tuple((register, coef) for register, coef in value.terms.items() if coef != 0.0)
        terms = terms or tuple(value.terms.items())[:1]  # a value that is zero
        if len(terms) == 1 and terms[0][1] == 1.0:
            return Linear(dict(terms))
        return self._write(lambda dst: Combine(dst, terms))

    def evaluate(self, x: Linear, node: Node) -> tuple[Linear, Evaluation]:
        """The network at state ``x`` and a node: ``(x in a register, the prediction)``."""
        x = self.keep(x)
        (src,) = x.terms
        raw = self._write(lambda dst: Evaluate(dst, src, self._index(node)))
        return x, Evaluation(self, x, raw, node, self.prediction)

    def noise(self, s: Node, t: Node) -> Linear:
        """A standard normal that belongs to the interval s -> t."""
        return self._write(lambda dst: Noise(dst, self._index(s), self._index(t)))

    def finish(self, x: Linear, solver: str = "") -> Program:
        """The program that ends in ``x``, without operations that nothing reads."""
        (output,) = self.keep(x).terms
        needed, ops = {output}, []
        for op in reversed(self._ops):
            # An evaluation is never dropped: a solver that asks for one it does not use should be seen to.
            if op.dst in needed or isinstance(op, Evaluate):
                needed.update(reads(op))
                ops.append(op)
        ops = _simplified(ops[::-1], output)
        return Program(tuple(self._nodes), tuple(ops), output, self.prediction, solver).check()

    def _index(self, node: Node) -> int:
        return self._nodes.setdefault(node, len(self._nodes))

    def _write(self, op) -> Linear:
        register, self._registers = self._registers, self._registers + 1
        self._ops.append(op(register))
        return Linear({register: 1.0})


def _simplified(ops: list[Op], output: int) -> list[Op]:
    """The same in fewer passes over memory.

    A combination that one other combination reads, before the next evaluation, becomes part of it. A corrected state is
    written as the predicted one plus a difference where that is shorter, which also frees the state before.
    """
    readers = Counter(src for op in ops for src in reads(op))
    readers[output] += 1
    pending: dict[int, Combine] = {}  # read once, and by nothing yet
    predicted: tuple[int, tuple[tuple[int, float], ...]] = (-1, ())
    written: dict[int, tuple[tuple[int, float], ...]] = {}
    gone: set[int] = set()
    result: list[Op] = []
    for op in ops:
        if isinstance(op, Evaluate):
            pending.clear()
            predicted = op.src, written.get(op.src, ())
        elif isinstance(op, Combine):
            terms: dict[int, float] = {}
            for src, coef in op.terms:
                inner = pending.pop(src, None)
                if inner is not None:
                    gone.add(src)
                for source, factor in inner.terms if inner else ((src, 1.0),):
                    terms[source] = terms.get(source, 0.0) + coef * factor
            terms = {r: c for r, c in terms.items() if c != 0.0} or dict(op.terms)
            if predicted[1] and predicted[0] not in terms:
                difference = dict(terms)
                for source, factor in predicted[1]:
                    difference[source] = difference.get(source, 0.0) - factor
                difference = {r: c for r, c in difference.items() if c != 0.0}
                if len(difference) < len(terms) - (1.0 in terms.values()):
                    terms = {predicted[0]: 1.0, **difference}
            # First a term with factor one: adding to it is a pass less.
            op = Combine(op.dst, tuple(sorted(terms.items(), key=lambda term: term[1] != 1.0)))
            written[op.dst] = op.terms
            if readers[op.dst] == 1:
                pending[op.dst] = op
        result.append(op)
    return [op for op in result if op.dst not in gone]


class View(Trace):
    """Another trace as a transform shows it to the solver inside: everything is passed on until it is overridden."""

    def __init__(self, inner: Trace) -> None:
        self.inner, self.prediction = inner, inner.prediction

    @property
    def start(self) -> Linear:
        return self.inner.start

    def keep(self, value: Linear) -> Linear:
        return self.inner.keep(value)

    def evaluate(self, x: Linear, node: Node) -> tuple[Linear, Evaluation]:
        return self.inner.evaluate(x, node)

    def noise(self, s: Node, t: Node) -> Linear:
        return self.inner.noise(s, t)

    def finish(self, x: Linear, solver: str = "") -> Program:
        return self.inner.finish(x, solver)
