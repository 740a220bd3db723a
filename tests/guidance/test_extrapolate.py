"""Extrapolation at run time: FSampler's runs, the linear program, cost, and both branches."""

from __future__ import annotations

import re

import golden_files
import numpy as np
import pytest
import torch
from golden_quirks import fsampler
from guidance_runs import noise, two_gaussians

import fewstep as fs
from fewstep.guidance import CFG, PCG, AdaptiveGuidance, Extrapolate
from fewstep.schedules import EDM, VP, Flow

X = noise(3, 6)


def of(meta) -> Extrapolate | None:
    """FSampler's switches in fewstep's words."""
    given = meta["kwargs"]
    mode, adaptive = given.get("skip_mode", "none"), given.get("adaptive_mode", "")
    options = {
        "protect_first": given.get("protect_first_steps", 2),
        "protect_last": given.get("protect_last_steps", 2),
        "smoothing": given.get("smoothing_beta", 0.9),
        "learning": "learning" in adaptive or "learn" in adaptive,
        "gradient": "grad_est" in adaptive,
        "sigma_aware": given.get("sigma_aware", False),
        "variable": "denoised" if given.get("extrapolate_denoised") else "epsilon",
    }
    if "skip_indices" in given:
        words = re.split(r"[\s,]+", given["skip_indices"].strip())
        pattern = words.pop(0) if words[0].startswith("h") else "h2"
        return Extrapolate(
            pattern, norms="batch", **options | {"indices": tuple(map(int, words)), "learning": True}
        )
    if mode == "none":
        return None
    if mode == "adaptive":
        options |= {"max_skips": given["max_consecutive_skips"], "anchor": given["anchor_interval"]}
        options["gate"] = "adams" if meta["sampler"] == "dpmpp_2m" else "euler"
    return Extrapolate(mode, norms="batch", **options)


def _data_dependent(name: str) -> bool:
    given = golden_files.load().case(name).meta["kwargs"]
    return "adaptive_mode" in given or "skip_indices" in given or given.get("skip_mode") == "adaptive"


CASES = golden_files.load().names("fs")
CASES = [
    n for n in CASES if golden_files.load().case(n).meta["sampler"] in ("euler", "ddim") or _data_dependent(n)
]
CASES = [n for n in CASES if of(golden_files.load().case(n).meta) is not None]


@pytest.mark.parametrize("name", CASES)
def test_golden(golden, name):
    case, level = golden.case(name), [0.0]
    denoiser = fs.Denoiser(
        lambda x, t: torch.from_numpy(case.mixture.denoised(x.numpy(), 1.0, level[0])),
        EDM(1e-6, 1e4),
        "denoised",
    )
    run = denoiser.run

    def exact(network, x, node, condition=None):  # the network's own t is in single precision
        level[0] = node.sigma
        return run(network, x, node, condition)

    denoiser.run = exact
    sampler = case.meta["sampler"]
    solver = sampler if sampler in ("euler", "ddim") else fsampler(sampler, "")
    x = torch.from_numpy(case["x_init"])
    out = fs.sample(denoiser, x, solver, sigmas=case["sigmas"], guidance=of(case.meta))
    assert np.abs(out.numpy() - case["x_final"]).max() <= case.tol
    assert denoiser.nfe == case.meta["nfe"] * len(x)


