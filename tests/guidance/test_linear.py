"""LinearAG: fitted numbers, cost, and files that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from guidance_runs import noise, two_gaussians

import fewstep as fs
from fewstep.guidance import CFG, AdaptiveGuidance, LinearAG, LinearCoefficients, Recorder, fit_linear


def matrix(rows, size):
    return np.array([[*row, *[0.0] * (size - len(row))] for row in rows])


def test_planted_coefficients_golden(golden):
    g = golden.guidance("linear_ag")
    fit = fit_linear(torch.from_numpy(g["cond"]), torch.from_numpy(g["uncond"]))
    n = len(g["true_c"])
    np.testing.assert_allclose(matrix(fit.conditional, n)[1:], g["true_c"][1:], atol=1e-8)
    np.testing.assert_allclose(matrix(fit.unconditional, n)[1:], g["true_u"][1:], atol=1e-8)


@pytest.mark.parametrize(("intercept", "key"), [(False, "ols_noisy"), (True, "ols_noisy_bias")])
def test_least_squares_golden(golden, intercept, key):
    g = golden.guidance("linear_ag")
    fit = fit_linear(
        torch.from_numpy(g["cond"]), torch.from_numpy(g["uncond"] + g["uncond_noise"]), intercept=intercept
    )
    n = len(g["true_c"])
    np.testing.assert_allclose(matrix(fit.conditional, n)[1:], g[f"{key}_c"][1:], atol=1e-7)
    np.testing.assert_allclose(matrix(fit.unconditional, n)[1:], g[f"{key}_u"][1:], atol=1e-7)
    if intercept:
        np.testing.assert_allclose(fit.intercept, g[f"{key}_b"], atol=1e-7)


def test_ridge_and_used_predictions():
    c, u = noise(30, 4, 6), noise(30, 4, 6, seed=1)
    free, held = fit_linear(c, u), fit_linear(c, u, ridge=1e3)
    assert np.abs(matrix(held.conditional, 4)).max() < 0.1 * np.abs(matrix(free.conditional, 4)).max()
    in_use = fit_linear(c, u, evaluate=[0])
    assert in_use.conditional[1] == free.conditional[1] and in_use.conditional[2] != free.conditional[2]


X = noise(6, 5)


def recorded(solver="dpmpp_2m", guidance=3.0, steps=6, **kwargs):
    recorder = Recorder()
    for seed in range(4):
        fs.sample(
            two_gaussians(),
            noise(6, 5, seed=10 + seed),
            solver,
            steps=steps,
            guidance=CFG(guidance) + recorder,
        )
    return recorder.fit(**kwargs)


def test_recording_changes_nothing():
    plain = fs.sample(two_gaussians(), X, "dpmpp_2m", steps=6, guidance=3.0)
    assert torch.equal(
        fs.sample(two_gaussians(), X, "dpmpp_2m", steps=6, guidance=CFG(3.0) + Recorder()), plain
    )


@pytest.mark.parametrize(("evaluate", "count"), [((), 2), ((0,), 1), ((0, 1, 4), 3)])
def test_it_is_cfg_where_u_is_in_the_span_and_costs_what_it_says(evaluate, count):
    """On Gaussians u is an affine function of what came before: with an intercept nothing is lost."""
    fit, denoiser = recorded(intercept=True), two_gaussians()
    plain = fs.sample(two_gaussians(), X, "dpmpp_2m", steps=6, guidance=3.0)
    out = fs.sample(
        denoiser, X, "dpmpp_2m", steps=6, guidance=CFG(3.0) + LinearAG(coefficients=fit, evaluate=evaluate)
    )
    torch.testing.assert_close(out, plain, rtol=1e-7, atol=1e-7)
    assert denoiser.nfe == 6 * (6 + count)


def test_conditional_from():
    denoiser = two_gaussians()
    linear = LinearAG(coefficients=recorded(), evaluate=(0, 1, 2, 3, 4, 5), conditional_from=0.5)
    fs.sample(denoiser, X, "dpmpp_2m", steps=6, guidance=CFG(3.0) + linear)
    assert denoiser.nfe == 6 * (6 + 3)


def test_files(tmp_path):
    fit = recorded()
    fit.save(tmp_path / "linear.json")
    assert LinearCoefficients.load(tmp_path / "linear.json") == fit
    fs.sample(
        two_gaussians(), X, "dpmpp_2m", steps=6, guidance=f"cfg:3+linear:file={tmp_path / 'linear.json'}"
    )
    (tmp_path / "other.json").write_text(json.dumps({"format": 1, "a": 2}))
    for name, words in (("other.json", "does not hold"), ("none.json", "cannot read")):
        with pytest.raises(ValueError, match=words):
            fs.sample(two_gaussians(), X, guidance=f"cfg:3+linear:file={tmp_path / name}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"solver": "ddim"}, "solver 'dpmpp_2m', this run has 'ddim'"),
        ({"steps": 7}, "6 evaluations, this run has 7"),
        ({"schedule": "karras"}, "at other times"),
        ({"guidance": 4.0}, "guidance"),
        ({"prediction": "v"}, "prediction 'epsilon', this run has 'v'"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_a_mismatch_is_refused(change, words):
    fit = recorded()
    denoiser = two_gaussians(prediction=change.get("prediction", "epsilon"))
    kwargs = {"solver": "dpmpp_2m", "steps": 6} | {
        k: v for k, v in change.items() if k in ("solver", "steps", "schedule")
    }
    with pytest.raises(ValueError, match=words):
        fs.sample(
            denoiser, X, guidance=CFG(change.get("guidance", 3.0)) + LinearAG(coefficients=fit), **kwargs
        )
    assert denoiser.nfe == 0


def test_refusals():
    fit = recorded()
    cases = [
        (CFG(3.0) + LinearAG(coefficients=fit, evaluate=(1, 2)), "evaluation 0"),
        (CFG(3.0) + LinearAG(), "record runs"),
        (CFG(3.0, high=2.0) + LinearAG(coefficients=fit), "interval"),
    ]
    for guidance, words in cases:
        with pytest.raises(ValueError, match=words):
            fs.sample(two_gaussians(), X, "dpmpp_2m", steps=6, guidance=guidance)
    with pytest.raises(ValueError, match="keep one"):
        _ = LinearAG() + AdaptiveGuidance()
    with pytest.raises(ValueError, match="nothing is recorded"):
        Recorder().fit()
