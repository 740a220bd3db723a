"""Levels from a spectrum, for any solver, and where a spectrum comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from solver_checks import gaussian_variance

import fewstep as fs
from fewstep.schedules import EDM, VP, Flow, TimeGrid, make_grid
from fewstep.tuning import from_spectrum, power_law, spectrum_error, spectrum_of
from fewstep.tuning.spectrum import gains

EIGENVALUES = np.geomspace(1.0, 1e-3, 12)


@pytest.mark.parametrize(
    "solver", ["heun", "dpmpp_2m_sde", "seeds_2", "euler+skip:h2/s2", "ddim:eta=1", "unipc"]
)
@pytest.mark.parametrize("noise_schedule", [VP.linear(), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_a_program_is_one_factor_and_one_variance_an_eigenvalue(solver, noise_schedule):
    """Whatever the network predicts; against the variance that the solver checks compute."""
    grid = make_grid(noise_schedule, 7, "karras:sigma_min=0.05,sigma_max=0.9")
    for square in (0.04, 0.5):
        for prediction in ("denoised", "v", "epsilon", "flow"):
            program = fs.compile(solver, grid, prediction=prediction)
            factor, noise = gains(program, [square])
            start = grid[0].alpha ** 2 * square + grid[0].sigma ** 2
            end = grid[-1].alpha ** 2 * square + grid[-1].sigma ** 2
            expected = gaussian_variance(fs.compile(solver, grid), grid, square)
            assert (factor[0] ** 2 * start + noise[0]) / end == pytest.approx(expected, rel=1e-9)
            assert (noise[0] > 0) == program.stochastic


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "dpmpp_2m_sde", "unipc:order=3+heavy_ball"])
def test_the_levels_are_the_best_that_there_are(solver):
    """Two steps have one level to choose: no other is better."""
    noise_schedule = VP.linear()

    def value(level: float) -> float:
        grid = TimeGrid.from_levels(noise_schedule, [noise_schedule.level_max, level, 0.0])
        return spectrum_error(fs.compile(solver, grid), grid, EIGENVALUES)

    found = from_spectrum(noise_schedule, 2, EIGENVALUES, solver=solver)
    assert value(found[1]) <= min(map(value, np.geomspace(0.01, 50.0, 100))) * (1 + 1e-4)


@pytest.mark.parametrize(
    ("noise_schedule", "solver"),
    [
        (VP.linear(), "dpmpp_2m"),
        (EDM(), "heun"),
        (Flow(), "unipc"),
        (VP.scaled_linear(zero_terminal_snr=True), "unipc"),
    ],
    ids=["vp", "edm", "flow", "zero_snr"],
)
def test_levels_of_a_spectrum_beat_the_named_ones(noise_schedule, solver):
    levels = from_spectrum(noise_schedule, 5, EIGENVALUES, solver=solver)
    assert levels[0] == noise_schedule.level_max and levels[-1] == 0.0 and np.all(np.diff(levels) < 0)

    def value(grid: TimeGrid) -> float:
        return spectrum_error(fs.compile(solver, grid), grid, EIGENVALUES)

    named = [
        make_grid(noise_schedule, 5, s) for s in ("arctan", "karras", "exponential", "linspace", "kl_optimal")
    ]
    assert value(TimeGrid.from_levels(noise_schedule, levels)) < 0.9 * min(map(value, named))


def test_one_eigenvalue_with_euler_gives_the_arctan_grid():
    """The known optimum: uniform in arctan(t / c). Many steps, so that the last, down to 0, weighs little."""
    levels = from_spectrum(EDM(), 24, [0.25], solver="ddim")
    angles = np.arctan(levels / 0.5)
    assert np.abs(np.diff(angles[2:-3]) / np.diff(angles[2:-3]).mean() - 1).max() < 0.2


def test_a_long_spectrum_is_grouped():
    long = power_law((4, 64, 64))
    a, b = from_spectrum(VP.linear(), 4, long), from_spectrum(VP.linear(), 4, np.repeat(long, 2))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_power_law_is_one():
    spectrum = power_law((3, 64, 64), exponent=2.0, deviation=0.5)
    assert len(spectrum) == 3 * 64 * 64 and spectrum.mean() == pytest.approx(0.25)
    assert np.all(np.diff(spectrum) <= 0) and spectrum[0] / spectrum[-1] == pytest.approx(2 * 32**2)
    white = power_law((8, 8), exponent=0.0, deviation=2.0)
    np.testing.assert_allclose(white, 4.0)


def test_the_covariance_of_many_samples():
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(2.0, 0.1, 20, dtype=torch.float64)
    x = 3.0 + scale * torch.randn((20000, 20), generator=generator, dtype=torch.float64)
    np.testing.assert_allclose(spectrum_of(x), np.square(scale.numpy()), rtol=0.05, atol=0.005)
    assert spectrum_of(x[:, :1])[0] == pytest.approx(float(x[:, :1].var()), rel=1e-9)


def test_few_samples_do_not_make_small_eigenvalues():
    """Of white noise every eigenvalue is one; 16 samples of 32 elements show half of them as zero."""
    x = torch.randn((16, 32), generator=torch.Generator().manual_seed(1))
    spectrum = spectrum_of(x)
    assert spectrum.shape == (32,) and spectrum.mean() == pytest.approx(float(x.var(0).mean()))
    assert 0.6 < spectrum.min() and spectrum.max() < 1.6
    plain = np.linalg.eigvalsh(np.cov(x.numpy().T))
    assert plain.min() < 1e-6 and plain.max() > 3.0


def test_the_fourier_spectrum_of_a_stationary_field():
    """Filtered white noise: eigenvalues are the filter's power, known from few samples."""
    generator = torch.Generator().manual_seed(2)
    power = torch.from_numpy(power_law((16, 16), deviation=1.0).copy())[
        torch.randperm(256, generator=generator)
    ]
    power = power.view(16, 16)
    power = (power + power.flip(0, 1).roll((1, 1), (0, 1))) / 2  # symmetric: a real filter
    white = torch.fft.fft2(torch.randn((400, 1, 16, 16), generator=generator, dtype=torch.float64))
    x = torch.fft.ifft2(white * power.sqrt()).real
    spectrum = spectrum_of(x)
    assert spectrum.sum() == pytest.approx(float(x.var(0).sum()))
    np.testing.assert_allclose(spectrum, np.sort(power.flatten().numpy())[::-1], rtol=0.5)
    np.testing.assert_allclose(spectrum.sum(), power.sum(), rtol=0.05)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_spectrum(EDM(), 4, []), "at least one positive"),
        (lambda: from_spectrum(EDM(), 4, [1.0, -0.1]), "none negative"),
        (lambda: from_spectrum(EDM(), 4, [float("nan")]), "finite"),
        (lambda: from_spectrum(EDM(), 0, [1.0]), "steps must be an integer >= 1, got 0"),
        (lambda: from_spectrum(EDM(), 4, [1.0], solver="unipcc"), "did you mean"),
        (lambda: spectrum_of(torch.zeros(1, 4)), "at least two samples"),
        (lambda: spectrum_of(torch.zeros(4, 4), "fourier"), r"needs samples \(B, ..., H, W\)"),
        (lambda: spectrum_of(torch.zeros(4, 4), "pca"), "auto, covariance or fourier"),  # type: ignore[arg-type]
        (lambda: power_law((8,)), r"needs a shape \(..., H, W\)"),
        (lambda: power_law((8, 8), deviation=0.0), "deviation must be positive"),
    ],
)
def test_input_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
