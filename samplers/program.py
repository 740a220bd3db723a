"""A sampling run as data: three linear operations over named registers, cut at the network evaluations.

====================================  ==========================================================================
``Combine(dst, ((src, coef), ...))``  ``dst = sum coef * src``
``Evaluate(dst, src, node)``          one prediction of the network at one time
``Noise(dst, start, stop)``           a standard normal that belongs to the interval between two nodes
====================================  ==========================================================================

Everything known from the time grid is in the program; everything that depends on data is in the predictor. Register
0 is the start state, every other register is written once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from ..schedules import PREDICTIONS, Node
from ..schedules.parametrization import Prediction
from .passes import Pass, passes

FORMAT = 1
"""Version of the JSON form."""


@dataclass(frozen=True)
class Combine:
    """``dst = sum coef * src``."""

    dst: int
    terms: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Evaluate:
    """``dst`` = the prediction for the state ``src`` at ``nodes[node]``."""

    dst: int
    src: int
    node: int


@dataclass(frozen=True)
class Noise:
    """``dst`` ~ N(0, I), keyed by the interval ``nodes[start]`` -> ``nodes[stop]``; the noise source decides how."""

    dst: int
    start: int
    stop: int


Op = Combine | Evaluate | Noise


@dataclass(frozen=True)
class Program:
    """A compiled solver: every scalar of a run, in float64.

    ``nodes`` are the times in use, ``ops`` the operations, ``output`` the register of the result, ``start`` the node
    of the start state. ``prediction`` is what ``Evaluate`` yields (``"epsilon"``, ``"denoised"``, ``"v"``,
    ``"flow"``); conversions are ordinary combinations. ``solver`` is the spec it was compiled from.
    """

    nodes: tuple[Node, ...]
    ops: tuple[Op, ...]
    output: int
    prediction: Prediction = "denoised"
    solver: str = ""
    start: int = 0

    # -- what it costs ---------------------------------------------------------------------------------------------

    @cached_property
    def nfe(self) -> int:
        """Number of network evaluations per sample (each counts once; guidance is the predictor's business)."""
        return sum(isinstance(op, Evaluate) for op in self.ops)

    @cached_property
    def evaluations(self) -> tuple[Node, ...]:
        """The node of every evaluation, in order: what a pipeline calls its timesteps."""
        return tuple(self.nodes[op.node] for op in self.ops if isinstance(op, Evaluate))

    @cached_property
    def stochastic(self) -> bool:
        """Whether any noise is drawn."""
        return any(isinstance(op, Noise) for op in self.ops)

    @cached_property
    def lifetimes(self) -> Mapping[int, tuple[int, int]]:
        """Register -> (index of the operation that writes it, index of the last that reads it); -1 for the start."""
        life = {0: (-1, -1)}
        for i, op in enumerate(self.ops):
            for src in reads(op):
                life[src] = (life[src][0], i)
            life[op.dst] = (i, i)
        life[self.output] = (life[self.output][0], len(self.ops))
        return life

    @cached_property
    def releases(self) -> tuple[tuple[int, ...], ...]:
        """For every operation the registers that nothing reads after it."""
        dead: list[list[int]] = [[] for _ in self.ops]
        for register, (_, last) in self.lifetimes.items():
            if 0 <= last < len(self.ops):
                dead[last].append(register)
        return tuple(map(tuple, dead))

    @cached_property
    def memory(self) -> int:
        """The most registers alive at once, each of the size of the state."""
        return max(
            (sum(a < i <= b for a, b in self.lifetimes.values()) for i in range(len(self.ops) + 1)), default=1
        )

    @cached_property
    def history(self) -> int:
        """The most registers kept across an evaluation, besides the state that is evaluated."""
        live = (
            sum(a < i < b for r, (a, b) in self.lifetimes.items() if r != op.src)
            for i, op in enumerate(self.ops)
            if isinstance(op, Evaluate)
        )
        return max(live, default=0)

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """What is computed before the first evaluation and after each, as it is executed."""
        return passes(self)

    def __deepcopy__(self, memo: object) -> Program:
        return self  # frozen

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # not what follows from them

    # -- checks ----------------------------------------------------------------------------------------------------

    def check(self) -> Program:
        """Verify the program and return it; ValueError names the first operation that is wrong and why."""

        def fail(i: int, op: object, why: str) -> None:
            raise ValueError(f"program of {self.solver or 'unnamed solver'}: operation {i} ({op}): {why}")

        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        written, n = {0}, len(self.nodes)
        for i, op in enumerate(self.ops):
            for src in reads(op):
                if src not in written:
                    fail(i, op, f"reads register {src} before it is written")
            if op.dst in written:
                fail(i, op, f"writes register {op.dst} twice")
            written.add(op.dst)
            match op:
                case Combine(terms=terms):
                    if not terms:
                        fail(i, op, "combines nothing")
                    if not all(math.isfinite(c) for _, c in terms):
                        fail(i, op, "has a coefficient that is not finite")
                case Evaluate(node=node):
                    if not 0 <= node < n:
                        fail(i, op, f"names node {node} of {n}")
                    if self.nodes[node].sigma == 0.0:
                        fail(i, op, "evaluates the network without noise (sigma = 0)")
                case Noise(start=start, stop=stop):
                    if not (0 <= start < n and 0 <= stop < n):
                        fail(i, op, f"names nodes {start}, {stop} of {n}")
        if self.output not in written:
            raise ValueError(
                f"program of {self.solver or 'unnamed solver'}: output register {self.output} is never written"
            )
        return self

    # -- views -----------------------------------------------------------------------------------------------------

    def unroll(self) -> tuple[list[dict[int, float]], dict[int, float]]:
        """The evaluated states and the result as explicit sums over the start state, predictions and noises.

        Every dictionary maps a source register (0 = start state, the ``dst`` of an ``Evaluate`` or ``Noise``) to its
        coefficient. Returns (one dictionary per evaluation, that of the result).
        """
        forms: dict[int, dict[int, float]] = {0: {0: 1.0}}
        states = []
        for op in self.ops:
            if isinstance(op, Combine):
                form: dict[int, float] = {}
                for src, coef in op.terms:
                    for source, c in forms[src].items():
                        form[source] = form.get(source, 0.0) + coef * c
                forms[op.dst] = form
            else:
                forms[op.dst] = {op.dst: 1.0}
                if isinstance(op, Evaluate):
                    states.append(forms[op.src])
        return states, forms[self.output]

    def describe(self) -> str:
        """The program in words, one operation a line."""
        names = {0: "x"}
        lines = [
            f"{self.solver or 'program'}: {self.nfe} evaluations, {len(self.ops)} operations, "
            f"{self.memory} registers at most, {self.history} kept across an evaluation"
        ]
        for op in self.ops:
            names[op.dst] = f"r{op.dst}"
            match op:
                case Combine(dst, terms):
                    text = f"{names[dst]} = " + " ".join(f"{c:+.6g} {names[s]}" for s, c in terms)
                case Evaluate(dst, src, node):
                    at = self.nodes[node]
                    text = f"{names[dst]} = {self.prediction}({names[src]}, t={at.t:.6g})"
                    text += f"    alpha={at.alpha:.4g} sigma={at.sigma:.4g}"
                case Noise(dst, start, stop):
                    text = f"{names[dst]} = noise(t={self.nodes[start].t:.6g} -> {self.nodes[stop].t:.6g})"
            lines.append("  " + text)
        lines.append(f"  return {names[self.output]}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The program as JSON; floats are exact."""
        kinds = {Combine: "combine", Evaluate: "evaluate", Noise: "noise"}
        return json.dumps(
            {
                "format": FORMAT,
                "solver": self.solver,
                "prediction": self.prediction,
                "start": self.start,
                "output": self.output,
                "nodes": [list(n) for n in self.nodes],
                "ops": [[kinds[type(op)], *_fields(op)] for op in self.ops],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Program:
        """The program that :meth:`to_json` wrote, checked; ValueError if it is not one."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r} is not supported, only {FORMAT}")
            return cls(
                nodes=tuple(Node(*map(float, n)) for n in data["nodes"]),
                ops=tuple(_op(*op) for op in data["ops"]),
                output=data["output"],
                prediction=data["prediction"],
                solver=data["solver"],
                start=data["start"],
            ).check()
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a fewstep program: {error}") from None


def reads(op: Op) -> tuple[int, ...]:
    """The registers an operation reads."""
    if isinstance(op, Combine):
        return tuple([src for src, _ in op.terms])
    return (op.src,) if isinstance(op, Evaluate) else ()


def _fields(op: Op) -> list[Any]:
    match op:
        case Combine(dst, terms):
            return [dst, [list(term) for term in terms]]
        case Evaluate(dst, src, node):
            return [dst, src, node]
        case Noise(dst, start, stop):
            return [dst, start, stop]


def _op(kind: str, *fields: Any) -> Op:
    match kind, fields:
        case "combine", (dst, terms):
            return Combine(dst, tuple((int(s), float(c)) for s, c in terms))
        case "evaluate", (dst, src, node):
            return Evaluate(dst, src, node)
        case "noise", (dst, start, stop):
            return Noise(dst, start, stop)
    raise ValueError(f"unknown operation {kind!r}")
