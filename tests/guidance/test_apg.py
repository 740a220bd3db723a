"""Adaptive projected guidance."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from guidance_runs import EDM_NODE, drive, noise, run_of, two_gaussians, vp_node

import fewstep as fs
from fewstep.guidance import APG, CFG, Rescale


def of(case, **kwargs) -> APG:
    return APG(case["w"], eta=case["eta"], norm=case["r"], momentum=case["beta"] or 0.0, **kwargs)


@pytest.mark.parametrize("file", ["apg_4d", "apg_5d"])
@pytest.mark.parametrize("form", ["paper", "diffusers", "comfy"])
def test_golden(golden, file, form):
    g = golden.guidance(file)
    key = {"diffusers": "diffusers_default"}.get(form, form)
    for j, case in enumerate(json.loads(str(g["cases"]))):
        if f"{key}_{j}" in g:
            out, _ = drive(of(case, form=form), g["cond"], g["uncond"])
            np.testing.assert_allclose(torch.stack(out), g[f"{key}_{j}"], atol=1e-4)


# the file holds the state in single precision only, on which the first depends
@pytest.mark.parametrize(
    ("space", "key", "atol"), [("denoised", "x0space", 1e-5), ("network", "epsspace", 1e-9)]
)
def test_space_golden(golden, space, key, atol):
    g = golden.guidance("apg_space")
    nodes = [vp_node(float(a)) for a in g["alphas_cumprod"]]
    c, u, x = (g[n].astype(np.float64) for n in ("eps_cond", "eps_uncond", "x"))
    out, _ = drive(of(json.loads(str(g["case"])), space=space), c, u, nodes, x, prediction="epsilon")
    np.testing.assert_allclose(torch.stack(out), g[f"eps_out_{key}"], rtol=1e-6, atol=atol)


def test_mix_golden(golden):
    """CFG first, APG later, while the momentum accumulates from the start."""
    g = golden.guidance("apg_mix")
    p = json.loads(str(g["params"]))
    apg = APG(
        p["adaptive_projected_guidance_scale"],
        eta=p["eta"],
        norm=p["adaptive_projected_guidance_rescale"],
        momentum=p["adaptive_projected_guidance_momentum"],
        space="network",
        form="diffusers",
        cfg_scale=p["guidance_scale"],
        cfg_steps=p["adaptive_projected_guidance_start_step"] + 1,
    )
    out, _ = drive(apg, g["cond"], g["uncond"])
    np.testing.assert_allclose(torch.stack(out), g["out"], atol=1e-4)


def test_reduces_to_cfg():
    c, u = noise(4, 2, 3, 5), noise(4, 2, 3, 5, seed=1)
    plain, _ = drive(CFG(6.0), c, u)
    forms: list[tuple[Any, float]] = [("paper", 6.0), ("diffusers", 6.0), ("comfy", 5.0)]
    for form, w in forms:
        out, _ = drive(APG(w, eta=1.0, norm=0.0, momentum=0.0, form=form), c, u)
        torch.testing.assert_close(out, plain)


def shaped(guidance: APG, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    out = drive(guidance, c, u)[0][-1]
    assert guidance.scale is not None
    return (out - c[-1]) / (guidance.scale - 1.0)


def test_difference_is_orthogonal_and_capped():
    c, u = noise(3, 2, 3, 5), noise(3, 2, 3, 5, seed=1)
    d = shaped(APG(4.0, norm=1.5), c, u)
    assert torch.all((d * c[-1]).flatten(1).sum(1).abs() < 1e-10)
    assert torch.all(d.flatten(1).norm(dim=1) <= 1.5 + 1e-12)
    capped = shaped(APG(4.0, norm=1.5, eta=1.0, momentum=0.0), c, u)
    torch.testing.assert_close(capped.flatten(1).norm(dim=1), torch.full((2,), 1.5, dtype=torch.float64))


def test_the_norm_scales_with_the_size_of_the_latent():
    c, u = noise(1, 2, 4, 4), noise(1, 2, 4, 4, seed=1)
    d = shaped(APG(4.0, norm=1.0, eta=1.0, momentum=0.0, size=4), c, u)
    torch.testing.assert_close(d.flatten(1).norm(dim=1), torch.full((2,), 2.0, dtype=torch.float64))


def test_a_multiple_of_the_prediction_in_u_does_not_matter():
    c, u = noise(1, 2, 7), noise(1, 2, 7, seed=1)
    apg = APG(5.0, norm=0.0, momentum=0.0)
    torch.testing.assert_close(drive(apg, c, u)[0], drive(apg, c, u + 0.7 * c)[0])


def test_equal_predictions_and_zeros_give_no_nan():
    c = noise(2, 2, 7)
    assert torch.equal(drive(APG(5.0), c, c)[0][1], c[1])
    assert torch.equal(drive(APG(5.0), 0 * c, 0 * c)[0][1], 0 * c[1])


def test_momentum_advances_once_a_step():
    """Two evaluations a step: the second sees what the first saw before it."""
    c, u = noise(4, 1, 6), noise(4, 1, 6, seed=1)
    apg = APG(3.0, eta=1.0, norm=0.0, momentum=-0.5)
    out, _ = drive(apg, c, u, stages=2)
    d = c - u
    m0 = d[0]
    expected = [d[0], d[1], d[2] - 0.5 * m0, d[3] - 0.5 * m0]
    torch.testing.assert_close(torch.stack(out) - c, 2.0 * torch.stack(expected))


def test_a_constant_difference_shrinks_to_the_fixed_point():
    c, u = noise(1, 1, 6).expand(60, 1, 6), noise(1, 1, 6, seed=1).expand(60, 1, 6)
    out, _ = drive(APG(3.0, eta=1.0, norm=0.0, momentum=-0.5), c, u)
    torch.testing.assert_close(out[-1] - c[0], 2.0 * (c - u)[0] / 1.5)


def test_two_runs_are_equal_and_samples_do_not_see_each_other():
    x = noise(3, 8)
    apg = APG(6.0) + Rescale(0.5)
    first = fs.sample(two_gaussians(), x, "dpmpp_2m", steps=6, guidance=apg)
    assert torch.equal(first, fs.sample(two_gaussians(), x, "dpmpp_2m", steps=6, guidance=apg))
    alone = fs.sample(two_gaussians(), x[1:2], "dpmpp_2m", steps=6, guidance=apg)
    torch.testing.assert_close(first[1:2], alone)


def test_one_is_conditional_and_costs_one():
    denoiser, x = two_gaussians(), noise(2, 4)
    out = fs.sample(denoiser, x, "ddim", steps=5, guidance=APG(1.0))
    assert denoiser.nfe == 10 and torch.equal(out, fs.sample(two_gaussians(), x, "ddim", steps=5))


def test_interval_of_cfg_and_scale_of_apg():
    denoiser = two_gaussians()
    fs.sample(denoiser, noise(2, 4), "ddim", steps=10, guidance="cfg:start=0.2,stop=0.6+apg:8")
    assert denoiser.nfe == 2 * (10 + 4)


def test_a_session_can_be_copied_in_mid_run():
    import copy

    c, u = noise(4, 2, 6), noise(4, 2, 6, seed=1)
    whole, _ = drive(APG(5.0), c, u)
    session = APG(5.0).session(run_of([EDM_NODE] * 4))
    for i in range(2):
        call = session.begin(c[i], EDM_NODE)
        session.finish(call, {"conditional": c[i], "unconditional": u[i]})
    other = copy.deepcopy(session)
    for s in (session, other):
        call = s.begin(c[2], EDM_NODE)
        assert torch.equal(s.finish(call, {"conditional": c[2], "unconditional": u[2]}), whole[2])
    session.reset()
    call = session.begin(c[0], EDM_NODE)
    assert torch.equal(session.finish(call, {"conditional": c[0], "unconditional": u[0]}), whole[0])
