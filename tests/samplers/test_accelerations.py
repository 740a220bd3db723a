"""Accelerations without training: accelerated DDIM and DDPM, first step, DualFast, teleportation, PFGM++'s noise."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import solver_checks as checks
import torch

import fewstep as fs
from fewstep.samplers import (
    Evaluate,
    Gaussian,
    Linear,
    Noise,
    PoissonNoise,
    Program,
    Stepper,
    Trace,
    WhiteNoise,
    pfgm_prior,
)
from fewstep.samplers.noise import standard_normal
from fewstep.schedules import EDM, Flow, Node, NoiseSchedule, TimeGrid, VPContinuous, make_grid

SCHEDULES = list(checks.SCHEDULES)


def coefficients(program: Program) -> np.ndarray:
    """The evaluated states and the result on the start state and the predictions, in order of evaluation."""
    states, result = program.unroll()
    order = [0] + [op.dst for op in program.ops if isinstance(op, Evaluate)]
    return np.array([[form.get(r, 0.0) for r in order] for form in [*states, result]])


def run(program: Program, x: torch.Tensor, predict, noise=None) -> torch.Tensor:
    """The result of a program whose predictions are ``predict(x, node)``."""
    stepper = Stepper(program, x, noise)
    while not stepper.done:
        stepper.step(predict(stepper.x, stepper.node))
    return stepper.x


# accelerated DDIM and DDPM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_accelerated_ddim_integrates_polynomials_in_alpha_bar(schedule):
    """Its weights are the integrals of the Lagrange basis in alpha_bar, from alpha = 0 and to sigma = 0 as well."""
    noise_schedule = checks.SCHEDULES[schedule]
    levels = noise_schedule.level_at_ratio(np.array([20.0, 3.0, 1.0, 0.2, 0.0]))
    if schedule == "flow":
        levels = np.append(1.0, levels)
    grid = TimeGrid.from_levels(noise_schedule, levels)
    program = fs.compile("accelerated_ddim", grid, prediction="flow" if schedule == "flow" else "epsilon")
    signal = [n.alpha**2 / (n.alpha**2 + n.sigma**2) for n in grid]

    def weight(i: int, j: int, other: int) -> float:
        def basis(k):
            return (1 / (1 + k * k) - signal[other]) / (signal[j] - signal[other])

        ends = grid[i].ratio, grid[i + 1].ratio
        return scipy.integrate.quad(basis, *ends, epsabs=1e-13, epsrel=1e-13, limit=200)[0]

    rng = np.random.default_rng(0)
    predictions, x = rng.standard_normal(grid.steps), 1.0
    states, given = [], []
    for i, (s, t) in enumerate(grid.intervals()):
        states.append(x)
        # what the network predicts is drawn, and eps follows from it
        given.append(
            (x + s.alpha * predictions[i]) / (s.alpha + s.sigma) if schedule == "flow" else predictions[i]
        )
        if s.alpha == 0.0:
            clean = (x - s.sigma * predictions[i]) / (s.alpha + s.sigma)
            x = t.sigma / s.sigma * x + t.alpha * clean
        elif i == 0:
            x = t.alpha * (x / s.alpha + (t.ratio - s.ratio) * given[0])
        else:
            x = t.alpha * (x / s.alpha + weight(i, i, i - 1) * given[i] + weight(i, i - 1, i) * given[i - 1])
    rows = coefficients(program)
    np.testing.assert_allclose(rows @ np.append(1.0, predictions), [*states, x], rtol=1e-10)


def alpha_bar_grid(steps: int) -> TimeGrid:
    a = np.linspace(0.01, 0.99, steps + 1)
    return TimeGrid.from_levels(VPContinuous(), np.sqrt((1 - a) / a))


def test_accelerated_ddpm_has_the_variance_error_that_is_claimed():
    """1.9e-3, 4.6e-4, 1.2e-4, 2.9e-5 on Gaussians at T = 50 to 400, and first order with z' outside the bracket."""
    inside, outside = [], []
    for steps in (50, 100, 200, 400):
        grid = alpha_bar_grid(steps)
        program = fs.compile("accelerated_ddpm", grid)
        true = grid[-1].alpha ** 2 / 4 + grid[-1].sigma ** 2
        inside.append((checks.gaussian_variance(program, grid) - 1.0) * true)
        trace = Trace(grid, "denoised")
        outside.append(
            (checks.gaussian_variance(trace.finish(_outside(trace, trace.start, grid)), grid) - 1) * true
        )
    np.testing.assert_allclose(inside, [1.9e-3, 4.6e-4, 1.2e-4, 2.9e-5], rtol=0.05)
    np.testing.assert_allclose(outside, [-4.7e-3, -2.5e-3, -1.3e-3, -6.8e-4], rtol=0.08)


