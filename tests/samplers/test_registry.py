from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import solver_checks as checks

import fewstep as fs
from fewstep.samplers import Solver, registry, steps_for
from fewstep.schedules import EDM, make_grid


def grid(steps: int):
    return make_grid(EDM(), steps, "karras")


def test_specs_are_canonical():
    assert fs.solver("unipc").spec == "unipc"
    assert fs.solver("unipc:order=2").spec == "unipc"  # the default
    assert fs.solver(" unipc: order = 3 , corrector=False ").spec == "unipc:order=3,corrector=false"
    s = fs.solver("unipc:disable_corrector=0/1/2,order=3")
    assert s.options["disable_corrector"] == (0, 1, 2)
    assert fs.solver(s.spec).options == s.options and fs.solver(s) is s and str(s) == s.spec


def test_every_alias_of_the_field_means_a_spec():
    aliases = {alias: spec for d in fs.solvers().values() for alias, spec in d.aliases.items()}
    assert {"uni_pc_bh2", "euler_a", "lms", "deis_tab3"} <= set(aliases)
    for alias, spec in aliases.items():
        assert fs.solver(alias).spec == fs.solver(spec).spec
        assert alias not in fs.solvers()
    assert fs.solver("uni_pc:order=1").all_options["variant"] == "bh1"  # options add to those of the alias


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("unipcc", "no solver 'unipcc'; allowed: .*ddim.*did you mean 'unipc'"),
        ("unipc:ordr=3", "solver 'unipc' has no option 'ordr'; allowed: order.*did you mean 'order'"),
        ("unipc:order=three", "option 'order' of solver 'unipc' must be an integer, got 'three'"),
        ("unipc:order=2.5", "must be an integer, got '2.5'"),
        ("unipc:variant=bh3", "one of bh1, bh2, vary, got 'bh3'; did you mean 'bh"),
        ("unipc:corrector=maybe", "true or false, got 'maybe'"),
        ("ddim:eta=-0.5", "option 'eta' of solver 'ddim' must be a number >= 0, got '-0.5'"),
        ("dpmpp_sde:r=0", "a number > 0 and <= 1, got '0'"),
        ("cps:eta=1.5", "a number >= 0 and <= 1, got '1.5'"),
        ("euler:churn=-1", "a number >= 0, got '-1'"),
        ("unipc:disable_corrector=a/b", "integers separated by '/'"),
        ("unipc:order", "not of the form key=value"),
        ("dpmpp_2m+heavy_bal:beta=0.8", "no transform 'heavy_bal'; allowed: .*did you mean 'heavy_ball'"),
        ("", "no solver ''"),
    ],
)
def test_a_wrong_spec_names_value_allowed_and_nearest(spec, words):
    with pytest.raises(ValueError, match=words):
        fs.solver(spec)


def test_a_solver_must_be_text_or_a_solver():
    with pytest.raises(TypeError, match="got int"):
        fs.solver(3)  # type: ignore[arg-type]
    assert isinstance(fs.solver("heun"), Solver)


@pytest.mark.parametrize("name", ["unipc", "deis"])
def test_orders_below_one_are_refused(name):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        fs.compile(f"{name}:order=0", grid(3))


def test_every_solver_is_documented():
    for name, d in fs.solvers().items():
        assert d.summary and d.reference.count("https://") == 1, name
        assert d.name == name and d.family and d.order >= 0
        for option in d.options:
            assert option in d.documentation, f"{name}: option {option} is not in the docstring"


def test_compile_is_cached_by_value():
    first = fs.compile("unipc", grid(6), order=3)
    assert fs.compile("unipc:order=3", grid(6)) is first
    assert fs.compile("unipc:order=3", grid(7)) is not first
    assert fs.compile("unipc:order=3", grid(6), prediction="epsilon") is not first
    with pytest.raises(ValueError, match="no option 'ordr'"):
        fs.compile("unipc", grid(6), ordr=3)


def test_steps_for_a_budget():
    assert steps_for("unipc", 6, grid) == 6
    assert steps_for("heun", 9, grid) == 5
    with pytest.raises(
        ValueError, match="'heun' cannot spend exactly 6 evaluations; nearest budgets: 5 and 7"
    ):
        steps_for("heun", 6, grid)
    with pytest.raises(ValueError, match="integer >= 1, got 0"):
        steps_for("heun", 0, grid)
    with pytest.raises(ValueError, match="at least 1"):
        steps_for("unipc:order=0", 4, grid)


@pytest.fixture
def documented_solver(monkeypatch):
    """The example of docs/adding-a-solver.md, registered for one test."""
    text = (Path(__file__).parents[2] / "docs" / "adding-a-solver.md").read_text(encoding="utf-8")
    module = types.ModuleType("outside_solvers")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = text.split("```python\n")[1].split("```")[0]
    exec(compile(source, "docs/adding-a-solver.md", "exec"), module.__dict__)
    yield "two_stage"
    monkeypatch.delitem(registry._SOLVERS, "two_stage")


@pytest.mark.parametrize("schedule", list(checks.SCHEDULES))
def test_the_documented_example_is_a_solver_like_any_other(documented_solver, schedule):
    """One function is all it takes: it is listed, parsed, has the order and the cost that it declares."""
    solver, noise_schedule = fs.solver(f"{documented_solver}:r=0.6"), checks.SCHEDULES[schedule]
    assert solver.spec in [fs.solver(s).spec for s in ("two_stage:r=0.6", "two_stage:r=.60")]
    assert fs.solvers()["two_stage"].summary and solver.declaration.family == "example"
    coarse = checks.ratio_grid(noise_schedule, 7)
    assert checks.exactness_error(fs.compile(solver, coarse), coarse) < 1e-12
    assert fs.compile(solver, coarse).nfe == 7 * solver.declaration.evaluations_per_step
    observed = checks.slope(lambda g: fs.compile(solver, g), noise_schedule, stochastic=False)
    assert abs(observed - solver.order) < 0.2


def test_solvers_of_other_packages_are_loaded_from_their_entry_points(monkeypatch):
    loaded = []

    class Point:
        def load(self) -> None:
            loaded.append(registry.ENTRY_POINTS)

    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Point()] if group == "fewstep.solvers" else []
    )
    registry._load_entry_points.cache_clear()
    fs.solvers()
    fs.solvers()
    assert loaded == ["fewstep.solvers"]  # once
    registry._load_entry_points.cache_clear()
