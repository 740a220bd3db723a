"""Classifiers, energies, rewards, minority and inverse problems: all on Gaussians, where the answer is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from guidance_runs import noise, run_of, two_gaussians

import fewstep as fs
from fewstep.guidance import (
    CFG,
    DPS,
    MCG,
    MMPS,
    STSL,
    TMPD,
    Call,
    ClassifierGuidance,
    EnergyGuidance,
    GradientFreeClassifierGuidance,
    PiGDM,
    RewardGuidance,
    SelfGuidedMinority,
    contrastive_energy_loss,
)
from fewstep.guidance.classifier import strongest_wrong
from fewstep.guidance.minority import node_at
from fewstep.schedules import EDM, VP, Flow, Node, TimeGrid, VPContinuous

SCHEDULES = [(VPContinuous(), "epsilon"), (VPContinuous(), "v"), (EDM(), "denoised"), (Flow(), "flow")]
IDS = ["vp", "vp-v", "edm", "flow"]


def prior(schedule, prediction="denoised", mean=0.0, variance=1.0) -> fs.Denoiser:
    return two_gaussians(schedule, prediction, conditional=(mean, variance))


def node_of(schedule, t: torch.Tensor) -> tuple[float, float]:
    return tuple(float(n) for n in schedule.alpha_sigma(float(t[0])))  # type: ignore[return-value]


def levels(schedule, n=200):
    top = min(schedule.level_max, 80.0)
    return np.linspace(1.0, 1e-3, n) if schedule.frame == "flow" else np.geomspace(top, 1e-2, n)


def flow_of_gaussian(schedule, ks, x, mean, variance):
    """The probability flow of N(mean, variance) from the first level to the last."""
    (a, b), (s, r) = schedule.alpha_sigma_at(np.array([ks[0], ks[-1]]))
    return b * mean + (x - a * mean) * ((b**2 * variance + r**2) / (a**2 * variance + s**2)) ** 0.5


def start(schedule, n=50) -> torch.Tensor:
    return float(schedule.alpha_sigma_at(levels(schedule)[0])[1]) * noise(n, 1, seed=1)


# -- classifiers and energies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "prediction"), SCHEDULES, ids=IDS)
def test_classifier_guidance_samples_the_posterior(schedule, prediction):
    """p(y | x_0) = N(y; x_0, 1): the posterior of N(0, 1) at y = 2 is N(1, 1/2)."""

    def log_prob(x, t):  # x_0 given x_t is N(a x / v, s^2 / v), so y given x_t has variance 1 + s^2 / v
        a, s = node_of(schedule, t)
        v = a**2 + s**2
        return (-((2.0 - a * x / v) ** 2) / (2 * (1 + s**2 / v))).sum(1)

    x, ks = start(schedule), levels(schedule)
    out = fs.sample(
        prior(schedule, prediction), x, "heun", sigmas=ks, guidance=ClassifierGuidance(log_prob=log_prob)
    )
    expected = flow_of_gaussian(schedule, ks, x, 1.0, 0.5)
    assert float((out - expected).abs().max()) < 0.02


@pytest.mark.parametrize(("schedule", "prediction"), SCHEDULES, ids=IDS)
def test_exact_energy_reaches_the_tilted_gaussian_and_the_plug_in_does_not(schedule, prediction):
    """N(0, 1) and E = b x^2 / 2: the tilted density is N(0, 1 / (1 + b))."""
    b = 3.0

    def energy(x, t):  # -ln of E[exp(-b x_0^2 / 2) | x_t], x_0 given x_t being N(m, q)
        a, s = node_of(schedule, t)
        m, q = a * x / (a**2 + s**2), s**2 / (a**2 + s**2)
        return (b * m**2 / (2 * (1 + b * q))).sum(1)

    x, ks = start(schedule), levels(schedule)
    exact = fs.sample(
        prior(schedule, prediction), x, "heun", sigmas=ks, guidance=EnergyGuidance(energy=energy)
    )
    expected = flow_of_gaussian(schedule, ks, x, 0.0, 1 / (1 + b))
    assert float((exact - expected).abs().max()) < 0.02
    denoiser = prior(schedule, prediction)
    plug_in = RewardGuidance(reward=lambda x: -(b / 2) * x.square().sum(1))
    biased = fs.sample(denoiser, x, "heun", sigmas=ks, guidance=plug_in)
    assert denoiser.nfe == len(x) * (2 * (len(ks) - 1))
    # the variance that its score has: the ODE of -grad r(D(x)) with D = a x / v
    assert abs(float(biased.std()) / float(expected.std()) - 1) > 0.1


def test_contrastive_loss_is_smallest_at_the_exact_energy():
    e = noise(7, 16)
    exact = contrastive_energy_loss(2.0 * e, e, beta=2.0)
    assert exact < contrastive_energy_loss(2.1 * e, e, beta=2.0)
    torch.testing.assert_close(exact, contrastive_energy_loss(2.0 * e + 5.0, e, beta=2.0))


def test_reward_with_a_flow_map():
    """A linear flow map and a linear reward: the score moves by a constant."""
    schedule, x = EDM(), 10 * noise(3, 2)
    ratio = 0.3
    reward = RewardGuidance(2.0, reward=lambda x: x.sum(1), look_ahead=lambda x, t: ratio * x)
    denoiser, seen = prior(schedule), []
    predictor = reward.bind(denoiser, run_of([Node(5.0, 1.0, 5.0)]))
    seen.append(predictor(x, Node(5.0, 1.0, 5.0)))
    plain = prior(schedule)(x, Node(5.0, 1.0, 5.0))
    torch.testing.assert_close(seen[0], plain + 25.0 * 2.0 * ratio)
    ramped = RewardGuidance(2.0, ramp=True, reward=lambda x: x.sum(1), look_ahead=lambda x, t: ratio * x)
    moved = ramped.bind(denoiser, run_of([Node(5.0, 1.0, 5.0)]))(x, Node(5.0, 1.0, 5.0))
    torch.testing.assert_close(moved, plain + 25.0 * 2.0 * ratio / 6.0)


def test_gradient_free_classifier_guidance():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    assert strongest_wrong(p, torch.tensor([0, 0])).tolist() == [1, 1]
    schedule, x = VP.linear(), noise(2, 3)
    labels_seen = []

    def with_label(x, t, labels):
        labels_seen.append(labels.tolist())
        return 0.1 * x * labels[:, None]

    target = torch.tensor([0, 1])
    logits = p.log()
    method = GradientFreeClassifierGuidance(
        3.0, classifier=lambda x: logits.to(x), with_label=with_label, target=target
    )
    denoiser, plain = prior(schedule, "epsilon"), prior(schedule, "epsilon")
    node = node_at(schedule, 0.5)
    out = method.bind(denoiser, run_of([node], "epsilon", schedule=schedule))(x, node)
    c = plain(x, node)
    w = 1 + 2 * (1 - torch.tensor([0.6, 0.5], dtype=torch.float64))
    reference = torch.tensor([1, 2])
    assert labels_seen == [reference.tolist()] and denoiser.nfe == 2 * 2
    torch.testing.assert_close(out, c + (w - 1)[:, None] * (c - 0.1 * x * reference[:, None]))
    own = GradientFreeClassifierGuidance(
        3.0,
        classifier=lambda x: logits.to(x),
        with_label=with_label,
        target=target,
        reference_class=lambda p, y: y,
        strength=lambda own, w: torch.ones_like(own),
    )
    torch.testing.assert_close(own.bind(denoiser, run_of([node], "epsilon", schedule=schedule))(x, node), c)


# -- minority ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VP.linear(), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_node_at_a_time(schedule):
    run = run_of([], schedule=schedule)
    for time in (0.2, 0.8):
        assert math.isclose(run.time(node_at(schedule, time)), time, rel_tol=1e-6)


def test_minority_cost_and_direction():
    x, denoiser = noise(2, 4), two_gaussians()
    method = SelfGuidedMinority(0.5, every=3)
    out = fs.sample(denoiser, x, "ddim:eta=1", steps=7, guidance=method)
    assert denoiser.nfe == 2 * (7 + 3)  # steps 0, 3 and 6
    assert torch.equal(out, fs.sample(two_gaussians(), x, "ddim:eta=1", steps=7, guidance=method))
    none = fs.sample(two_gaussians(), x, "ddim:eta=1", steps=7, guidance=SelfGuidedMinority(0.0))
    torch.testing.assert_close(none, fs.sample(two_gaussians(), x, "ddim:eta=1", steps=7))


def test_minority_step():
    """One step, by hand: the gradient of |D(x) - const| through D = m x + ..., divided by its largest element."""
    schedule, x = VP.linear(), noise(2, 3)
    grid = TimeGrid.from_levels(schedule, [5.0, 2.0])
    s, t = grid[0], grid[1]
    out = fs.sample(
        two_gaussians(schedule), x, "ddim", sigmas=[5.0, 2.0], guidance=SelfGuidedMinority(0.4, every=1)
    )
    plain = fs.sample(two_gaussians(schedule), x, "ddim", sigmas=[5.0, 2.0])
    variance = (t.sigma / s.sigma) ** 2 * (s.sigma**2 - (s.alpha / t.alpha * t.sigma) ** 2)
    move = out - plain
    torch.testing.assert_close(
        move.abs().amax(1), torch.full((2,), 0.4 * variance, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_methods_that_move_the_state_need_a_solver_without_memory():
    for method in (
        SelfGuidedMinority(),
        DPS(operator=lambda x: x, measurement=torch.zeros(1)),
        MCG(mask=torch.ones(1), measurement=torch.zeros(1)),
        PiGDM(operator=lambda x: x, inverse=lambda y: y, measurement=torch.zeros(1)),
    ):
        denoiser = two_gaussians()
        with pytest.raises(ValueError, match="such as ddim"):
            fs.sample(denoiser, noise(2, 3), "unipc", guidance=method)
        assert denoiser.nfe == 0


# -- inverse problems --------------------------------------------------------------------------------------------------


class Problem:
    """The Gaussian inverse problem of the golden file, as a batch of one."""

    def __init__(self, g: Any) -> None:
        self.g = {k: torch.from_numpy(np.asarray(v, dtype=np.float64)) for k, v in g.items()}
        self.alpha, self.sigma = float(g["alpha"]), float(g["sigma"])
        self.y = self.g["y"][None]
        self.node = Node(0.5, self.alpha, self.sigma)
        self.r = float(g["cov_y"][0, 0]) ** 0.5

    def operator(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.g["A"].T

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y @ torch.linalg.pinv(self.g["A"]).T

    def denoiser(self) -> fs.Denoiser:
        def network(x, t):
            m, s = self.g["prior_mean"], self.g["prior_cov"]
            eye = torch.eye(len(m), dtype=torch.float64)
            gain = self.alpha * s @ torch.linalg.inv(self.alpha**2 * s + self.sigma**2 * eye)
            return m + (x - self.alpha * m) @ gain.T

        return fs.Denoiser(network, EDM(), "denoised")

    def predict(self, method) -> torch.Tensor:
        run = run_of([self.node], noise=lambda like, *key: torch.zeros_like(like), history=0)
        predictor = method.bind(self.denoiser(), run)
        with torch.no_grad():
            return predictor(self.g["x_t"][None], self.node)[0]

    def shift(self, method, alpha_next: float = 1.0) -> torch.Tensor:
        """By how much the state moves after the step."""
        run = run_of([self.node], noise=lambda like, *key: torch.zeros_like(like))
        predictor = method.bind(self.denoiser(), run)
        predictor(self.g["x_t"][None], self.node)
        zero = torch.zeros(1, 4, dtype=torch.float64)
        return predictor.move(zero, Node(0.0, alpha_next, 0.0))[0]


@pytest.fixture
def problem(golden):
    return Problem(golden.guidance("inverse_gaussian"))


def test_inputs_of_the_golden_file(problem):
    denoiser = problem.denoiser()
    torch.testing.assert_close(denoiser(problem.g["x_t"][None], problem.node)[0], problem.g["x_hat"])


def test_mmps_is_the_posterior_mean(problem):
    method = MMPS(4, noise=problem.r, operator=problem.operator, measurement=problem.y)
    torch.testing.assert_close(problem.predict(method), problem.g["posterior_mean"], rtol=1e-8, atol=1e-8)


def test_tmpd_golden(problem):
    method = TMPD(problem.r, operator=problem.operator, measurement=problem.y)
    torch.testing.assert_close(problem.predict(method), problem.g["tmpd_mean"], rtol=1e-8, atol=1e-8)


def test_dps_golden(problem):
    method = DPS(0.7, operator=problem.operator, measurement=problem.y)
    expected = -0.7 * problem.g["grad_norm_residual"]
    torch.testing.assert_close(problem.shift(method), expected, rtol=1e-8, atol=1e-8)


def test_pigdm_golden(problem):
    given = {"operator": problem.operator, "inverse": problem.inverse, "measurement": problem.y}
    v = problem.g["pigdm_vjp"]
    torch.testing.assert_close(
        problem.shift(PiGDM(**given), 0.9), problem.alpha * 0.9 * v, rtol=1e-8, atol=1e-8
    )
    tweedie = problem.predict(PiGDM(rule="tweedie", **given))
    r2 = problem.sigma**2 / (problem.alpha**2 + problem.sigma**2)
    expected = problem.g["x_hat"] + problem.sigma**2 / problem.alpha / r2 * v
    torch.testing.assert_close(tweedie, expected, rtol=1e-8, atol=1e-8)


def test_stsl_without_its_trace_is_dps(problem):
    a = DPS(0.7, operator=problem.operator, measurement=problem.y)
    b = STSL(0.7, trace=0.0, operator=problem.operator, measurement=problem.y)
    torch.testing.assert_close(problem.shift(a), problem.shift(b))


@pytest.mark.parametrize(("schedule", "prediction"), SCHEDULES, ids=IDS)
def test_mmps_samples_the_posterior(schedule, prediction):
    """Every prediction is the posterior mean, so the run ends in N(y / (1 + r^2), r^2 / (1 + r^2))."""
    x, ks, r = start(schedule), levels(schedule), 0.5
    y = torch.full((len(x), 1), 1.5, dtype=torch.float64)
    method = MMPS(1, noise=r, operator=lambda x: x, measurement=y)
    denoiser = prior(schedule, prediction)
    out = fs.sample(denoiser, x, "dpmpp_2m", sigmas=ks, guidance=method)
    expected = flow_of_gaussian(schedule, ks, x, 1.5 / (1 + r**2), r**2 / (1 + r**2))
    assert float((out - expected).abs().max()) < 0.02
    assert denoiser.nfe == len(x) * (len(ks) - 1)


def test_mcg_ends_on_the_measurement():
    x, mask = noise(3, 6), torch.tensor([1.0, 0, 0, 1, 0, 0], dtype=torch.float64)
    y = noise(3, 6, seed=4)
    out = fs.sample(two_gaussians(), x, "ddim:eta=1", steps=10, guidance=MCG(0.1, mask=mask, measurement=y))
    assert torch.equal(out[:, mask > 0], y[:, mask > 0])
    assert not torch.allclose(out, y)


def test_dps_brings_the_sample_to_the_measurement():
    x, y = noise(64, 2), noise(64, 1, seed=4)

    def operator(x):
        return x[:, :1] + x[:, 1:]

    def miss(guidance):
        out = fs.sample(prior(VP.linear(), "epsilon"), x, "ddim:eta=1", steps=50, guidance=guidance)
        return float((operator(out) - y).abs().mean())

    assert miss(DPS(0.3, operator=operator, measurement=y)) < 0.3 * miss(None)


def test_gradients_with_cfg_and_under_no_grad():
    x = noise(2, 3).requires_grad_()
    method = CFG(2.0) + MMPS(
        1, noise=0.5, operator=lambda x: x, measurement=torch.ones(2, 3, dtype=torch.float64)
    )
    denoiser = two_gaussians()
    with torch.no_grad():
        out = fs.sample(denoiser, x, "ddim", steps=5, guidance=method)
    assert denoiser.nfe == 2 * 2 * 5 and not out.requires_grad
    assert torch.equal(out, fs.sample(two_gaussians(), x.detach(), "ddim", steps=5, guidance=method))


MISSING = [
    ClassifierGuidance(),
    EnergyGuidance(),
    RewardGuidance(),
    GradientFreeClassifierGuidance(),
    DPS(),
    MCG(),
    PiGDM(),
    MMPS(),
    TMPD(),
    STSL(),
]


@pytest.mark.parametrize("method", MISSING, ids=lambda m: m.name)
def test_what_is_missing_is_named(method):
    denoiser = two_gaussians()
    with pytest.raises(ValueError, match="needs"):
        fs.sample(denoiser, noise(2, 3), "ddim", guidance=method)
    assert denoiser.nfe == 0


def test_inference_mode_is_refused():
    method = MMPS(operator=lambda x: x, measurement=torch.zeros(2, 3))
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        fs.sample(two_gaussians(), noise(2, 3), guidance=method)


def test_nothing_is_added_where_there_is_no_signal():
    call = Call(torch.zeros(1, 2), Node(1.0, 0.0, 1.0), run_of([], "flow", schedule=Flow()), 0, 0, 0)
    method = ClassifierGuidance(log_prob=lambda x, t: x.sum(1))
    g = noise(1, 2)
    assert torch.equal(method.add(g, g, {}, call, None), g)
