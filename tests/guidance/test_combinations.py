"""Rules for u, the difference and the result: CFG++, CFG-Zero*, TCFG, FDG, Perp-Neg, MaHiRo, MAMBO-G."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from guidance_runs import EDM_NODE, drive, noise, run_of, two_gaussians, vp_node

import fewstep as fs
from fewstep.guidance import (
    APG,
    CFG,
    FDG,
    MAMBO,
    TCFG,
    AdaptiveGuidance,
    CFGPlusPlus,
    CFGZeroStar,
    MaHiRo,
    PerpNeg,
    Rescale,
    Session,
)
from fewstep.guidance.frequency import pyramid, up
from fewstep.schedules import EDM, Flow, Node, TimeGrid


def double(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))


# -- CFG++ -------------------------------------------------------------------------------------------------------------


def test_cfgpp_step_golden(golden):
    g = golden.guidance("cfgpp")
    c, u, x = double(g["cond"]), double(g["uncond"]), double(g["x"])
    for (scale, abar_s, abar_t, w), expected in zip(g["rows_lambda_abar0_abar1_weq"], g["x_next"]):
        s, t = vp_node(abar_s), vp_node(abar_t)
        kwargs = {"prediction": "epsilon", "first_order": True, "end": t}
        (eps,), _ = drive(CFGPlusPlus(float(scale)), c[None], u[None], [s], x[None], **kwargs)
        np.testing.assert_allclose(
            t.alpha * (x - s.sigma * eps) / s.alpha + t.sigma * eps, expected, atol=1e-9
        )
        torch.testing.assert_close(eps, torch.lerp(u, c, float(w)), rtol=1e-9, atol=1e-9)
    kwargs = {"prediction": "epsilon", "first_order": True, "end": Node(0.0, 1.0, 0.0)}
    (eps,), _ = drive(CFGPlusPlus(0.7), c[None], u[None], [vp_node(0.9)], x[None], **kwargs)
    torch.testing.assert_close(eps, torch.lerp(u, c, 0.7))  # the last step is the guided estimate itself


@pytest.mark.parametrize(("solver", "key"), [("euler", "x_euler"), ("dpmpp_2m", "x_2m")])
def test_cfgpp_trajectory_golden(golden, solver, key):
    g = golden.guidance("cfgpp")
    schedule = EDM(1e-5, 1e3)
    program = fs.compile(solver, TimeGrid.from_levels(schedule, g["sigmas"]))
    run = run_of(program.evaluations, schedule=schedule, first_order=solver == "euler", solver=solver)
    session, stepper = CFGPlusPlus(float(g["lam"])).session(run), fs.Stepper(program, double(g[key][0]))
    for i, expected in enumerate(g[key][1:]):
        call = session.begin(stepper.x, stepper.node)
        predictions = {"conditional": double(g["D_cond"][i]), "unconditional": double(g["D_uncond"][i])}
        stepper.step(session.finish(call, predictions))
        np.testing.assert_allclose(stepper.x, expected, atol=1e-9)


def test_cfgpp_in_every_space_and_cost():
    x = noise(2, 4)
    results = []
    for prediction in ("epsilon", "v", "denoised"):
        denoiser = two_gaussians(prediction=prediction)
        results.append(fs.sample(denoiser, x, "ddim", steps=6, guidance=CFGPlusPlus(1.0)))
        assert denoiser.nfe == 2 * 2 * 6
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_cfgpp_outside_the_interval_and_after_the_threshold_is_conditional():
    x = noise(2, 4)
    plain = fs.sample(two_gaussians(), x, "ddim", steps=6)
    assert torch.equal(fs.sample(two_gaussians(), x, "ddim", steps=6, guidance="cfg:high=0+cfgpp:0.6"), plain)
    denoiser = two_gaussians()
    fs.sample(denoiser, x, "ddim", steps=6, guidance=CFGPlusPlus() + AdaptiveGuidance(-1.0))
    assert denoiser.nfe == 2 * 7


def test_cfgpp_refusals():
    for solver in ("unipc", "ddim:eta=1", "heun", "dpmpp_2m:solver_type=heun"):
        with pytest.raises(ValueError, match="ddim, euler and dpmpp_2m"):
            fs.sample(two_gaussians(), noise(2, 4), solver, guidance=CFGPlusPlus())
    with pytest.raises(ValueError, match=">= 0 and <= 1"):
        CFGPlusPlus(1.5)


# -- CFG-Zero* and TCFG ------------------------------------------------------------------------------------------------


def test_zero_star_golden(golden):
    g = golden.guidance("cfg_zero_star")
    guidance = CFGZeroStar(float(g["w"]), zero_steps=int(g["zero_init_steps"]))
    out, session = drive(guidance, g["cond"], g["uncond"], prediction="flow")
    np.testing.assert_allclose(torch.stack(out), g["out"], atol=5e-5)
    c, u = torch.from_numpy(g["cond"]), torch.from_numpy(g["uncond"])
    factors = torch.stack([guidance.factor(a, b).flatten() for a, b in zip(c, u)])
    np.testing.assert_allclose(factors, g["scale"], rtol=1e-5)
    assert session.trace[0].skipped and session.nfe == 2 * 2 * (len(c) - 1)


def test_zero_star_of_comfyui_golden(golden):
    g = golden.guidance("misc_combine")
    c, u, x = (double(g[n])[None] for n in ("cond", "uncond", "x_input"))
    (out,), _ = drive(CFGZeroStar(float(g["w"]), form="comfy", zero_steps=0), c, u, [EDM_NODE], x)
    np.testing.assert_allclose(out, g["comfy_zero_star"], atol=1e-8)


def test_zero_star_properties():
    c, u = noise(1, 2, 8), noise(1, 2, 8, seed=1)
    guidance = CFGZeroStar(5.0, zero_steps=0)
    torch.testing.assert_close(drive(guidance, c, c)[0][0], c[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(drive(guidance, c, u)[0], drive(guidance, c, 3.0 * u)[0], rtol=1e-7, atol=1e-7)
    x = noise(2, 4)
    for prediction, schedule in (("flow", Flow()), ("epsilon", None), ("denoised", EDM())):
        denoiser = two_gaussians(schedule, prediction)
        fs.sample(denoiser, x, "ddim", steps=50, guidance=CFGZeroStar(2.0))
        assert denoiser.nfe == 2 * 2 * 48  # 4% of the steps cost nothing
    denoiser = two_gaussians(Flow(), "flow")
    fs.sample(denoiser, x, "euler", steps=8, guidance=CFGZeroStar(2.0))
    assert denoiser.nfe == 2 * 2 * 8


@pytest.mark.parametrize("schedule", [Flow(), EDM()], ids=["flow", "edm"])
def test_a_zero_step_leaves_the_sample_where_it_is(schedule):
    """In the frame in which no noise, or no velocity, is no movement."""
    prediction = "flow" if schedule.frame == "flow" else "denoised"
    denoiser, x = two_gaussians(schedule, prediction), noise(2, 4)
    guidance = CFGZeroStar(2.0, zero_steps=1)
    levels = [0.9, 0.5] if schedule.frame == "flow" else [9.0, 5.0]
    out = fs.sample(denoiser, x, "euler", sigmas=levels, guidance=guidance)
    torch.testing.assert_close(out, x, rtol=1e-6, atol=1e-6)
    assert denoiser.nfe == 0


def test_tcfg_golden(golden):
    g = golden.guidance("tcfg")
    guidance = TCFG(float(g["w"]))
    out, _ = drive(guidance, g["cond"], g["uncond"])
    np.testing.assert_allclose(torch.stack(out), g["out"], atol=2e-4)
    session = guidance.session(run_of([EDM_NODE]))
    c, u = double(g["cond"]), double(g["uncond"])
    for i in range(len(c)):
        call = session.begin(c[i], EDM_NODE)
        np.testing.assert_allclose(
            guidance.unconditional(c[i], u[i], call, None), g["uncond_damped"][i], atol=1e-9
        )


def test_tcfg_properties():
    c = noise(1, 3, 8)
    torch.testing.assert_close(drive(TCFG(7.0), c, c)[0][0], c[0])
    zero = torch.zeros_like(c)
    assert torch.isfinite(drive(TCFG(7.0), zero, zero)[0][0]).all()
    a, b = torch.eye(4, dtype=torch.float64)[:2].reshape(
        2, 1, 1, 4
    )  # a tie: c's direction, on which u is nothing
    torch.testing.assert_close(drive(TCFG(2.0), a, b)[0][0], 2.0 * a[0])


# -- FDG ---------------------------------------------------------------------------------------------------------------


def test_fdg_golden(golden):
    g = golden.guidance("fdg")
    c, u = g["cond"], g["uncond"]
    for level, name in zip(pyramid(torch.from_numpy(c), 2), ("pyr_cond_level0", "pyr_cond_level1")):
        np.testing.assert_allclose(level, g[name], atol=1e-5)
    for j, case in enumerate(json.loads(str(g["cases"]))):
        guidance = FDG(tuple(case["scales"]), parallel=tuple(case["par"] or ()))
        np.testing.assert_allclose(drive(guidance, c[None], u[None])[0][0], g[f"out_{j}"], atol=1e-4)


def test_fdg_is_linear_and_equal_scales_are_cfg():
    c, u = noise(1, 2, 3, 24, 20), noise(1, 2, 3, 24, 20, seed=1)
    torch.testing.assert_close(drive(FDG((4.0, 4.0, 4.0)), c, u)[0], drive(CFG(4.0), c, u)[0])
    full = drive(FDG((4.0, 2.0), parallel=(1.0, 1.0)), c, u)[0]
    torch.testing.assert_close(full, drive(FDG((4.0, 2.0)), c, u)[0])
    doubled = drive(FDG((4.0, 2.0)), 2.0 * c, 2.0 * u)[0][0]
    torch.testing.assert_close(doubled, 2.0 * drive(FDG((4.0, 2.0)), c, u)[0][0])
    levels = pyramid(c[0], 3)
    torch.testing.assert_close(up(up(levels[2]) + levels[1]) + levels[0], c[0])


@pytest.mark.parametrize("shape", [(2, 3, 25, 22), (2, 3, 5, 16, 20)], ids=["odd sides", "video"])
def test_fdg_keeps_the_shape(shape):
    c, u = noise(1, *shape), noise(1, *shape, seed=1)
    (out,), _ = drive(FDG((4.0, 4.0)), c, u)
    torch.testing.assert_close(out, drive(CFG(4.0), c, u)[0][0])
    if len(shape) == 5:  # frames do not see each other
        single = drive(FDG((4.0, 2.0)), c[:, :, :, 2], u[:, :, :, 2])[0][0]
        torch.testing.assert_close(drive(FDG((4.0, 2.0)), c, u)[0][0][:, :, 2], single)


def test_fdg_refusals():
    for text, words in (
        ("fdg:4", "two or more"),
        ("fdg:scales=4/2,parallel=1", "one number for each of 2"),
        ("fdg:4/2+cfg:3", "leave the other out"),
        ("fdg:4/2+mambo:3", "both decide the combination"),
    ):
        with pytest.raises(ValueError, match=words):
            fs.sample(two_gaussians(), noise(2, 3, 8, 8), guidance=text)
    denoiser = two_gaussians()
    with pytest.raises(ValueError, match="at least 6 x 6"):
        fs.sample(denoiser, noise(2, 3, 4, 8), guidance=FDG())
    assert denoiser.nfe == 0


# -- negative prompts and lengths --------------------------------------------------------------------------------------


def finish(session: Session, **predictions: torch.Tensor) -> torch.Tensor:
    call = session.begin(torch.zeros_like(predictions["conditional"]), EDM_NODE)
    assert set(call.branches) == set(predictions)
    return session.finish(call, predictions)


def perp_neg(w: float, **kwargs: Any) -> PerpNeg:
    return PerpNeg(w, negative=lambda x, t: x, **kwargs)


def test_perp_neg_golden(golden):
    g = golden.guidance("misc_combine")
    session = perp_neg(float(g["w"]), strength=float(g["neg_scale"]), stats="batch").session(
        run_of([EDM_NODE])
    )
    # the file's unconditional prediction is that of the negative prompt
    out = finish(
        session, conditional=double(g["cond"]), unconditional=double(g["empty"]), perp_neg=double(g["uncond"])
    )
    np.testing.assert_allclose(out, g["perp_neg"], atol=1e-9)


def test_perp_neg_properties():
    c, u, n = (noise(2, 8, seed=i) for i in range(3))
    plain = torch.lerp(u, c, 4.0)

    def out(n, strength=1.0):
        session = perp_neg(4.0, strength=strength).session(run_of([EDM_NODE]))
        return finish(session, conditional=c, unconditional=u, perp_neg=n)

    torch.testing.assert_close(out(n, 0.0), plain)
    torch.testing.assert_close(out(u), plain)
    torch.testing.assert_close(out(u + 0.3 * (c - u)), plain)  # nothing of it is perpendicular
    x = noise(2, 4)
    denoiser = two_gaussians(branches={"perp_neg": lambda x, t: 0.1 * x})
    fs.sample(denoiser, x, "ddim", steps=5, guidance="perp_neg:4")
    assert denoiser.nfe == 3 * 2 * 5
    with pytest.raises(ValueError, match=r"branches=\{'perp_neg': fn\}"):
        fs.sample(two_gaussians(), x, guidance=PerpNeg(4.0))


def test_mahiro_golden(golden):
    g = golden.guidance("misc_combine")
    c, u = double(g["cond"])[None], double(g["uncond"])[None]
    (out,), _ = drive(CFG(float(g["w"])) + MaHiRo("batch"), c, u)
    np.testing.assert_allclose(out, g["mahiro"], atol=1e-9)
    one = drive(CFG(float(g["w"])) + MaHiRo(), c[:, 1:], u[:, 1:])[0][0]
    torch.testing.assert_close(drive(CFG(float(g["w"])) + MaHiRo(), c, u)[0][0][1:], one)


def test_mambo_golden(golden):
    g = golden.guidance("misc_combine")
    c, u = double(g["cond"])[None], double(g["uncond"])[None]
    (out,), _ = drive(MAMBO(float(g["w"]), alpha=float(g["mambo_alpha"])), c, u)
    np.testing.assert_allclose(out, g["mambo"], atol=1e-8)
    torch.testing.assert_close(drive(MAMBO(4.0, alpha=0.0), c, u)[0], drive(CFG(4.0), c, u)[0])


# -- what is not guided is left alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guidance",
    [APG(), TCFG(), CFGZeroStar(zero_steps=0), MaHiRo(), MAMBO(alpha=0.5), Rescale(), perp_neg(3.0)],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("policy", ["all", "per_sample"])
def test_rows_without_guidance_are_conditional(guidance, policy):
    """Two samples, of which the second agrees at once."""
    c, u = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    u[:, 1] = c[:, 1] * (1 + 1e-9)
    composition = guidance + AdaptiveGuidance(0.999, policy=policy)
    if composition.weight == 1.0:
        composition = composition + CFG(3.0)
    session = composition.session(
        run_of([EDM_NODE] * 3, branches=frozenset({"conditional", "unconditional"}))
    )
    for i in range(3):
        call = session.begin(torch.zeros_like(c[i]), EDM_NODE)
        given = {"conditional": c[i], "unconditional": u[i], "perp_neg": u[i]}
        out = session.finish(
            call, {k: given[k] if rows is None else given[k][rows] for k, rows in call.branches.items()}
        )
        assert not torch.allclose(out[0], c[i, 0])
        if i and policy == "per_sample":
            assert torch.equal(out[1], c[i, 1])
    assert math.isclose(session.trace[-1].rows["unconditional"], 1 if policy == "per_sample" else 2)
