"""The combinations of a program between two evaluations as one pass over memory.

Between two evaluations everything is linear, so each value that is still needed afterwards is one sum over the values
that were there before: one kernel can read every input once and write every output once. Where there is no such kernel,
the same sums are written with as few tensor operators as possible.

A value that only the program itself sees may be kept at any scale. It is kept at the one that makes the largest of its
coefficients 1: that spares a multiplication where it is written, and a pure multiple of another value costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .program import Evaluate, Noise, Program

Form = dict[int, float]
"""A sum over registers: register -> coefficient."""


@dataclass(frozen=True)
class Sum:
    """``dst = first + sum coef * src``, or ``factor * first + sum coef * src`` where factor is not None."""

    dst: int
    first: int
    factor: float | None
    terms: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Pass:
    """From one evaluation to the next: noises are drawn, then every output is written, then ``evaluate`` is due.

    ``outputs[i] = sum_j rows[i][j] * inputs[j]``, all registers; ``sums`` are the same values one by one, where a later
    sum may read an earlier one. ``aliases`` are pairs of registers that hold one tensor. ``releases`` are the
    registers that nothing reads any more, ``evaluate`` is None at the end.
    """

    draws: tuple[Noise, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]
    sums: tuple[Sum, ...]
    aliases: tuple[tuple[int, int], ...]
    releases: tuple[int, ...]
    evaluate: Evaluate | None

    @property
    def lone_draw(self) -> bool:
        """Whether the one noise drawn is used in this pass only, so that a kernel may compute it on the way."""
        if len(self.draws) != 1 or self.draws[0].dst not in self.releases:
            return False
        return all(src != self.draws[0].dst for _, src in self.aliases)


def passes(program: Program) -> tuple[Pass, ...]:
    """The pass before the first evaluation and the one after each."""
    from .program import Combine, Evaluate, Noise

    life, ops = program.lifetimes, program.ops
    seen = {op.src for op in ops if isinstance(op, Evaluate)} | {program.output}
    scales: dict[int, float] = {}  # register -> what it is kept at; 1 where nothing is said
    alive = {0}
    result: list[Pass] = []
    draws: list[Noise] = []
    forms: dict[int, Form] = {}
    for i, op in enumerate((*ops, None)):
        if isinstance(op, Combine):
            form: Form = {}
            for src, coef in op.terms:
                for base, c in forms.get(src, {src: 1.0 / scales.get(src, 1.0)}).items():
                    form[base] = form.get(base, 0.0) + coef * c
            forms[op.dst] = form
        elif isinstance(op, Noise):
            draws.append(op)
            alive.add(op.dst)
        else:
            needed = {r: f for r, f in forms.items() if life[r][1] >= i}
            sums, aliases = _written(needed, seen, scales)
            rows = {s.dst: needed[s.dst] for s in sums}
            inputs = tuple(dict.fromkeys(r for form in rows.values() for r in form))
            after = alive | set(needed)
            releases = tuple(r for r in sorted(after) if life[r][1] < i)
            result.append(
                Pass(
                    tuple(draws),
                    inputs,
                    tuple(rows),
                    tuple(tuple(form.get(r, 0.0) for r in inputs) for form in rows.values()),
                    sums,
                    aliases,
                    releases,
                    op,
                )
            )
            alive = after - set(releases)
            draws, forms = [], {}
            if op is not None:
                # The state that was evaluated stays until the pass after, where the prediction comes in.
                alive.add(op.dst)
    return tuple(result)


def _written(
    needed: dict[int, Form], seen: set[int], scales: dict[int, float]
) -> tuple[tuple[Sum, ...], tuple[tuple[int, int], ...]]:
    """The sums for the values that are needed; scales them in place where nobody sees it."""
    sums: list[Sum] = []
    aliases: list[tuple[int, int]] = []
    done: dict[int, Form] = {}
    for register, form in needed.items():
        free = register not in seen
        form = {r: c for r, c in form.items() if c != 0.0} or dict.fromkeys(list(form)[:1], 0.0)
        best = min([form, *_through(form, done)], key=lambda terms: _operators(terms, free))
        if free and (scale := max(best.values(), key=abs)) != 0.0:
            scales[register] = 1.0 / scale
            best, form = ({r: c / scale for r, c in terms.items()} for terms in (best, form))
        needed[register] = form
        unit = next((r for r, c in best.items() if c == 1.0), None)
        if len(best) == 1 and unit is not None:
            aliases.append((register, unit))
            continue
        done[register] = form
        first = next(iter(best)) if unit is None else unit
        rest = tuple((r, c) for r, c in best.items() if r != first)
        sums.append(Sum(register, first, best[first] if unit is None else None, rest))
    return tuple(sums), tuple(aliases)


def _through(form: Form, done: Mapping[int, Form]) -> list[Form]:
    """The sum with an earlier one in the place of some of its terms."""
    found = []
    for register, other in done.items():
        for pivot, divisor in other.items():
            if pivot not in form or divisor == 0.0:
                continue
            factor = form[pivot] / divisor
            terms = dict(form)
            for r, c in other.items():
                before = terms.get(r, 0.0)
                terms[r] = before - factor * c
                if r == pivot or abs(terms[r]) <= 1e-15 * abs(before):
                    del terms[r]
            found.append({register: factor, **terms})
    return found


def _operators(terms: Form, free: bool) -> int:
    """Tensor operators that a sum takes."""
    return len(terms) - (free or 1.0 in terms.values())
