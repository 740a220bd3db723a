"""Tuning: tables, converged trajectories, fits and recipes, on the mixture whose denoiser is known."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.eval.cli import main
from fewstep.eval.models import load_model
from fewstep.eval.targets import load_target
from fewstep.eval.tuning import fit, source_of
from fewstep.hosts.k_diffusion import recipe_sampler
from fewstep.samplers import NumericalError
from fewstep.schedules import VP, conversion, make_grid
from fewstep.tuning import Family, Recipe, Source, error, gauss_newton, load, ridge, solve, table_of, tune
from fewstep.tuning.fit import predictor
from fewstep.tuning.grids import free_start, starting_grids
from fewstep.tuning.refine import attempt, fitted
from fewstep.tuning.table import run, unit

MODELS = ["gmm", "gmm:noise=edm", "gmm:noise=flow"]


def target(name: str = "gmm"):
    return load_target(f"builtin:{name}")


@pytest.fixture(scope="module", params=MODELS)
def problem(request):
    chosen = target(request.param)
    source = source_of(chosen)
    return chosen, source, solve(source, range(1000, 1024), 80), solve(source, range(16), 80)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return cast(Recipe, fit(target(), 5, trajectories=16, teacher_steps=60, schedules=["arctan"]))


@pytest.mark.parametrize(
    "solver", ["euler", "dpmpp_2m", "dpmpp_3m", "unipc:order=3", "deis", "ipndm", "exp_adams"]
)
def test_a_table_is_the_solver(problem, solver):
    """Also where a corrected state is not the one that is evaluated."""
    chosen, source, truth, _ = problem
    grid = make_grid(chosen.noise_schedule, 6, "arctan")
    table = table_of(solver, grid)
    states, _ = run(table, grid, truth.start, predictor(source, truth))
    x = truth.start * unit(grid[0])
    expected = fs.sample(chosen.denoiser(truth.indices), x, solver, sigmas=grid.level)
    torch.testing.assert_close(states[-1], expected, rtol=0, atol=1e-9)
    assert table_of(table.solver, grid).levels == table.levels
    again = fs.sample(chosen.denoiser(truth.indices), x, table.solver, sigmas=grid.level)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m_sde", "plms", "euler+skip:h2"])
def test_what_is_no_table_is_refused(solver):
    with pytest.raises(ValueError, match="is not one deterministic evaluation a step"):
        table_of(solver, make_grid(VP.linear(), 8, "karras"))


def test_trajectories_are_known_between_their_nodes(problem):
    chosen, source, truth, _ = problem
    fine = solve(source, truth.indices, 320)
    grid = make_grid(chosen.noise_schedule, 7, "karras:sigma_min=0.05,sigma_max=0.9")
    for node in list(grid)[:-1]:
        assert float((truth.at(node) - fine.at(node)).abs().max()) < 2e-3


def test_solved_trajectories_are_kept_and_a_broken_file_is_solved_again(tmp_path):
    source = source_of(target(), batch=4)
    calls = []
    first = solve(source, range(8), 40, cache=tmp_path, key="k", advance=calls.append)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and calls == [4, 4]
    files[0].write_bytes(b"cut off")
    broken = Source(
        lambda indices: cast(Any, _fails) if 0 not in indices else source.bind(indices),
        source.noise,
        source.noise_schedule,
        4,
    )
    second = solve(broken, range(8), 40, cache=tmp_path, key="k")
    torch.testing.assert_close(second.states, first.states, rtol=0, atol=0)


def _fails(x, node):
    raise AssertionError("a solved trajectory was solved again")


def test_the_closed_form_reaches_the_teacher_where_it_can(problem):
    """Less error than the nominal method, on samples it has not seen too."""
    chosen, source, truth, fresh = problem
    for steps in (1, 4, 8):
        nominal = table_of("dpmpp_2m", make_grid(chosen.noise_schedule, steps, "arctan"))
        fitted = ridge(nominal, source, truth, strength=1e-8)
        assert error(fitted, source, truth) < error(nominal, source, truth)
    assert error(fitted, source, fresh) < error(nominal, source, fresh)


def test_strong_regularisation_is_the_nominal_method(problem):
    chosen, source, truth, _ = problem
    nominal = table_of("dpmpp_2m", make_grid(chosen.noise_schedule, 5, "arctan"))
    fitted = ridge(nominal, source, truth, strength=1e9)
    for row, other in zip(fitted.rows, nominal.rows):
        np.testing.assert_allclose(row[: len(other)], other, atol=1e-6)


def family_of(source: Source, steps: int, memory: int) -> Family:
    grid = make_grid(source.noise_schedule, steps, "arctan")
    return Family("dpmpp_2m", grid, memory, free_start(source.noise_schedule))


def test_the_slopes_are_those_of_the_losses(problem):
    """Pushed states against a change of each parameter in turn."""
    _, source, truth, _ = problem
    family = family_of(source, 4, 3)
    start = family.start(ridge(table_of("dpmpp_2m", family.grid), source, truth), source, truth)
    found = fitted(family, attempt(family, start, source, truth), source, truth)
    for q in range(family.size):
        moved = start.copy()
        moved[q] -= 2e-4  # a first level cannot move up from the noisiest
        middle = start.copy()
        middle[q] -= 1e-4
        ends = [attempt(family, p, source, truth).losses for p in (start, middle, moved)]
        expected = (3 * ends[0] - 4 * ends[1] + ends[2]) / 2e-4 / 2
        scale = max(np.abs(expected).max(), 1e-3)
        assert np.median(np.abs(found.slopes[:, q] - expected)) < 0.02 * scale
    assert np.allclose(found.curvatures, found.curvatures.transpose(0, 2, 1))
    assert np.linalg.eigvalsh(found.curvatures).min() > -1e-9


def test_refinement_improves_what_it_is_given(problem):
    _, source, truth, fresh = problem
    family = family_of(source, 5, 4)
    before = ridge(table_of("dpmpp_2m", family.grid), source, truth)
    start = family.start(before, source, truth)
    assert error(family.table(start), source, truth) == pytest.approx(error(before, source, truth), rel=1e-9)
    at = fitted(family, attempt(family, start, source, truth), source, truth)
    refined = gauss_newton(family, at, source, truth, prior=1e-4)
    after = family.table(refined.run.parameters)
    assert refined.run.losses.mean() < 0.5 * at.run.losses.mean()
    assert error(after, source, fresh) < error(before, source, fresh)
    assert after.levels[0] <= source.top and after.levels[-1] == 0.0
    assert free_start(source.noise_schedule) or after.levels[0] == source.top


def test_tuning_beats_everything_fixed_and_repeats_itself(problem):
    chosen, source, truth, fresh = problem
    grids = starting_grids(source, truth, 6, ["arctan", "karras", "leading", "search:gits"])
    outcome = tune(source, 6, truth, grids=grids)
    assert outcome.kind == "fitted" and outcome.held_out < 0.8 * outcome.fixed
    assert error(outcome.table, source, fresh) < outcome.fixed
    assert tune(source, 6, truth, grids=grids).table == outcome.table


def test_a_fit_that_is_not_better_is_not_taken():
    """On one point every method is exact: the recipe is a fixed choice and says so."""
    model = load_model("builtin:gmm")
    point = torch.randn(model.shape, dtype=model.dtype)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return point.expand_as(x)

    source = Source(
        lambda i: fs.Denoiser(network, model.noise_schedule, "denoised"), model.noise, model.noise_schedule
    )
    truth = solve(source, range(8), 40)
    outcome = tune(source, 4, truth, grids=starting_grids(source, truth, 4, ["arctan", "karras"]))
    assert outcome.kind == "fixed" and outcome.held_out == outcome.fixed < 1e-9


def test_a_failing_model_is_told():
    model = load_model("builtin:gmm")
    bad = fs.Denoiser(lambda x, t: x * math.nan, model.noise_schedule, "denoised")
    source = Source(lambda i: bad, model.noise, model.noise_schedule)
    with pytest.raises(NumericalError, match="not finite"):
        solve(source, range(8), 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nfe": 0}, "--nfe must be at least 1, got 0"),
        (
            {"trajectories": 4},
            "--trajectories: 4 trajectories are too few for a fit; take at least 8, better 32",
        ),
        ({"nfe": 50}, "--teacher-steps must be at least four times the evaluations, 200, got 160"),
        ({"guidance": 2.0}, "has no unconditional network"),
        ({"method": "closed"}, "no method 'closed'.*did you mean 'closed-form'"),
        ({"schedules": ["karas"]}, "no schedule 'karas'.*did you mean 'karras'"),
        ({"schedules": ["search:git"]}, "no search 'git'.*did you mean 'gits'"),
        ({"method": "search", "budget": 0.0}, "--budget must be positive, got 0"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fit(target(), **({"nfe": 4} | options))


# recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_survives_its_file(recipe, tmp_path):
    path = tmp_path / "deep" / "recipe.json"
    recipe.save(path)
    again = load(path)
    assert again.table == recipe.table and again.to_dict() == recipe.to_dict()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "not a fewstep recipe of format 1: its format is 2"),
        ({"levels": [1.0, 0.5]}, "2 levels need 1 rows, got 5"),
        (
            {"rows": [[1.0]] * 5},
            "row 0 must have the weight of the state and of 1 to 1 predictions, got 1 numbers",
        ),
        ({"nfe": 4}, "a recipe for 4 evaluations has 5 rows"),
        ({"colour": 1}, "missing or unknown colour"),
    ],
)
def test_a_wrong_file_is_refused_by_name(recipe, tmp_path, change, words):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(recipe.to_dict() | change))
    with pytest.raises(ValueError, match=f"r.json.*{words}"):
        load(path)


def test_a_recipe_knows_its_noise_schedule_and_guidance(recipe):
    other = fs.Denoiser(lambda x, t: x, VP.cosine(), "epsilon")
    with pytest.raises(ValueError, match="on a vp noise schedule that is not the one of this model"):
        fs.sample(other, torch.zeros(1, 16), recipe=recipe)
    model = load_model("builtin:gmm")
    with pytest.raises(ValueError, match="leave those arguments out"):
        fs.sample(model.denoiser([0]), model.noise([0]), steps=6, recipe=recipe)
    with pytest.warns(UserWarning, match="fitted to other weights"):
        recipe.check(fingerprint="other")
    with pytest.warns(UserWarning, match="fitted with no guidance and is used with cfg:2"):
        recipe.check(guidance="cfg:2")


def test_the_same_numbers_everywhere(recipe):
    """In the library on the model's own frame, and as a sampler function in the frame x_0 + sigma eps."""
    model, indices = load_model("builtin:gmm"), range(6)
    noise, grid = model.noise(indices), recipe.grid(model.noise_schedule)
    ours = fs.sample(model.denoiser(indices), noise, recipe=recipe)
    denoiser, seen = model.denoiser(indices), []

    def k_model(y: torch.Tensor, sigma: torch.Tensor, scale: float) -> torch.Tensor:
        node = grid.at_ratio(float(sigma[0]))
        c_x, c_m = conversion(denoiser.prediction, "denoised", node)
        return scale * (c_x * node.alpha * y + c_m * denoiser(node.alpha * y, node))

    sigmas = torch.tensor([*np.geomspace(recipe.levels[0], 0.1, 4), 0.0])
    theirs = recipe_sampler(recipe)(
        k_model,
        noise * float(sigmas[0]),
        sigmas,
        {"scale": 1.0},
        lambda step: seen.append(step["i"]),
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)  # t passes through float32
    assert seen == list(range(5))
    with pytest.raises(ValueError, match="cannot start or end elsewhere"):
        recipe_sampler(recipe)(k_model, noise, torch.tensor([1.0, 0.0]))


def test_the_command_line_tunes(tmp_path, capsys):
    arguments = [
        "tune",
        "--model",
        "builtin:gmm",
        "--nfe",
        "4",
        "--trajectories",
        "12",
        "--teacher-steps",
        "40",
    ]
    out = tmp_path / "recipe.json"
    arguments += ["--schedule", "arctan", "--schedule", "search:gits"]
    assert main([*arguments, "--method", "closed-form", "--test", "8", "-o", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed == json.loads(out.read_text()) and printed["errors"]["held_out"] < printed["errors"]["fixed"]
    )
    assert len(list((tmp_path / ".fewstep-trajectories").iterdir())) == 2
    assert main([*arguments, "--nfe", "0", "-o", str(out)]) == 2
    assert "--nfe must be at least 1" in capsys.readouterr().err