def _outside(trace: Trace, x: Linear, grid: TimeGrid) -> Linear:
    for s, t in grid.intervals():
        a = (s.alpha / t.alpha) ** 2
        noise = math.sqrt((1 - a) / 2)
        u, m = trace.evaluate(x + noise * trace.noise(s, s), s)
        x = (u - (1 - a) / s.sigma * m.epsilon) / math.sqrt(a) + noise * trace.noise(t, t)
    return x


def test_accelerated_ddpm_is_one_method_in_every_frame():
    errors = []
    for schedule in checks.SCHEDULES.values():
        grid = checks.ratio_grid(schedule, 20)
        errors.append(checks.gaussian_variance(fs.compile("accelerated_ddpm", grid), grid))
    np.testing.assert_allclose(errors, errors[0], rtol=1e-12)


def test_accelerated_ddpm_misses_a_point_by_the_stated_amount():
    grid = TimeGrid.from_levels(VPContinuous(), [1.5, 1.0])
    _, result = (program := fs.compile("accelerated_ddpm", grid)).unroll()
    s, t = grid
    draws = sum(result[op.dst] ** 2 for op in program.ops if isinstance(op, Noise))
    a = (s.alpha / t.alpha) ** 2
    excess = (1 - a) ** 3 / (2 * a * s.sigma**4)
    assert (result[0] * s.sigma) ** 2 + draws == pytest.approx(t.sigma**2 + excess, rel=1e-12)


# analytical first step ---------------------------------------------------------------------------------------------

ONE_BY_ONE = [
    "ddim",
    "ipndm",
    "dpmpp_2m",
    "unipc",
    "deis",
    "heun",
    "plms",
    "sa_solver",
    "dpmpp_2m_sde",
    "ddpm",
]


@pytest.mark.parametrize("spec", ONE_BY_ONE)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_assumed_evaluation_is_what_the_formula_says(spec, schedule):
    """With a network that predicts x / sqrt(alpha^2 + sigma^2) it changes nothing but the number of calls."""
    if schedule == "flow":
        grid = TimeGrid.from_levels(Flow(), 1.0 - np.arange(7) / 6)
    else:
        grid = make_grid(checks.SCHEDULES[schedule], 6, "karras:sigma_max=20")

    def predict(x, node):
        total = math.hypot(node.alpha, node.sigma)
        return x * (node.alpha / (total * (total + node.sigma)))

    whole, saved = (fs.compile(s, grid) for s in (spec, f"{spec}+afs"))
    assert saved.nfe == whole.nfe - 1 and saved.evaluations == whole.evaluations[1:]
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[None]
    expected, result = (run(p, x, predict, WhiteNoise([0])) for p in (whole, saved))
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-12)


def test_the_first_step_of_a_run_and_no_other_is_assumed():
    grid = make_grid(EDM(), 8, "karras")
    plain = fs.compile("heun+restart", grid)
    assert fs.compile("heun+restart+afs", grid).evaluations == plain.evaluations[1:]
    assert fs.compile("ipndm+afs", make_grid(EDM(), 1)).nfe == 1  # nothing would be left
    solver = fs.solver("sa_solver:pece=true+afs")
    assert solver.startup_evaluations == fs.solver("sa_solver:pece=true").startup_evaluations - 1


def test_skipping_counts_the_assumed_step():
    grid = TimeGrid.from_levels(EDM(), np.linspace(10.0, 1.0, 13))
    plain, saved = (fs.compile(f"ddim{first}+skip:h2/s2", grid).evaluations for first in ("", "+afs"))
    assert set(saved) < set(plain) and grid[0] not in saved


