"""Adaptive guidance: what is run, what it costs, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from guidance_runs import drive, noise, two_gaussians

import fewstep as fs
from fewstep.guidance import APG, CADS, CFG, AdaptiveGuidance


@pytest.mark.parametrize("policy", ["per_sample", "all", "any"])
def test_golden(golden, policy):
    g = golden.guidance("adaptive_guidance")
    c, u = g["cond"], g["uncond"]
    steps, batch = c.shape[:2]
    for threshold, expected in zip(g["thresholds"], g[f"uncond_evaluated_{policy}"]):
        guidance = CFG(7.0) + AdaptiveGuidance(float(threshold), policy=policy, space="network")
        out, session = drive(guidance, c, u)
        rows = [r.rows.get("unconditional", 0) for r in session.trace]
        expected_rows = expected.sum(1) if expected.ndim == 2 else expected * batch
        assert rows == expected_rows.tolist()
        assert session.nfe == steps * batch + sum(rows)
        for i, record in enumerate(session.trace):
            if record.cosine is not None:
                measured = ~torch.isnan(record.cosine)
                np.testing.assert_allclose(
                    record.cosine[measured], g["cosine"][i][measured.numpy()], atol=1e-6
                )
            mask = torch.as_tensor(np.broadcast_to(np.atleast_1d(expected[i]), batch).copy())
            guided = torch.lerp(torch.from_numpy(u[i]), torch.from_numpy(c[i]), 7.0)
            want = torch.where(mask[:, None, None, None], guided, torch.from_numpy(c[i]))
            assert torch.equal(out[i], want)


X = noise(4, 8)
POLICIES = ["all", "any", "per_sample"]


@pytest.mark.parametrize("solver", ["ddim", "unipc", "heun"])
def test_above_one_is_cfg(solver):
    a, b = two_gaussians(), two_gaussians()
    plain = fs.sample(a, X, solver, steps=6, guidance=4.0)
    assert torch.equal(fs.sample(b, X, solver, steps=6, guidance=CFG(4.0) + AdaptiveGuidance(1.01)), plain)
    assert a.nfe == b.nfe


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("solver", "stages"), [("ddim", 1), ("dpmpp_2m", 1), ("heun", 2)])
def test_minus_one_guides_one_step(policy, solver, stages):
    denoiser = two_gaussians()
    total = fs.compile(solver, fs.schedules.make_grid(denoiser.noise_schedule, 6)).nfe
    fs.sample(denoiser, X, solver, steps=6, guidance=CFG(4.0) + AdaptiveGuidance(-1.0, policy=policy))
    assert denoiser.nfe == 4 * (total + stages)
    denoiser.nfe = 0
    more = AdaptiveGuidance(-1.0, policy=policy, min_guided_steps=3)
    fs.sample(denoiser, X, solver, steps=6, guidance=CFG(4.0) + more)
    assert denoiser.nfe == 4 * (total + 3 * stages)


def test_a_sample_does_not_depend_on_the_others():
    guidance = CFG(4.0) + AdaptiveGuidance(0.9, policy="per_sample")
    one_by_one = [two_gaussians() for _ in X]
    alone = torch.cat(
        [
            fs.sample(d, X[i : i + 1], "dpmpp_2m", steps=10, guidance=guidance)
            for i, d in enumerate(one_by_one)
        ]
    )
    together = two_gaussians()
    torch.testing.assert_close(fs.sample(together, X, "dpmpp_2m", steps=10, guidance=guidance), alone)
    assert together.nfe == sum(d.nfe for d in one_by_one)
    assert len({d.nfe for d in one_by_one}) > 1  # they do not all agree at once


def test_text_and_windows():
    denoiser = two_gaussians()
    fs.sample(denoiser, X, "ddim", steps=10, guidance="cfg:4,start=0.3+adaptive:-1")
    assert denoiser.nfe == 4 * 11
    denoiser.nfe = 0
    fs.sample(denoiser, X, "ddim", steps=10, guidance="apg:4+adaptive:threshold=2")
    assert denoiser.nfe == 4 * 20


def test_momentum_stays_when_latched():
    c, u = noise(5, 1, 6), noise(5, 1, 6, seed=1)
    out, session = drive(APG(3.0) + AdaptiveGuidance(-1.0), c, u)
    assert all(torch.equal(a, b) for a, b in zip(out[1:], c[1:])) and session.nfe == 6


def test_not_measured_while_the_condition_is_noised():
    denoiser = two_gaussians(condition=torch.ones(4, 6, dtype=torch.float64))
    fs.sample(
        denoiser,
        X,
        "ddim",
        steps=10,
        guidance=CFG(4.0) + CADS(time="index", tau1=0.5) + AdaptiveGuidance(-1.0),
    )
    assert denoiser.nfe == 4 * (10 + 6)  # steps 0 to 4 are noised, step 5 is measured


def test_needs_a_scale_and_known_steps():
    with pytest.raises(ValueError, match=r"add fs\.CFG\(w\)"):
        fs.sample(two_gaussians(), X, guidance=AdaptiveGuidance())
    with pytest.raises(ValueError, match=r"use fs\.sample"):
        fs.sample_adaptive(two_gaussians(), X, guidance=CFG(2.0) + AdaptiveGuidance())
