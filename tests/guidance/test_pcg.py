"""CFG as predictor-corrector: trajectories, variances in closed form, cost."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from guidance_runs import noise, run_of, two_gaussians, vp_node

import fewstep as fs
from fewstep.guidance import APG, CFG, PCG, AdaptiveGuidance
from fewstep.schedules import EDM, VP, TimeGrid


def grid_of(acp) -> TimeGrid:
    acp = np.sort(acp)
    nodes = [vp_node(a, t=float(len(acp) - i)) for i, a in enumerate(acp)]
    if acp[-1] == 1.0:
        nodes[-1] = nodes[-1]._replace(sigma=0.0)
    t, alpha, sigma = (np.array(v) for v in zip(*nodes))
    return TimeGrid(t, alpha, sigma, VP.linear())


def simulate(guidance, grid, x, networks, draws):
    """States at every node. Networks give epsilon; ``draws`` are the normals in the order of use."""
    used = iter(draws)
    program = fs.compile("ddim", grid, prediction="epsilon")
    run = run_of(program.evaluations, "epsilon", end=grid[-1], noise=lambda like, *key: next(used))
    session = guidance.session(run)

    def evaluate(name, x, node, rows=None):
        return networks[name](x, node)

    stepper, states = fs.Stepper(program, x), [x]
    while not stepper.done:
        stepper.x = session.move(stepper.x, stepper.node, evaluate)
        if session.index:
            states.append(stepper.x)
        call = session.begin(stepper.x, stepper.node, evaluate)
        stepper.step(session.finish(call, {k: networks[k](stepper.x, stepper.node) for k in call.branches}))
    states.append(session.move(stepper.x, grid[-1], evaluate))
    return torch.stack(states), session


def gaussian_eps(mean, variance):
    return lambda x, n: n.sigma * (x - n.alpha * mean) / (n.alpha**2 * variance + n.sigma**2)


@pytest.mark.parametrize("rule", ["ddpm", "log"])
@pytest.mark.parametrize("case", range(4))
def test_golden(golden, case, rule):
    g = golden.guidance("pcg_gaussian")
    p = json.loads(str(g["params"]))
    gamma, k = g["vp_cases_gamma_K"][case]
    networks = {
        "conditional": gaussian_eps(p["mc"], p["vc"]),
        "unconditional": gaussian_eps(p["mu"], p["vu"]),
    }
    guidance = PCG(float(gamma), steps=int(k), rule=rule, limit=0.0)
    draws = [torch.from_numpy(n)[:, None] for n in g[f"noise_{case}"]]
    x = torch.from_numpy(g[f"xT_{case}"])[:, None]
    expected = g[f"x_{case}_{rule}"]
    states, session = simulate(guidance, grid_of(g["alphas_cumprod"]), x, networks, draws)
    np.testing.assert_allclose(states[: len(expected), :, 0], expected, atol=1e-9)
    n = len(session.run.nodes)
    cost = 2 if gamma != 1.0 else 1  # the score of the condition alone
    assert session.nfe == len(x) * (n + cost * k * (n - 1))


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("rule", ["ddpm", "log"])
def test_mean_and_variance_golden(golden, case, rule):
    """The affine map of a step, measured on two states and one noise, carries mean and variance."""
    g = golden.guidance("pcg_gaussian")
    p = json.loads(str(g["params"]))
    gamma, k = float(g["vp_cases_gamma_K"][case][0]), int(g["vp_cases_gamma_K"][case][1])
    networks = {
        "conditional": gaussian_eps(p["mc"], p["vc"]),
        "unconditional": gaussian_eps(p["mu"], p["vu"]),
    }
    grid = grid_of(g["alphas_cumprod"])
    draws = k * (grid.steps - 1)
    # column 0: from 0 without noise; 1: from 1; 2 + j: noise j alone
    x = torch.zeros(2 + draws, 1, dtype=torch.float64)
    x[1] = 1.0
    unit = torch.eye(2 + draws, dtype=torch.float64)[2:, :, None]
    states, _ = simulate(PCG(gamma, steps=k, rule=rule, limit=0.0), grid, x, networks, list(unit))
    mean = states[:, 0, 0]
    variance = ((states[:, 1:, 0] - mean[:, None]) ** 2).sum(1)
    count = len(g[f"mean_{case}_{rule}"])
    np.testing.assert_allclose(mean[1 : 1 + count], g[f"mean_{case}_{rule}"], atol=1e-9)
    np.testing.assert_allclose(variance[1 : 1 + count], g[f"var_{case}_{rule}"], atol=1e-9)


def closed_form(gamma: float, k: int) -> float:
    r = np.polynomial.legendre.leggauss(200)
    nodes, weights = 1.5 + r[0] / 2, r[1] / 2
    q = k * (1.0 - gamma)
    return k * 2.0**q * float(np.sum(weights * (nodes - 1.0) ** (k - 1) * nodes ** (-q)))


def test_closed_forms_golden(golden):
    g = golden.guidance("pcg_gaussian")
    table = [[closed_form(float(gamma), int(k)) for k in g["K"]] for gamma in g["gamma"]]
    np.testing.assert_allclose(table, g["pcg_var_gamma_by_K"], atol=1e-10)
    for gamma, ddim, ddpm, powered in zip(g["gamma"], g["ddim_var"], g["ddpm_var"], g["powered_var"]):
        assert abs(2 ** (1 - gamma) - ddim) < 1e-10 and abs(2 / (1 + gamma) - powered) < 1e-10
        assert abs((2 - 2 ** (2 - 2 * gamma)) / (2 * gamma - 1) - ddpm) < 1e-10
        # K = 1 is DDPM under CFG at (1 + gamma) / 2
        w = (1 + gamma) / 2
        assert abs(closed_form(float(gamma), 1) - (2 - 2 ** (2 - 2 * w)) / (2 * w - 1)) < 1e-10


def affine_variance(gamma: float, k: int, n: int, top: float = 400.0) -> float:
    """Variance that PCG ends with on N(0, 1) and N(0, 2) under a variance exploding schedule, by its own steps."""
    sigma2 = top * (np.arange(n, -1, -1) / n) ** 3
    grid = TimeGrid.from_levels(EDM(1e-9, 100.0), np.sqrt(sigma2))
    pcg = PCG(gamma, steps=k, rule="log", limit=0.0)
    variance = 1.0 + top
    for s, t in grid.intervals():
        variance *= (1.0 + (t.sigma / s.sigma - 1.0) * s.sigma**2 / (1.0 + s.sigma**2)) ** 2
        if t.sigma > 0.0:
            # the move, by its own step size, in the frame of the state
            q2 = 1.0 + t.sigma**2
            delta = pcg.step_size(s, t)
            rate = gamma / (1.0 + t.sigma**2) + (1.0 - gamma) / (2.0 + t.sigma**2)
            for _ in range(k):
                variance = variance * (1.0 - 0.5 * delta * q2 * rate) ** 2 + delta * q2
    return variance


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("gamma", [1.0, 2.0, 5.0])
def test_variance_tends_to_the_closed_form(gamma, k):
    coarse, fine = (abs(affine_variance(gamma, k, n) - closed_form(gamma, k)) for n in (2000, 8000))
    assert fine < 2e-2 and (fine < coarse or fine < 1e-3)


def test_equivalence_with_ddpm_under_cfg_halves_with_the_step():
    """gamma = 2 w - 1 with K = 1 against DDPM under CFG at w: the mean of the result, in the limit."""
    w = 3.0

    def final_variance(n, guidance, solver):
        grid = TimeGrid.from_levels(EDM(1e-6, 200.0), np.sqrt(400.0 * (np.arange(n, -1, -1) / n) ** 3))
        networks = {"conditional": gaussian_eps(0.0, 1.0), "unconditional": gaussian_eps(0.0, 2.0)}
        program = fs.compile(solver, grid, prediction="epsilon")
        draws = n
        start = torch.zeros(2 + draws, 1, dtype=torch.float64)
        start[1] = math.sqrt(401.0)
        unit = list(torch.eye(2 + draws, dtype=torch.float64)[2:, :, None])
        used = iter(unit)
        run = run_of(program.evaluations, "epsilon", end=grid[-1], noise=lambda like, *key: next(used))
        session = guidance.session(run)
        evaluate = lambda name, x, node, rows=None: networks[name](x, node)  # noqa: E731
        stepper = fs.Stepper(program, start, lambda like, start, stop: next(used))
        while not stepper.done:
            if session.moves:
                stepper.x = session.move(stepper.x, stepper.node, evaluate)
            call = session.begin(stepper.x, stepper.node, evaluate)
            stepper.step(
                session.finish(call, {k: networks[k](stepper.x, stepper.node) for k in call.branches})
            )
        return float((stepper.x[1:] ** 2).sum())

    gaps = []
    for n in (200, 400):
        pcg = final_variance(n, PCG(2 * w - 1, limit=0.0), "ddim")
        ddpm = final_variance(n, CFG(w), "ddim:eta=1")
        gaps.append(abs(pcg - ddpm))
    assert 1.6 < gaps[0] / gaps[1] < 2.4


def test_without_steps_it_is_conditional_ddim():
    x = noise(3, 4)
    for gamma in (1.0, 5.0):
        denoiser = two_gaussians()
        out = fs.sample(denoiser, x, "ddim", steps=6, guidance=PCG(gamma, steps=0))
        assert torch.equal(out, fs.sample(two_gaussians(), x, "ddim", steps=6)) and denoiser.nfe == 3 * 6


@pytest.mark.parametrize("schedule", [VP.linear(), EDM()], ids=["vp", "edm"])
def test_gamma_one_leaves_the_marginal(schedule):
    """The corrector alone, many times at one level: the variance grows by O(delta) only."""
    grid = fs.schedules.make_grid(schedule, 40, "log_snr" if schedule.frame == "vp" else "karras")
    s, t = grid[20], grid[21]
    pcg = PCG(1.0)
    delta, q2 = pcg.step_size(s, t), t.alpha**2 + t.sigma**2
    variance = t.alpha**2 * 0.25 + t.sigma**2
    v = variance
    for _ in range(500):
        v = v * (1.0 - 0.5 * delta * q2 / variance) ** 2 + delta * q2
    assert abs(v / variance - 1.0 / (1.0 - delta * q2 / (4 * variance))) < 1e-6


@pytest.mark.parametrize("k", [1, 2])
def test_cost_seeds_and_shaping(k):
    x, denoiser = noise(2, 4), two_gaussians()
    a = fs.sample(denoiser, x, "ddim", steps=7, guidance=PCG(4.0, steps=k), seed=1)
    assert denoiser.nfe == 2 * (7 * (1 + 2 * k) - 2 * k)
    assert torch.equal(a, fs.sample(two_gaussians(), x, "ddim", steps=7, guidance=PCG(4.0, steps=k), seed=1))
    assert not torch.equal(
        a, fs.sample(two_gaussians(), x, "ddim", steps=7, guidance=PCG(4.0, steps=k), seed=2)
    )
    alone = fs.sample(two_gaussians(), x[1:], "ddim", steps=7, guidance=PCG(4.0, steps=k), seed=[2])
    torch.testing.assert_close(a[1:], alone)
    shaped = fs.sample(
        two_gaussians(), x, "ddim", steps=7, guidance=PCG(4.0, steps=k) + APG(norm=0.5), seed=1
    )
    assert not torch.equal(a, shaped)


def test_refusals():
    x = noise(2, 4)
    for solver in ("dpmpp_2m", "unipc", "heun"):
        with pytest.raises(ValueError, match=r"such as ddim, euler"):
            fs.sample(two_gaussians(), x, solver, guidance=PCG())
    with pytest.raises(ValueError, match="keep one"):
        _ = PCG() + AdaptiveGuidance()
    with pytest.raises(ValueError, match="both give a scale"):
        _ = PCG() + CFG(3.0)
