"""Runge-Kutta tableaus: orders from the order conditions, JSON files, refusals, and the methods that they are."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import solver_checks as checks

import fewstep as fs
from fewstep.samplers.runge_kutta import TABLEAUS, Known, density, tableau_of, trees

ORDERS = {"1euler": 1, "2heun": 2, "midpoint": 2, "ralston2": 2, "4rk": 4, "4rk38": 4, "5butcher": 5}
DORMAND_PRINCE = {
    "A": [
        "0 0 0 0 0 0",
        "1/5 0 0 0 0 0",
        "3/40 9/40 0 0 0 0",
        "44/45 -56/15 32/9 0 0 0",
        "19372/6561 -25360/2187 64448/6561 -212/729 0 0",
        "9017/3168 -355/33 46732/5247 49/176 -5103/18656 0",
    ],
    "b": "35/384 0 500/1113 125/192 -2187/6784 11/84",
    "c": "0 1/5 3/10 4/5 8/9 1",
}


def numbers(text: str) -> list[float]:
    return [float(Fraction(word)) for word in text.split()]


def heun() -> dict[str, Any]:
    return {"c": [0, 1], "A": [[0, 0], [1, 0]], "b": [0.5, 0.5]}


def written(folder: Path, data: Any) -> str:
    path = folder / "tableau.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(path)


def test_there_are_as_many_rooted_trees_as_there_should_be():
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    assert sorted(map(density, trees(4))) == [4, 8, 12, 24]


def test_orders_of_the_built_in_tableaus():
    assert tuple(TABLEAUS) == get_args(Known)
    for name, tableau in TABLEAUS.items():
        assert tableau.order == ORDERS.get(name, 3), name
        assert fs.solver(f"rk:tableau={name}").order == tableau.order
        assert fs.solver(f"rk:tableau={name}").evaluations_per_step == tableau.stages


@pytest.mark.parametrize("name", TABLEAUS)
def test_a_file_gives_the_same_as_the_built_in_tableau(name, tmp_path):
    tableau = TABLEAUS[name]
    path = written(tmp_path, {"c": tableau.c, "A": tableau.a, "b": tableau.b, "reference": "a test"})
    read = tableau_of(path)
    assert (read.c, read.a, read.b, read.order) == (tableau.c, tableau.a, tableau.b, tableau.order)
    grid = checks.ratio_grid(checks.SCHEDULES["flow"], 5)
    own, built_in = (fs.compile(f"rk:tableau={choice}", grid) for choice in (path, name))
    assert (own.ops, own.nodes, own.output) == (built_in.ops, built_in.nodes, built_in.output)
    assert fs.compile("rk", grid, tableau=path) is own


def test_the_order_of_a_file_is_derived(tmp_path):
    data = {k: numbers(v) if isinstance(v, str) else list(map(numbers, v)) for k, v in DORMAND_PRINCE.items()}
    solver = fs.solver(f"rk:tableau={written(tmp_path, {**data, 'order': 5})}")
    assert (solver.order, solver.evaluations_per_step) == (5, 6)
    # Heun's third-order weights turned from quarters to thirds: consistent, and nothing more
    (tmp_path / "other").mkdir()
    changed = {"c": [0, 1 / 3, 2 / 3], "A": [[0, 0, 0], [1 / 3, 0, 0], [0, 2 / 3, 0]], "b": [1 / 3, 0, 2 / 3]}
    solver = fs.solver(f"rk:tableau={written(tmp_path / 'other', changed)}")
    assert solver.order == 1
    observed = checks.slope(lambda grid: fs.compile(solver, grid), checks.SCHEDULES["edm"], False)
    assert abs(observed - 1) < 0.2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b": [0.5, 0.6]}, r"b must add up to 1, got 1\.1"),
        ({"c": [0, 0.9]}, r"row 1 of A must add up to c\[1\] = 0\.9, got 1"),
        ({"c": [0]}, "c and b must have as many numbers, one a stage; got 1 and 2"),
        ({"b": [], "c": []}, "c and b must have as many numbers"),
        ({"A": [[0, 0]]}, "A must have 2 rows, one a stage, got 1"),
        ({"A": "1"}, "A must have 2 rows, one a stage, got '1'"),
        ({"A": [[0, 0], [1]]}, "row 1 of A must have 2 numbers, got 1"),
        ({"A": [[0, 0], [0.5, 0.5]]}, "strictly lower triangular .* row 1"),
        ({"A": [[0, 0], [1.5, 0]], "c": [0, 1.5]}, r"c\[1\] must lie in \[0, 1\], .* got 1\.5"),
        ({"A": [[0, 0], ["1", 0]]}, "row 1 of A must be a list of finite numbers"),
        ({"b": [True, 0.0]}, "b must be a list of finite numbers"),
        ({"b": [float("nan"), 1.0]}, "b must be a list of finite numbers"),
        ({"order": 3}, "it has order 2 by the order conditions, not 3"),
        ({"weights": []}, "unknown key 'weights'; allowed: c, A, b, order, reference"),
        ({"refernce": ""}, "did you mean 'reference'"),
    ],
)
def test_a_wrong_file_is_refused_with_its_reason(change, words, tmp_path):
    path = written(tmp_path, heun() | change)
    for use in (lambda s: s.order, lambda s: fs.compile(s, checks.ratio_grid(checks.SCHEDULES["vp"], 3))):
        with pytest.raises(ValueError, match=words) as caught:
            use(fs.solver(f"rk:tableau={path}"))
        assert path in str(caught.value)


def test_what_is_not_a_tableau_at_all_is_refused(tmp_path):
    for text, words in (
        ("{", "is not JSON"),
        ("[1, 2]", 'an object with "c", "A" and "b"'),
        ('{"c": []}', '"A"'),
    ):
        with pytest.raises(ValueError, match=words):
            tableau_of(written(tmp_path, text))
    with pytest.raises(ValueError, match=r"nowhere\.json' cannot be read: No such file"):
        tableau_of(str(tmp_path / "nowhere.json"))
    with pytest.raises(
        ValueError, match="one of 1euler, .* or the path of a .json file, got '4kr'; did you mean '4rk'"
    ):
        tableau_of("4kr")


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("rk:tableau=1euler", "euler"),
        ("rk:tableau=2heun,frame=edm", "heun:frame=edm"),
        ("rk:tableau=2heun,frame=flow", "heun:frame=flow"),
        ("deis_rhork_2heun", "heun:frame=edm"),
    ],
)
@pytest.mark.parametrize("schedule", checks.SCHEDULES)
def test_what_it_reduces_to(spec, same, schedule):
    grid = checks.ratio_grid(checks.SCHEDULES[schedule], 6)
    one, other = (checks.solve(fs.compile(s, grid), grid) for s in (spec, same))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)