def test_a_slope_without_weight_costs_no_order():
    for schedule in checks.SCHEDULES.values():
        observed = checks.slope(lambda grid: fs.compile("dpm_2+afs", grid), schedule, False)
        assert observed == pytest.approx(2.0, abs=0.2)


# DualFast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["ddim", "unipc", "heun", "dpmpp_2m_sde"])
def test_a_weight_of_zero_changes_nothing(spec):
    grid = make_grid(EDM(), 6)
    assert fs.compile(f"{spec}+dual_fast:c=0", grid).ops == fs.compile(spec, grid).ops


def test_predictions_are_mixed_with_the_first():
    grid = TimeGrid.from_levels(EDM(), [5.0, 4.0, 2.0, 1.0])
    rows = coefficients(fs.compile("ddim+dual_fast:c=0.3", grid, prediction="epsilon"))
    # c falls as 0.3, 0.2, 0.1; the steps are -1, -2, -1 long
    np.testing.assert_allclose(rows[-1], [1.0, -1 + 2 * 0.2 + 0.1, -2 * 1.2, -1.1], atol=1e-14)


@pytest.mark.parametrize("prediction", ["flow", "denoised", "v"])
def test_dual_fast_starts_without_signal(prediction):
    grid = TimeGrid.from_levels(Flow(), 1.0 - np.arange(5) / 4)
    program = fs.compile("unipc+dual_fast", grid, prediction=prediction)
    assert program.nfe == 4
    if prediction == "denoised":
        assert checks.exactness_error(program, grid) < 1e-13


# teleportation -----------------------------------------------------------------------------------------------------


