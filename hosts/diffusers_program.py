"""Programs cut to what a pipeline can drive: it holds the state, and its first act is an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from ..samplers import Combine, Evaluate, Noise, Program
from ..samplers.program import Op, reads
from ..samplers.steps import ddim, renoise
from ..samplers.trace import Trace
from ..schedules import Node, TimeGrid
from ..schedules.parametrization import Prediction


def hosted(program: Program) -> Program:
    """The program from its first evaluation on.

    Noise before it (churn) brings the start state to a higher level; a pipeline starts at that level at once, which is
    the same distribution. Raises ValueError if the program needs the state before that noise later on.
    """
    at = next(i for i, op in enumerate(program.ops) if isinstance(op, Evaluate))
    if not at:
        return program
    first = program.ops[at]
    assert isinstance(first, Evaluate)
    before, rest = {0, *(op.dst for op in program.ops[:at])} - {first.src}, program.ops[at:]
    if any(before & set(reads(op)) for op in rest) or program.output in before:
        raise ValueError(
            f"solver {program.solver!r} changes the state before the first evaluation and goes back to it, which a "
            "pipeline cannot host; use fewstep.sample()"
        )
    ops = tuple(_renamed(op, {first.src: 0}) for op in rest)
    output = 0 if program.output == first.src else program.output
    return replace(program, ops=ops, output=output, start=first.node)


def first_order(nodes: Sequence[Node], grid: TimeGrid, prediction: Prediction) -> Program:
    """DDIM along the nodes: between equal ones nothing happens, and noise brings the state to a higher level."""
    trace = Trace(grid, prediction)
    x = trace.start
    for s, t in pairwise(nodes):
        x, m = trace.evaluate(x, s)
        if t.ratio > s.ratio:
            x = renoise(trace, x, s, t, (s, t))
        elif t != s:
            x = ddim(x, m, s, t)
    return trace.finish(x)


def chained(first: Program, second: Program | None) -> Program:
    """One program and then, from its result, another."""
    if second is None:
        return first
    shift, count = 1 + max(op.dst for op in first.ops), len(first.nodes)
    names = {op.dst: op.dst + shift for op in second.ops} | {0: first.output}
    ops = tuple(_renamed(op, names, count) for op in second.ops)
    return replace(
        second,
        nodes=first.nodes + second.nodes,
        ops=first.ops + ops,
        output=names[second.output],
        start=first.start,
    ).check()


def _renamed(op: Op, names: dict[int, int], nodes: int = 0) -> Op:
    """The operation with other register numbers, and node numbers moved up."""

    def name(register: int) -> int:
        return names.get(register, register)

    match op:
        case Combine(dst, terms):
            return Combine(name(dst), tuple((name(src), coef) for src, coef in terms))
        case Evaluate(dst, src, node):
            return Evaluate(name(dst), name(src), node + nodes)
        case Noise(dst, start, stop):
            return Noise(name(dst), start + nodes, stop + nodes)
