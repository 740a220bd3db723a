from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import solver_checks as checks

import fewstep as fs
from fewstep.samplers import Combine, Evaluate, Linear, Noise, Program, Trace, combination
from fewstep.schedules import VP, Node, make_grid

GRID = make_grid(VP.linear(), 4, "karras")


def program(spec: str = "dpmpp_2m") -> Program:
    return fs.compile(spec, GRID)


def test_properties_are_derived():
    p = program()
    assert p.nfe == 4 and not p.stochastic and p.solver == "dpmpp_2m"
    assert [n.t for n in p.evaluations] == list(GRID.t[:4])
    assert p.history == 1 and p.memory == 3
    assert program("ddim:eta=1").stochastic


def test_lifetimes_and_releases_agree():
    p = program("unipc:order=3")
    alive = {0}
    for i, op in enumerate(p.ops):
        for register in getattr(op, "terms", ()):
            assert register[0] in alive
        alive.add(op.dst)
        alive -= set(p.releases[i])
    assert alive == {p.output}


NODES = (Node(1.0, 0.6, 0.8), Node(0.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("ops", "output", "words"),
    [
        ((Combine(1, ((5, 1.0),)),), 1, "reads register 5 before it is written"),
        ((Evaluate(1, 0, 0), Combine(1, ((0, 1.0),))), 1, "writes register 1 twice"),
        ((Combine(1, ()),), 1, "combines nothing"),
        ((Combine(1, ((0, float("nan")),)),), 1, "not finite"),
        ((Evaluate(1, 0, 7),), 1, "names node 7 of 2"),
        ((Evaluate(1, 0, 1),), 1, "without noise"),
        ((Noise(1, 0, 9),), 1, "names nodes 0, 9 of 2"),
        ((), 3, "output register 3 is never written"),
    ],
)
def test_check_names_the_operation_and_the_reason(ops, output, words):
    with pytest.raises(ValueError, match=words):
        Program(NODES, ops, output).check()


def test_json_is_exact_and_checked():
    p = program("unipc:order=3")
    assert Program.from_json(p.to_json()) == p
    data = json.loads(p.to_json())
    with pytest.raises(ValueError, match="format 99"):
        Program.from_json(json.dumps(data | {"format": 99}))
    with pytest.raises(ValueError, match="not a fewstep program"):
        Program.from_json('{"format": 1}')
    with pytest.raises(ValueError, match="unknown operation"):
        Program.from_json(json.dumps(data | {"ops": [["divide", 1, 2]]}))


def test_describe_shows_every_operation():
    p = program("ddim:eta=1")
    assert len(p.describe().splitlines()) == len(p.ops) + 2
    assert "noise(" in p.describe()


def test_is_frozen_cheap_to_copy_and_picklable():
    p = program()
    assert copy.deepcopy(p) is p
    assert pickle.loads(pickle.dumps(p)) == p


def test_unroll_reproduces_a_run():
    p = program("dpmpp_2m")
    states, result = p.unroll()
    assert len(states) == p.nfe and states[0] == {0: 1.0}
    assert sum(result.values()) == pytest.approx(1.0)  # at sigma = 0 the result is the last prediction


def test_linear_algebra_of_symbols():
    a, b = Linear({0: 1.0}), Linear({1: 2.0})
    assert (2 * a - b / 4 + a).terms == {0: 3.0, 1: -0.5}
    assert combination((2.0, a), (-1.0, b)).terms == {0: 2.0, 1: -2.0}


def test_trace_drops_what_nothing_reads_and_keeps_registers():
    trace = Trace(GRID)
    x, m = trace.evaluate(trace.start, GRID[0])
    assert trace.keep(x).terms == {0: 1.0}  # already a register
    _ = m.epsilon  # asked for and not used
    p = trace.finish(0.5 * x + m.denoised)
    assert [type(op) for op in p.ops] == [Evaluate, Combine]


def test_conversions_fold_into_coefficients():
    """An epsilon method on an epsilon network needs no conversion at all."""
    p = fs.compile("deis:order=2", checks.ratio_grid(VP.linear(), 4), prediction="epsilon")
    assert sum(isinstance(op, Combine) for op in p.ops) == 4
    q = replace(p, solver="other")
    assert q != p
