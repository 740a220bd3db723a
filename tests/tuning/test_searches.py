"""Searches for levels: against brute force where that can be had, and what all of them promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fewstep.eval.targets import load_target
from fewstep.eval.tuning import source_of
from fewstep.schedules import TimeGrid, make_grid
from fewstep.tuning import SEARCHES, error, search, solve, table_of
from fewstep.tuning.candidates import candidates, shortest_path, student
from fewstep.tuning.gits import gits, jump_costs
from fewstep.tuning.grid_search import grid_search
from fewstep.tuning.optimal_steps import optimal_steps
from fewstep.tuning.table import run


@pytest.fixture(scope="module", params=["gmm", "gmm:noise=flow"])
def problem(request):
    source = source_of(load_target(f"builtin:{request.param}"))
    return source, solve(source, range(1000, 1032), 80), solve(source, range(32), 80)


@pytest.mark.parametrize("name", list(SEARCHES))
def test_a_search_gives_levels_better_than_the_named_ones(problem, name):
    """From the noisiest level to none, on samples it has not seen; the same when it is asked again."""
    source, truth, fresh = problem
    levels = search(name, source, truth, 4)
    assert len(levels) == 5 and levels[0] == source.top and levels[-1] == 0.0
    assert all(a > b for a, b in zip(levels, levels[1:]))
    named = [
        make_grid(source.noise_schedule, 4, s) for s in ("karras", "exponential", "linspace", "trailing")
    ]
    found = error(student("dpmpp_2m", levels, source), source, fresh)
    assert found < min(error(table_of("dpmpp_2m", grid), source, fresh) for grid in named)
    if name != "optimal_steps":  # the slowest; it draws nothing
        assert search(name, source, truth, 4) == levels


def test_the_path_is_the_cheapest_of_all():
    generator = np.random.default_rng(0)
    for growth in (0.8, 1.0, 1.3):
        cost = np.where(np.triu(np.ones((9, 9)), 1) > 0, generator.random((9, 9)), np.inf)
        for steps in (1, 2, 4, 8):
            paths = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), steps - 1)]
            values = [
                sum(growth**k * cost[a, b] for k, (a, b) in enumerate(itertools.pairwise(p))) for p in paths
            ]
            assert tuple(shortest_path(cost, steps, growth)) == paths[int(np.argmin(values))]
    with pytest.raises(ValueError, match="no path of 9 jumps over 9 levels"):
        shortest_path(cost, 9)


def test_a_jump_is_a_step_of_euler_from_the_converged_trajectory(problem):
    source, truth, _ = problem
    known = candidates(source, truth, 3, 12)
    cost = jump_costs(known)
    for i, j in ((0, 1), (0, 12), (3, 7), (11, 12)):
        grid = TimeGrid.from_levels(source.noise_schedule, known.levels[[i, j]])
        states, _ = run(table_of("ddim", grid), grid, known.states[i], lambda z, node: known.predictions[i])  # noqa: B023
        expected = (states[-1] - known.states[j]).flatten(1).square().mean(1).sqrt().mean()
        assert cost[i, j] == pytest.approx(float(expected), abs=1e-9)
    assert np.isinf(cost[np.tril_indices(len(cost))]).all()


def test_gits_without_a_growth_takes_the_best_of_several(problem):
    source, truth, _ = problem
    best = error(student("deis", gits(source, truth, 5, solver="deis"), source), source, truth)
    for growth in (0.8, 1.0, 1.2):
        levels = gits(source, truth, 5, growth=growth)
        assert best <= error(student("deis", levels, source), source, truth) + 1e-12


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_two_optimal_steps_are_the_best_of_all_pairs(problem, solver):
    """With one level between, the dynamic program is exact: also for a solver with history and one that corrects."""
    source, truth, _ = problem
    known = candidates(source, truth, 2, 12)
    choices = [(source.top, float(k), 0.0) for k in known.levels[1:-1]]
    best = min(choices, key=lambda levels: error(student(solver, levels, source), source, truth))
    assert optimal_steps(source, truth, 2, solver=solver, most=12) == pytest.approx(best)


def test_optimal_steps_follow_the_error_of_their_solver(problem):
    source, truth, _ = problem
    own, other = (optimal_steps(source, truth, 4, solver=s, most=16) for s in ("deis", "ddim"))
    assert error(student("deis", own, source), source, truth) <= error(
        student("deis", other, source), source, truth
    )


def test_the_grid_search_is_no_worse_than_its_grid(problem):
    source, truth, _ = problem
    found = error(
        student("unipc", grid_search(source, truth, 3, solver="unipc", runs=80), source), source, truth
    )
    angles = truth.angles[0] * (1 - np.arange(1, 9) / 9)
    for inner in itertools.combinations(angles, 2):
        levels = source.noise_schedule.level_at_ratio(np.tan(inner))
        assert found <= error(student("unipc", (source.top, *levels, 0.0), source), source, truth)


def test_the_grid_search_keeps_to_its_budget(problem):
    source, truth, _ = problem
    calls = []
    counted = type(source)(
        lambda indices: calls.append(len(indices)) or source.bind(indices),
        source.noise,
        source.noise_schedule,
    )
    found = []
    for seed in (1, 1, 2):
        calls.clear()
        found.append(grid_search(counted, truth, 7, runs=20, seed=seed))
        assert len(calls) == 20 * 7
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", list(SEARCHES))
@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_evaluations(problem, name, steps):
    source, truth, _ = problem
    levels = search(name, source, truth, steps)
    assert len(levels) == steps + 1 and levels[0] == source.top and levels[-1] == 0.0


def test_samples_may_have_any_shape_and_precision(problem):
    source, truth, _ = problem
    if source.noise_schedule.frame == "flow":
        pytest.skip("once is enough")
    images = source_of(load_target("builtin:digits-exact"))
    solved = solve(images, range(8), 24)
    assert solved.result.dtype == torch.float64
    for name in SEARCHES:
        assert len(search(name, images, solved, 3)) == 4


def test_input_errors(problem):
    source, truth, _ = problem
    with pytest.raises(ValueError, match="no search 'gitz'; allowed: .*did you mean 'gits'"):
        search("gitz", source, truth, 4)
    for nfe in (0, -1, 2.5, True):
        for name in ("gits", "optimal_steps", "grid_search", "ays"):
            with pytest.raises(ValueError, match=f"evaluations must be an integer >= 1, got {nfe}"):
                search(name, source, truth, nfe)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="100 levels cannot be chosen from 80"):
        search("gits", source, truth, 100)
    with pytest.raises(ValueError, match="growth must be positive, got -1"):
        gits(source, truth, 4, growth=-1.0)
    with pytest.raises(ValueError, match="runs must be at least 1, got 0"):
        grid_search(source, truth, 4, runs=0)
    for name in ("gits", "optimal_steps", "grid_search", "ays"):
        with pytest.raises(ValueError, match="not one deterministic evaluation a step"):
            search(name, source, truth, 4, "heun")