@pytest.mark.parametrize("schedule", [VP.linear(), EDM(), Flow()], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("options", ["h2/s2", "h3/s3", "h2/s2,variable=denoised", "h3/s4,sigma_aware=true"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun"])
def test_fixed_patterns_are_the_linear_program(schedule, options, solver):
    prediction = {"vp": "epsilon", "edm": "denoised", "flow": "flow"}[schedule.frame]
    x = X * min(schedule.level_max, 80.0) if schedule.frame == "edm" else X
    a, b = (two_gaussians(schedule, prediction) for _ in range(2))
    program = fs.sample(
        a,
        x,
        f"{solver}+skip:{options}",
        steps=14,
        schedule="log_snr" if schedule.frame != "flow" else "arctan",
    )
    at_run_time = fs.sample(
        b,
        x,
        solver,
        steps=14,
        schedule="log_snr" if schedule.frame != "flow" else "arctan",
        guidance=f"extrapolate:{options}",
    )
    torch.testing.assert_close(at_run_time, program, rtol=1e-6, atol=1e-6)
    assert a.nfe == b.nfe


def test_cost_with_guidance_and_of_the_unconditional_branch_alone():
    both, one = two_gaussians(), two_gaussians()
    fs.sample(both, X, "dpmpp_2m", steps=14, guidance=CFG(3.0) + Extrapolate("h2/s2"))
    skipped = 4 - 1  # steps 4, 7, 10 of 14, the last two protected
    assert both.nfe == 3 * 2 * (14 - skipped)
    fs.sample(one, X, "dpmpp_2m", steps=14, guidance=CFG(3.0) + Extrapolate("h2/s2", branch="unconditional"))
    assert one.nfe == 3 * (2 * 14 - skipped)


def test_records_say_what_was_skipped():
    denoiser = two_gaussians()
    predictor_run = []
    original = fs.guidance.Session.finish

    def spy(self, call, predictions):
        out = original(self, call, predictions)
        predictor_run[:] = self.trace
        return out

    fs.guidance.Session.finish = spy
    try:
        fs.sample(denoiser, X, "ddim", steps=10, guidance=CFG(3.0) + Extrapolate("h2", indices=(3, 4, 7)))
    finally:
        fs.guidance.Session.finish = original
    assert [r.step for r in predictor_run if r.skipped] == [3, 4, 7]
    assert denoiser.nfe == sum(sum(r.rows.values()) for r in predictor_run) == 3 * 2 * 7


def test_validators_ask_the_network_instead():
    """Values that shrink to nothing: the continuation of 1, 0.5 is 0."""
    calls = []

    def network(x, t):
        calls.append(float(t[0]))
        return x - 0.5 ** len(calls) * torch.ones_like(x)  # e = x_0 - x = -0.5^n

    sigmas = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 0.0]
    options = {"sigmas": sigmas, "solver": "euler"}
    extrapolate = Extrapolate("h2", variable="epsilon", indices=(2,), protect_last=0)
    fs.sample(fs.Denoiser(network, EDM(), "denoised"), X, guidance=extrapolate, **options)
    assert len(calls) == 7
    calls.clear()
    loose = Extrapolate("h2", variable="epsilon", indices=(2,), protect_last=0, validate=False)
    fs.sample(fs.Denoiser(network, EDM(), "denoised"), X, guidance=loose, **options)
    assert len(calls) == 6


def test_samples_do_not_see_each_other_by_default():
    guidance = Extrapolate("h2/s2", variable="epsilon", learning=True, gradient=True)
    together = fs.sample(two_gaussians(), X, "ddim", steps=12, guidance=guidance)
    alone = fs.sample(two_gaussians(), X[1:2], "ddim", steps=12, guidance=guidance)
    torch.testing.assert_close(together[1:2], alone)


def test_refusals():
    with pytest.raises(ValueError, match=r"h2/s2 to h2/s6"):
        Extrapolate("h5")
    with pytest.raises(ValueError, match="not both"):
        Extrapolate("adaptive", indices=(3,))
    with pytest.raises(ValueError, match="variable=epsilon"):
        Extrapolate(gradient=True, variable="denoised")
    with pytest.raises(ValueError, match=r"add fs\.CFG"):
        fs.sample(two_gaussians(), X, guidance=Extrapolate(branch="unconditional"))
    with pytest.raises(ValueError, match="keep one"):
        _ = Extrapolate(branch="unconditional") + AdaptiveGuidance()
    with pytest.raises(ValueError, match="cannot join"):
        fs.sample(two_gaussians(), X, "ddim", guidance=PCG() + Extrapolate())
