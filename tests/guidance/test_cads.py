"""Condition-annealed sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from guidance_runs import noise, two_gaussians

import fewstep as fs
from fewstep.guidance import CADS, CFG
from fewstep.schedules import EDM, VP, Flow


def test_gamma_golden(golden):
    g = golden.guidance("cads")
    for (tau1, tau2), gamma in zip(g["tau"], g["gamma"]):
        cads = CADS(tau1=float(tau1), tau2=float(tau2))
        np.testing.assert_allclose([cads.gamma(float(t)) for t in g["t"]], gamma, atol=1e-15)


@pytest.mark.parametrize(("stats", "key"), [("global", "out_global"), ("sample", "out_per_sample")])
def test_condition_golden(golden, stats, key):
    g = golden.guidance("cads")
    y, n = torch.from_numpy(g["y"]), torch.from_numpy(g["noise"])
    for (gamma, s, psi), expected in zip(g["cases_gamma_s_psi"], g[key]):
        out = CADS(float(s), mix=float(psi), stats=stats).anneal(y, float(gamma), n)
        np.testing.assert_allclose(out, expected, atol=1e-10)


def test_moments_are_kept():
    y, n = 3 + 2 * noise(2, 7, 16), noise(2, 7, 16, seed=1)
    out = CADS(0.25).anneal(y, 0.3, n)
    assert not torch.allclose(out, y)
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(out.flatten(1), 1), statistic(y.flatten(1), 1))


def test_identities():
    y, n = noise(2, 7, 16), noise(2, 7, 16, seed=1)
    torch.testing.assert_close(CADS(0.0).anneal(y, 0.3, n), y)
    assert torch.equal(CADS(0.0).anneal(y, 0.0, n), torch.zeros_like(y))
    assert CADS(tau1=1.0, tau2=1.0).gamma(1.0) == 1.0


def conditional(schedule=None, n=2) -> fs.Denoiser:
    y = 1.0 + torch.arange(n * 6, dtype=torch.float64).reshape(n, 6) / 6
    return two_gaussians(schedule, condition=y)


@pytest.mark.parametrize("schedule", [VP.linear(), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_a_run_starts_without_the_condition_and_ends_with_it(schedule):
    run = fs.guidance.Run(schedule, "epsilon")
    top = fs.schedules.TimeGrid.from_levels(schedule, [schedule.level_max, schedule.level_min])
    assert CADS().gamma(run.time(top[0])) == 0.0 and CADS().gamma(run.time(top[1])) == 1.0


def test_same_seed_same_run_and_each_sample_for_itself():
    x = noise(2, 4)
    # rescaling would keep the mean, which is all that this network sees of the condition
    guidance = CFG(3.0) + CADS(0.5, mix=0.0)
    kwargs = {"steps": 8, "guidance": guidance}
    first = fs.sample(conditional(), x, "ddim", seed=3, **kwargs)
    assert torch.equal(first, fs.sample(conditional(), x, "ddim", seed=3, **kwargs))
    assert not torch.equal(first, fs.sample(conditional(), x, "ddim", seed=4, **kwargs))
    assert not torch.equal(first, fs.sample(conditional(), x, "ddim", seed=3, steps=8, guidance=3.0))
    one = conditional()
    assert one.condition is not None
    one.condition = one.condition[1:]
    torch.testing.assert_close(fs.sample(one, x[1:], "ddim", seed=[4], **kwargs), first[1:])


def test_identity_settings_and_cost():
    x, plain, noised = noise(2, 4), conditional(), conditional()
    expected = fs.sample(plain, x, "ddim", steps=8, guidance=3.0)
    same = fs.sample(noised, x, "ddim", steps=8, guidance=CFG(3.0) + CADS(tau1=1.0, tau2=1.0))
    assert torch.equal(same, expected) and plain.nfe == noised.nfe


def test_one_noise_a_step_and_the_unconditional_branch_sees_none():
    seen = []
    base = conditional(EDM())
    network = base.fn

    def spy(x, t, y):
        seen.append(y.clone())
        return network(x, t, y)

    base.fn = spy
    cads = CADS(0.5, mix=0.0)
    fs.sample(base, 10 * noise(2, 4), "heun", sigmas=[10.0, 5.0, 1.0], guidance=CFG(3.0) + cads)
    assert base.condition is not None
    y, gamma = base.condition, cads.gamma(5.0 / 6.0)
    drawn = seen[0] / 0.5  # nothing of the condition at k = 10
    torch.testing.assert_close(seen[1], gamma**0.5 * y + 0.5 * (1 - gamma) ** 0.5 * drawn)
    assert not torch.allclose(seen[2], seen[1])  # the same level in the next step
    assert torch.equal(seen[3], y)  # k = 1


def test_index_time():
    cads = CADS(time="index", tau1=0.5, tau2=0.9)
    denoiser, seen = conditional(), []
    network, clean = denoiser.fn, denoiser.condition
    assert clean is not None
    denoiser.fn = lambda x, t, y: (seen.append(torch.equal(y, clean)), network(x, t, y))[1]
    fs.sample(denoiser, noise(2, 4), "ddim", steps=8, guidance=cads)
    assert seen == [i >= 4 for i in range(8)]


def test_refusals():
    with pytest.raises(ValueError, match="tau1 <= tau2"):
        fs.sample(conditional(), noise(2, 4), guidance=CADS(tau1=0.9, tau2=0.6))
    with pytest.raises(ValueError, match=r"condition=y"):
        fs.sample(two_gaussians(), noise(2, 4), guidance=CADS() + CFG(2.0))
    with pytest.raises(ValueError, match="seeds for a batch"):
        fs.sample(conditional(), noise(2, 4), guidance=CADS(), seed=[1, 2, 3])
