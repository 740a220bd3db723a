"""Levels found from the data instead of named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.schedules import EDM, VP, Flow, Node, TimeGrid, make_grid
from fewstep.tuning import table_of
from fewstep.tuning.spectrum import from_spectrum, gains, spectrum_error
from fewstep.tuning.table import run, unit

EIGENVALUES = np.geomspace(1.0, 1e-3, 12)


@pytest.mark.parametrize("noise_schedule", [VP.linear(), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_a_gaussian_run_is_one_factor_an_eigenvalue(noise_schedule):
    grid = make_grid(noise_schedule, 5, "arctan")
    solver, variance = "unipc:order=3", torch.from_numpy(EIGENVALUES)

    def denoised(z: torch.Tensor, node: Node) -> torch.Tensor:
        return node.alpha * variance / (node.alpha**2 * variance + node.sigma**2) * unit(node) * z

    start = torch.ones(12, dtype=torch.float64) / unit(grid[0])
    expected = run(table_of(solver, grid), grid, start, denoised)[0][-1] * unit(grid[-1])
    found, noise = gains(fs.compile(solver, grid), EIGENVALUES)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-12)
    assert not noise.any()


@pytest.mark.parametrize("noise_schedule", [VP.linear(), EDM()], ids=["vp", "edm"])
def test_levels_of_a_spectrum_beat_the_named_ones(noise_schedule):
    def error(grid: TimeGrid) -> float:
        return spectrum_error(fs.compile("dpmpp_2m", grid), grid, EIGENVALUES)

    found = TimeGrid.from_levels(noise_schedule, from_spectrum(noise_schedule, 5, EIGENVALUES.tolist()))
    named = ("arctan", "karras", "exponential", "arctan:scale=0.5", "kl_optimal")
    assert error(found) < 0.9 * min(error(make_grid(noise_schedule, 5, spacing)) for spacing in named)