def gaussian(n: int = 4, rank: int | None = None) -> Gaussian:
    """A Gaussian of n numbers whose covariance is not diagonal."""
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0][: rank or n]
    mean, values = rng.standard_normal((2, n // 2)), rng.uniform(0.05, 2.0, len(basis))
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(basis), torch.from_numpy(values))


def normals(batch: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(data: Gaussian, schedule: NoiseSchedule) -> fs.Denoiser:
    """The Gaussian as a network."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = schedule.alpha_sigma(float(t[0]))
        return data.denoised(x, Node(float(t[0]), float(alpha), float(sigma)))

    return fs.Denoiser(network, schedule, "denoised", data.mean.shape)


@pytest.mark.parametrize("rank", [None, 2])
def test_predictions_of_a_gaussian_are_those_of_its_covariance(rank):
    data, node = gaussian(rank=rank), Node(0.5, 0.8, 0.6)
    x = normals(3, 2, 2)
    covariance = data.basis.T @ torch.diag(data.eigenvalues) @ data.basis
    inverse = torch.linalg.inv(node.alpha**2 * covariance + node.sigma**2 * torch.eye(4))
    centred = (x - node.alpha * data.mean).flatten(1)
    epsilon = (node.sigma * centred @ inverse).view(x.shape)
    torch.testing.assert_close(data.epsilon(x, node), epsilon)
    torch.testing.assert_close(data.denoised(x, node), (x - node.sigma * epsilon) / node.alpha)
    clean = data.mean + (normals(3, len(data.basis)) @ data.basis).view(3, 2, 2)
    torch.testing.assert_close(data.denoised(clean, Node(0.0, 1.0, 0.0)), clean)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rank", [None, 2])
def test_a_move_solves_the_ode(schedule, rank):
    """Against fourth-order Runge-Kutta from the first node to no noise, and in two pieces."""
    data, noise_schedule = gaussian(rank=rank), checks.SCHEDULES[schedule]
    levels = noise_schedule.level_at_ratio(np.geomspace(20.0, 0.05, 600))
    grid = TimeGrid.from_levels(noise_schedule, levels)
    x = normals(3, 2, 2) * grid[0].sigma
    numerical = run(fs.compile("rk:tableau=4rk", grid), x, data.denoised)
    moved = data.move(x, grid[0], grid[-1])
    torch.testing.assert_close(moved, numerical, rtol=0, atol=1e-6)
    torch.testing.assert_close(data.move(data.move(x, grid[0], grid[200]), grid[200], grid[-1]), moved)
    torch.testing.assert_close(data.move(moved, grid[-1], grid[0]), x)


def test_a_move_carries_one_normal_distribution_to_another():
    data, (s, t) = gaussian(), (Node(80.0, 1.0, 80.0), Node(0.5, 1.0, 0.5))
    unit = torch.eye(4, dtype=torch.float64).view(4, 2, 2)
    zero = data.move(s.alpha * data.mean[None], s, t)
    torch.testing.assert_close(zero[0], t.alpha * data.mean)
    matrix = (data.move(s.alpha * data.mean + unit, s, t) - zero).flatten(1)
    covariance = data.basis.T @ torch.diag(data.eigenvalues) @ data.basis
    eye = torch.eye(4, dtype=torch.float64)
    start, end = (n.alpha**2 * covariance + n.sigma**2 * eye for n in (s, t))
    torch.testing.assert_close(matrix.T @ start @ matrix, end)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_teleporting_on_gaussian_data_gives_the_closed_form(schedule):
    data, noise_schedule = gaussian(), checks.SCHEDULES[schedule]
    denoiser, grid = exact(data, noise_schedule), make_grid(checks.SCHEDULES[schedule], 60)
    x = normals(4, 2, 2) * grid[0].sigma
    truth = data.move(x, grid[0], grid[-1])

    def error(ratio: float) -> float:
        level = float(noise_schedule.level_at_ratio(ratio))
        before = denoiser.nfe
        y = fs.sample(denoiser, x, "dpmpp_2m", 60, teleport=(data, level))
        assert (denoiser.nfe - before) / 4 == 1 + int(np.sum(grid.level[:-1] < level))
        return float((y - truth).abs().max())

    errors = [error(ratio) for ratio in (15.0, 3.0, 0.5, 1e-4)]
    assert max(errors) < 0.02 and errors[-1] < 1e-4
    from_top = fs.sample(denoiser, x, "dpmpp_2m", 60, teleport=(data, float(grid.level[0])))
    torch.testing.assert_close(from_top, fs.sample(denoiser, x, "dpmpp_2m", 60))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("solver", "share"), [("ddim", 0.8), ("dpmpp_2m", 0.75), ("unipc", 0.9)])
def test_teleporting_pays_on_a_mixture(schedule, solver, share):
    """Eight evaluations below sigma / alpha = 3 against eight on the whole range."""
    mix, noise_schedule = checks.mixture(), checks.SCHEDULES[schedule]
    mean = mix.w @ mix.mu
    covariance = np.einsum("k,ki,kj", mix.w, mix.mu - mean, mix.mu - mean) + np.diag(mix.w @ mix.var)
    data = Gaussian.from_covariance(torch.from_numpy(mean), torch.from_numpy(covariance))

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = noise_schedule.alpha_sigma(float(t[0]))
        return torch.from_numpy(mix.denoised(x.numpy(), float(alpha), float(sigma)))

    denoiser, grid = fs.Denoiser(network, noise_schedule, "denoised"), make_grid(noise_schedule, 8)
    x = normals(200, 2) * grid[0].sigma
    truth = fs.sample(denoiser, x, "dpmpp_2m", 400)
    levels = make_grid(noise_schedule, 8, "arctan:sigma_max=3").level
    moved = fs.sample(
        denoiser, x, solver, sigmas=np.append(grid.level[0], levels), teleport=(data, float(levels[0]))
    )
    plain = fs.sample(denoiser, x, solver, 8)
    assert (moved - truth).square().mean().sqrt() < share * (plain - truth).square().mean().sqrt()


@pytest.mark.parametrize("count", [3, 500])
def test_a_fit_has_the_moments_of_the_samples(count):
    samples = normals(count, 2, 3) * torch.arange(1.0, 7.0).view(2, 3)
    data = Gaussian.fit(samples)
    assert len(data.eigenvalues) == min(count - 1, 6)
    torch.testing.assert_close(data.mean, samples.mean(0))
    covariance = data.basis.T @ torch.diag(data.eigenvalues) @ data.basis
    torch.testing.assert_close(covariance, torch.cov(samples.flatten(1).T))
    two = Gaussian.fit(samples, rank=2)
    torch.testing.assert_close(two.eigenvalues, data.eigenvalues[:2])
    assert bool((data.eigenvalues.diff() <= 0).all())


def test_a_gaussian_can_be_saved():
    data, file = gaussian(), io.BytesIO()
    torch.save(data.tensors(), file)
    file.seek(0)
    again = Gaussian(**torch.load(file, weights_only=True))
    x, s, t = normals(2, 2, 2), Node(1.0, 1.0, 1.0), Node(0.1, 1.0, 0.1)
    assert torch.equal(again.move(x, s, t), data.move(x, s, t))
    half = data.move(x.bfloat16(), s, t)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), data.move(x, s, t), rtol=0.02, atol=0.02)


def test_teleporting_refuses_what_it_cannot_do(tmp_path):
    data = gaussian()
    denoiser, x = exact(data, EDM()), normals(2, 2, 2) * 80
    for level in (81.0, 0.0, -1.0):
        with pytest.raises(ValueError, match="needs a level above 0, where the grid ends, and at most 80"):
            fs.sample(denoiser, x, teleport=(data, level))
    with pytest.raises(ValueError, match=r"of shape \(4,\), the Gaussian is of shape \(2, 2\)"):
        data.move(x.flatten(1), Node(1.0, 1.0, 1.0), Node(0.5, 1.0, 0.5))
    with pytest.raises(ValueError, match="a recipe has its own"):
        fs.sample(denoiser, x, recipe=tmp_path / "r.json", teleport=(data, 5.0))
    with pytest.raises(ValueError, match="no trajectory through a state without noise"):
        data.move(x, Node(0.0, 1.0, 0.0), Node(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="rank must be 1 to 3"):
        Gaussian.fit(normals(4, 10), rank=4)
    with pytest.raises(ValueError, match="at least two samples"):
        Gaussian.fit(normals(1, 10))
    with pytest.raises(ValueError, match=r"a basis of shape \(1, 4\), got \(1, 3\)"):
        Gaussian(torch.zeros(4), torch.zeros(1, 3), torch.ones(1))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        Gaussian(torch.zeros(1), torch.ones(1, 1), -torch.ones(1))


# PFGM++ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(1, 1), (6, 3), (48, 128), (12, 2048)])
def test_the_prior_has_the_published_length_and_any_direction(n, d):
    """|x|^2 / r_max^2 = b / (1 - b) with b ~ Beta(N / 2, D / 2), r_max = sigma_max sqrt(D)."""
    x = pfgm_prior((3000, n), d, 80.0, range(3000), dtype=torch.float64).numpy()
    ratio = (x**2).sum(axis=1) / (80.0**2 * d)
    assert scipy.stats.kstest(ratio / (1 + ratio), scipy.stats.beta(n / 2, d / 2).cdf).pvalue > 0.01
    direction = x / np.sqrt((x**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(direction.mean(axis=0), 0.0, atol=4.5 / math.sqrt(3000 * n))
    if n > 1:
        np.testing.assert_allclose(
            direction.T @ direction / 3000, np.eye(n) / n, atol=5.5 / (n * math.sqrt(3000))
        )


def test_the_prior_becomes_normal_and_belongs_to_the_seed():
    shape, seeds = (4, 3, 5), [7, 8, 9, 10]
    limit = pfgm_prior(shape, math.inf, 80.0, seeds)
    assert torch.equal(limit, 80.0 * standard_normal(seeds, torch.empty(shape)))
    torch.testing.assert_close(pfgm_prior(shape, 1e12, 80.0, seeds), limit, rtol=1e-5, atol=0)
    some = pfgm_prior(shape, 16, 80.0, seeds)
    assert torch.equal(pfgm_prior((1, 3, 5), 16, 80.0, [9]), some[2:3])
    assert pfgm_prior(shape, 16, 80.0, seeds, dtype=torch.float64).dtype == torch.float64
    for D in (0.5, -1.0, math.nan):
        with pytest.raises(ValueError, match="D must be at least 1"):
            pfgm_prior(shape, D, 80.0, seeds)


@pytest.mark.parametrize(("low", "high", "d"), [(0.3, 1.0, 8), (0.0, 2.0, 5), (1.0, 1.5, 64)])
def test_the_noise_of_a_move_has_the_stated_mean_square(low, high, d):
    start, stop = Node(low, 1.0, low), Node(high, 1.0, high)
    z = PoissonNoise(range(4000), d)(torch.empty(4000, 40, dtype=torch.float64), start, stop)
    share = low**2 / (high**2 - low**2)
    expected = d / (d - 2) * (1 + 2 * share / d)
    assert float(z.square().mean()) == pytest.approx(expected, rel=0.08)


def test_a_move_in_one_more_dimension_is_a_cauchy_variable():
    """D = 1: straight up to r_t or, on the other side, down to -r_t."""
    start, stop = Node(1.0, 1.0, 1.0), Node(3.0, 1.0, 3.0)
    z = PoissonNoise(range(4000), 1)(torch.empty(4000, 1, dtype=torch.float64), start, stop)
    moved = math.sqrt(3.0**2 - 1.0**2) * z.numpy()[:, 0]

    def cdf(x):
        return (scipy.stats.cauchy(scale=2.0).cdf(x) + scipy.stats.cauchy(scale=4.0).cdf(x)) / 2

    assert scipy.stats.kstest(moved, cdf).pvalue > 0.01


def test_from_a_point_a_move_is_the_prior():
    z = PoissonNoise(range(3000), 6)(
        torch.empty(3000, 4, dtype=torch.float64), Node(0, 1, 0), Node(80, 1, 80)
    )
    ratio = z.square().sum(1).numpy() / 6
    assert scipy.stats.kstest(ratio / (1 + ratio), scipy.stats.beta(2, 3).cdf).pvalue > 0.01


def test_poisson_noise_is_keyed_and_goes_up_only():
    like, start, stop = torch.empty(2, 5), Node(0.3, 1.0, 0.3), Node(1.0, 1.0, 1.0)
    noise = PoissonNoise([3, 4], 16)
    first, second = noise(like, start, stop), noise(like, start, stop)
    assert not torch.equal(first, second)
    assert torch.equal(PoissonNoise([4], 16)(like[:1], start, stop), first[1:])
    assert torch.equal(
        PoissonNoise([3, 4], math.inf)(like, start, stop), WhiteNoise([3, 4])(like, start, stop)
    )
    with pytest.raises(ValueError, match="moves to a higher level only"):
        noise(like, stop, start)


@pytest.mark.parametrize("solver", ["heun", "unipc", "heun+restart:t_min=0.3,t_max=3,repeats=3"])
def test_pfgm_reaches_a_point_exactly(solver):
    """The field of one charge points at it."""
    point = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    denoiser = fs.Denoiser(lambda x, t: point.expand_as(x), EDM(), "denoised")
    x = pfgm_prior((5, 3), 8, 80.0, range(5), dtype=torch.float64)
    y = fs.sample(denoiser, x, solver, 18, "karras", noise=PoissonNoise(range(5), 8))
    torch.testing.assert_close(y, point.expand_as(y), rtol=0, atol=1e-12)


def test_pfgm_divides_its_start_states_among_charges_by_their_size():
    """Two points of weights 0.3 and 0.7: posterior weights ``w (|x - y|^2 + r^2)^(-(N + D) / 2)``, r^2 = D sigma^2."""
    d, count = 3, 3000
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        square = (x[:, None] - points).square().sum(-1) + d * t.double()[:, None] ** 2
        logits = weights.log() - (2 + d) / 2 * square.log()
        return logits.softmax(1) @ points

    denoiser = fs.Denoiser(network, EDM(), "denoised")
    x = pfgm_prior((count, 2), d, 80.0, range(count), dtype=torch.float64)
    y = fs.sample(denoiser, x, "heun", 40, "karras")
    distances = torch.cdist(y, points)
    assert float((distances.min(1).values < 0.05).double().mean()) > 0.98
    share = float((distances.argmin(1) == 0).double().mean())
    assert share == pytest.approx(0.3, abs=3 * math.sqrt(0.21 / count) + 0.005)
