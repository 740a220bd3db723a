"""Weak branches: autoguidance, and the same network disturbed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from guidance_runs import noise, two_gaussians

import fewstep as fs
from fewstep.guidance import CFG, PAG, SEG, SLG, STG, AdaptiveGuidance, AutoGuidance, smooth_queries

X = noise(2, 4)


def weak(x, t):
    return 0.5 * x


@pytest.mark.parametrize("method", [PAG, SEG, SLG, STG, AutoGuidance])
def test_a_branch_equal_to_the_condition_changes_nothing(method):
    plain = two_gaussians()
    expected = fs.sample(two_gaussians(), X, "ddim", steps=6, guidance=3.0)
    same = method(2.0, weak=plain.fn)
    torch.testing.assert_close(fs.sample(plain, X, "ddim", steps=6, guidance=CFG(3.0) + same), expected)


def test_formula_and_cost():
    denoiser, direct = two_gaussians(), two_gaussians()
    out = fs.sample(denoiser, X, "ddim", steps=6, guidance=CFG(3.0) + PAG(1.5, weak=weak))
    assert denoiser.nfe == 2 * 3 * 6
    c, u = direct.fn, direct.unconditional
    assert u is not None
    whole = fs.Denoiser(
        lambda x, t: u(x, t) + 3 * (c(x, t) - u(x, t)) + 1.5 * (c(x, t) - weak(x, t)),
        direct.noise_schedule,
        "epsilon",
    )
    torch.testing.assert_close(out, fs.sample(whole, X, "ddim", steps=6))
    alone = two_gaussians()
    fs.sample(alone, X, "ddim", steps=6, guidance=PAG(weak=weak))
    assert alone.nfe == 2 * 2 * 6 and alone.calls[0][0] == "conditional"


def test_autoguidance_is_cfg_against_the_weak_network():
    a, b = two_gaussians(), two_gaussians()
    b.unconditional = weak
    auto = fs.sample(a, X, "dpmpp_2m", steps=6, guidance=AutoGuidance(2.5, weak=weak))
    torch.testing.assert_close(auto, fs.sample(b, X, "dpmpp_2m", steps=6, guidance=2.5))
    assert a.nfe == b.nfe
    fs.sample(two_gaussians(branches={"autoguidance": weak}), X, guidance="autoguidance:2")
    denoiser = two_gaussians()
    fs.sample(denoiser, X, steps=6, guidance=AutoGuidance(1.0, weak=weak))
    assert denoiser.nfe == 2 * 6


def test_sharing_the_scale_with_cfg():
    w, a = 3.0, 0.25
    x, direct = noise(2, 4), two_gaussians()
    shared = CFG(1 + (w - 1) * (1 - a)) + AutoGuidance(1 + (w - 1) * a, weak=weak)
    c, u = direct.fn, direct.unconditional
    assert u is not None
    whole = fs.Denoiser(
        lambda x, t: c(x, t) + (w - 1) * (a * (c(x, t) - weak(x, t)) + (1 - a) * (c(x, t) - u(x, t))),
        direct.noise_schedule,
        "epsilon",
    )
    torch.testing.assert_close(
        fs.sample(two_gaussians(), x, "ddim", guidance=shared), fs.sample(whole, x, "ddim")
    )


def test_windows_golden(golden):
    g = golden.guidance("intervals")
    strict, open_ends = json.loads(str(g["slg_window_strict"])), json.loads(str(g["cfg_window"]))
    for (start, stop, n), expected, plain in zip(json.loads(str(g["windows"])), strict, open_ends):
        slg = SLG(start=start, stop=stop)
        assert [slg.active(i, n) for i in range(n)] == expected
        pag = PAG(start=start, stop=stop)
        assert [pag.active(i, n) for i in range(n)] == plain


def test_cost_of_a_window_and_after_the_threshold():
    denoiser = two_gaussians()
    fs.sample(denoiser, X, "ddim", steps=10, guidance=CFG(3.0) + SLG(start=0.1, stop=0.5, weak=weak))
    assert denoiser.nfe == 2 * (2 * 10 + 3)
    denoiser.nfe = 0  # adaptive guidance leaves out u, not the weak branch
    fs.sample(denoiser, X, "ddim", steps=10, guidance=CFG(3.0) + PAG(weak=weak) + AdaptiveGuidance(-1.0))
    assert denoiser.nfe == 2 * (2 * 10 + 1)


def test_a_missing_network_is_refused():
    with pytest.raises(ValueError, match=r"branches=\{'slg': fn\}"):
        fs.sample(two_gaussians(), X, guidance="cfg:3+slg")
    with pytest.raises(TypeError, match="must be callable"):
        PAG(weak=3)  # type: ignore[arg-type]


def test_smooth_queries():
    q = noise(2, 3, 6 * 5, 4)
    mean = smooth_queries(q, 6, 5, math.inf)
    torch.testing.assert_close(mean, q.mean(2, keepdim=True).expand_as(q))
    assert torch.equal(smooth_queries(q, 6, 5, 0.0), q)
    constant = torch.ones_like(q)
    torch.testing.assert_close(smooth_queries(constant, 6, 5, 1.5), constant, rtol=1e-6, atol=1e-6)
    spread = [float(smooth_queries(q, 6, 5, blur).std()) for blur in (0.0, 0.5, 1.0, 3.0)]
    assert spread == sorted(spread, reverse=True)
    impulse = torch.zeros(1, 1, 9 * 9, 1)
    impulse[0, 0, 40] = 1.0
    kernel = smooth_queries(impulse, 9, 9, 1.0).reshape(9, 9)
    at = np.exp(-0.5 * np.arange(-3, 4) ** 2)
    at /= at.sum()
    np.testing.assert_allclose(kernel[1:8, 1:8], np.outer(at, at), atol=1e-6)
    with pytest.raises(ValueError, match="not a grid"):
        smooth_queries(q, 5, 5, 1.0)
