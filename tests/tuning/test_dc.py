"""DC-Solver's searches: the published ratios are found, and the polynomial predicts those of other cells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import golden_runs
import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.eval.cli import main
from fewstep.eval.eval_model import initial_noise
from fewstep.eval.formulas import MixtureDenoiser
from fewstep.eval.targets import load_target
from fewstep.eval.tuning import source_of
from fewstep.guidance import Predictor, parse
from fewstep.samplers.compensation import CASCADES, cascade_ratios
from fewstep.schedules import Node, make_grid
from fewstep.tuning import Source, Trajectories, error, fit_cascade, search_ratios, solve, table_of
from fewstep.tuning.dc import spec_of
from fewstep.tuning.table import angle


def published(case) -> tuple[Source, Trajectories, fs.schedules.TimeGrid]:
    """The problem of a golden search: the exact model, and the reference's trajectory where it looks it up."""
    meta = case.meta
    run = golden_runs.find(case)
    assert run is not None
    grid = run.grid

    class Exact:
        prediction = "epsilon"

        def __call__(self, x: torch.Tensor, node: Node) -> torch.Tensor:
            return torch.from_numpy(case.mixture.epsilon(x.numpy(), node.alpha, node.sigma))

    times = np.asarray(case["gt_ts"])
    targets = np.linspace(meta["t_start"], meta["t_end"], meta["n"] + 1)[1:]
    after = [
        int(np.flatnonzero(times > t + 1e-9)[-1]) for t in targets
    ]  # a time that is the target's is not above it
    states = torch.from_numpy(np.stack([case["x_init"], *case["gt_xs"][after].astype(np.float64)]))
    nodes = np.array([angle(node) for node in grid])
    unit_noise = torch.from_numpy(case["x_init"])
    truth = Trajectories(tuple(range(8)), unit_noise, nodes, states, torch.zeros_like(states), states[-1])
    return (
        Source(lambda indices: cast(Any, Exact()), lambda indices: unit_noise, grid.noise_schedule),
        truth,
        grid,
    )


def test_the_published_search_finds_its_ratios(golden):
    for name in golden.names("dc"):
        case = golden.case(name)
        if "gt_xs" not in case:
            continue
        source, truth, grid = published(case)
        solver, order = (
            f"unipc:order={case.meta['order']},variant={case.meta['variant']}",
            case.meta["dc_order"],
        )
        found = search_ratios(source, truth, grid, solver=solver, order=order)
        np.testing.assert_allclose(found, case["dc_ratios"], rtol=0, atol=case.tol)


def guided_mixture(scale: float) -> Source:
    """Four Gaussians in 16 dimensions under guidance; sample i is of mode i mod 4."""
    schedule = fs.schedules.VP.linear()
    mode, place = (
        torch.arange(1.0, 5.0, dtype=torch.float64)[:, None],
        torch.arange(16.0, dtype=torch.float64),
    )
    means = 0.6 * torch.cos(2.4 * mode * (place + 0.5))
    variances = (0.4 + 0.2 * torch.cos(1.7 * mode + place)).square()
    every = MixtureDenoiser(torch.full((4,), 0.25, dtype=torch.float64), means, variances, schedule)

    def bind(indices: Sequence[int]) -> Predictor:
        modes = torch.tensor(list(indices)) % 4
        mean, variance = means[modes], variances[modes]

        def one(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            alpha, sigma = (float(v) for v in schedule.alpha_sigma_at(schedule.level(float(t[0]))))
            return mean + alpha * variance * (x - alpha * mean) / (alpha**2 * variance + sigma**2)

        return parse(scale).bind(fs.Denoiser(one, schedule, "denoised", unconditional=every))

    return Source(bind, lambda indices: initial_noise(indices, (16,)).double(), schedule)


def test_compensation_is_nearer_than_unipc_under_guidance():
    """The published direction, on fresh noise."""
    source = guided_mixture(3.0)
    truth, fresh = solve(source, range(1000, 1010), 60), solve(source, range(64), 80)
    for nfe in (5, 6, 8, 10):
        grid = make_grid(source.noise_schedule, nfe, "arctan")
        ratios = search_ratios(source, truth, grid, iterations=12)
        assert ratios[:2] == (1.0, 1.0) and 1.0 not in ratios[2:]
        found, unipc = (error(table_of(s, grid), source, fresh) for s in (spec_of(ratios), "unipc:order=3"))
        assert found < unipc


def test_a_solver_that_cannot_be_compensated_is_refused():
    source = source_of(load_target("builtin:gmm"))
    truth = solve(source, range(8), 20)
    grid = make_grid(source.noise_schedule, 4, "karras")
    with pytest.raises(ValueError, match="needs one evaluation a step"):
        search_ratios(source, truth, grid, solver="heun")


@pytest.mark.parametrize("scale", [2.0, 7.5])
@pytest.mark.parametrize("nfe", [6, 9])
def test_the_polynomial_predicts_cells_that_it_has_not_seen(nfe, scale):
    """Of ratios that follow the published polynomial exactly, it is found again."""
    cells = [(n, w) for n in (5, 7, 8, 10, 12) for w in (1.5, 3.0, 5.0, 10.0) if (n, w) != (nfe, scale)]
    published_ratios = {(n, w): cascade_ratios(CASCADES["sd21"], w, n) for n, w in cells}
    coefficients = fit_cascade(published_ratios)
    expected = cascade_ratios(CASCADES["sd21"], scale, nfe)
    np.testing.assert_allclose(cascade_ratios(coefficients, scale, nfe), expected, rtol=0, atol=1e-6)


def test_the_polynomial_predicts_ratios_that_no_search_has_seen():
    """From our own searches to other evaluations and scales, there nearer than UniPC on fresh noise."""
    found = {}
    for scale in (2.0, 3.0, 4.5):
        source = guided_mixture(scale)
        truth = solve(source, range(1000, 1010), 60)
        for nfe in (6, 8, 10):
            grid = make_grid(source.noise_schedule, nfe, "arctan")
            found[nfe, scale] = search_ratios(source, truth, grid, iterations=12)
    coefficients = fit_cascade(found)
    for nfe, scale in ((7, 2.5), (7, 4.0), (9, 2.5), (9, 4.0)):
        source = guided_mixture(scale)
        fresh, grid = solve(source, range(64), 80), make_grid(source.noise_schedule, nfe, "arctan")
        predicted = table_of(spec_of(cascade_ratios(coefficients, scale, nfe)), grid)
        assert error(predicted, source, fresh) < 0.8 * error(table_of("unipc:order=3", grid), source, fresh)


def test_a_fitted_polynomial_runs_from_its_file(tmp_path):
    ratios = {(n, w): cascade_ratios(CASCADES["sd21"], w, n) for n in (6, 7, 9) for w in (2.0, 4.0, 7.0)}
    path = tmp_path / "cascade.json"
    path.write_text(json.dumps({"cascade": fit_cascade(ratios)}))
    grid = make_grid(fs.schedules.VP.linear(), 8, "karras")
    fitted = table_of(f"unipc:order=3+dc:cascade={path},guidance=5", grid)
    published = table_of("unipc:order=3+dc:cascade=sd21,guidance=5", grid)
    for row, other in zip(fitted.rows, published.rows):
        np.testing.assert_allclose(row, other, atol=1e-6)


def test_the_command_fits_a_polynomial(tmp_path, capsys):
    """All cells on one spacing, and the file runs."""
    model, out = "builtin:digits-exact:conditional=true", tmp_path / "cascade.json"
    command = [
        "tune",
        "--model",
        model,
        "--nfe",
        "3,4",
        "--method",
        "dc",
        "--guidance",
        "2,4",
        "-o",
        str(out),
    ]
    assert main([*command, "--trajectories", "8", "--teacher-steps", "16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(c["nfe"], c["guidance"]) for c in printed["cells"]] == [(3, 2.0), (4, 2.0), (3, 4.0), (4, 4.0)]
    assert all(
        len(c["ratios"]) == c["nfe"] and c["errors"].keys() == {"held_out", "fixed"} for c in printed["cells"]
    )
    assert printed["schedule"] == "arctan" and printed == json.loads(out.read_text())
    table_of(f"unipc:order=3+dc:cascade={out},guidance=3", make_grid(fs.schedules.VP.linear(), 4, "arctan"))
    for more, words in (
        (["--schedule", "karras", "--schedule", "arctan"], "go with one --schedule"),
        (["--guidance", "apg:3"], "needs numbers, got --guidance 'apg:3'"),
    ):
        assert main([*command, *more]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("ratios", "words"),
    [({(5, 2.0): (1.0, 1.0)}, "2 ratios for 5 evaluations"), ({(2, 2.0): (1.0, 1.0)}, "no free ratio")],
)
def test_ratios_that_say_nothing_are_refused(ratios, words):
    with pytest.raises(ValueError, match=words):
        fit_cascade(ratios)
