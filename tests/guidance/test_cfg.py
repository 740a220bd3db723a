"""Classifier-free guidance: scale, interval, schedules and rescale."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from guidance_runs import drive, noise, run_of, two_gaussians, vp_node

import fewstep as fs
from fewstep.guidance import CFG, CFGNorm, Renorm, Rescale, parse
from fewstep.schedules import EDM, VP, Flow, Node


def test_rescale_golden(golden):
    g = golden.guidance("cfg_rescale")
    c, u = g["cond"], g["uncond"]
    for w in g["w"]:
        for phi in g["phi"]:
            (out,), _ = drive(CFG(float(w)) + Rescale(float(phi)), c[None], u[None])
            np.testing.assert_allclose(out, g[f"out_w{w}_phi{phi}"], rtol=1e-5, atol=5e-5)


def test_rescale_in_v_space_is_comfyuis_node(golden):
    g = golden.guidance("misc_combine")
    k = float(g["rescale_sigma"])
    c, u, x = (g[n].astype(np.float64)[None] for n in ("cond", "uncond", "x_input"))
    guidance = CFG(float(g["w"])) + Rescale(float(g["rescale_phi"]), space="v")
    (out,), _ = drive(guidance, c, u, [Node(k, 1.0, k)], x)
    np.testing.assert_allclose(out, g["rescale_v_denoised"], atol=1e-9)


def test_cfg_norm_golden(golden):
    g = golden.guidance("misc_combine")
    guidance = CFG(float(g["w"])) + CFGNorm(float(g["cfg_norm_strength"]))
    (out,), _ = drive(guidance, g["cond"].astype(np.float64)[None], g["uncond"].astype(np.float64)[None])
    np.testing.assert_allclose(out, g["cfg_norm"], atol=1e-9)


def test_rescale_reductions():
    c, u = noise(1, 2, 3, 4), noise(1, 2, 3, 4, seed=1)
    plain = drive(CFG(4.0), c, u)[0][0]
    torch.testing.assert_close(drive(CFG(4.0) + Rescale(0.0), c, u)[0][0], plain)
    full = drive(CFG(4.0) + Rescale(1.0), c, u)[0][0]
    torch.testing.assert_close(full.flatten(1).std(1), c[0].flatten(1).std(1))
    zeros = drive(CFG(4.0) + Rescale(0.7), torch.zeros_like(c), torch.zeros_like(c))[0][0]
    assert torch.equal(zeros, torch.zeros_like(zeros))


def test_renorm_limits_the_norm():
    c, u = noise(1, 2, 5, 4), noise(1, 2, 5, 4, seed=1)
    out = drive(CFG(9.0) + Renorm(1.1), c, u)[0][0]
    assert torch.all(out.flatten(1).norm(dim=1) <= 1.1 * c[0].flatten(1).norm(dim=1) + 1e-12)
    tokens = drive(CFG(9.0) + Renorm(over="token"), c, u)[0][0]
    torch.testing.assert_close(tokens.norm(dim=-1), c[0].norm(dim=-1))


def test_intervals_golden(golden):
    g = golden.guidance("intervals")
    nodes = [Node(k, 1.0, k) for k in g["sigmas_edm32"]]
    ones = np.ones((len(nodes), 1, 1))
    for (low, high), guided in zip(g["intervals"], g["guided"]):
        out, _ = drive(CFG(2.0, low=float(low), high=float(high)), ones, 0 * ones, nodes)
        assert [bool(o == 2.0) for o in out] == guided.tolist()


def test_windows_golden(golden):
    g = golden.guidance("intervals")
    for (start, stop, n), guided in zip(json.loads(str(g["windows"])), json.loads(str(g["cfg_window"]))):
        ones = np.ones((n, 1, 1))
        out, _ = drive(CFG(2.0, start=start, stop=stop), ones, 0 * ones)
        assert [bool(o == 2.0) for o in out] == guided


def test_interval_costs_one_outside_and_full_interval_is_cfg():
    x = noise(3, 4)
    plain = two_gaussians()
    reference = fs.sample(plain, x, "dpmpp_2m", steps=8, guidance=3.0)
    full = fs.sample(two_gaussians(), x, "dpmpp_2m", steps=8, guidance=CFG(3.0, high=1e9))
    assert torch.equal(full, reference)
    empty = fs.sample(two_gaussians(), x, "dpmpp_2m", steps=8, guidance="cfg:3,high=0")
    assert torch.equal(empty, fs.sample(two_gaussians(), x, "dpmpp_2m", steps=8))
    some = two_gaussians()
    fs.sample(some, x, "dpmpp_2m", steps=8, guidance=CFG(3.0, low=0.3, high=5.0))
    guided = [n for n, rows in some.calls if n == "unconditional"]
    assert 0 < len(guided) < 8 and some.nfe == 3 * (8 + len(guided))


def test_the_decision_is_the_steps():
    """Heun: the second stage, at the next level, does not ask again."""
    denoiser = two_gaussians(EDM(), "denoised")
    fs.sample(
        denoiser, 10 * noise(1, 4), "heun", sigmas=[10.0, 5.0, 2.0, 0.5], guidance=CFG(2.0, low=3.0, high=6.0)
    )
    names = [n for n, _ in denoiser.calls]
    assert names == ["conditional"] * 2 + ["conditional", "unconditional"] * 2 + ["conditional"] * 2


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_have_the_mean_of_the_scale(schedule):
    ones = np.ones((9, 1, 1))
    _, session = drive(CFG(4.0, schedule=schedule), ones, 0 * ones)
    scales = [r.scale for r in session.trace]
    assert scales[0] == 1.0 and scales == sorted(scales) and abs(np.mean(scales) - 4.0) < 1e-12
    assert session.nfe == 9 + 8


def test_cogvideox_schedule():
    nodes = [Node(t, 0.5, 0.5) for t in (40.0, 20.0, 0.0)]
    ones = np.ones((3, 1, 1))
    _, session = drive(CFG(6.0, schedule="cogvideox"), ones, 0 * ones, nodes)
    n = 3
    expected = [1 + 6 * (1 - math.cos(math.pi * ((n - node.t) / n) ** 5)) / 2 for node in nodes]
    np.testing.assert_allclose([r.scale for r in session.trace], expected)


PARTS = {"conditional": [1], "unconditional": [0, 1]}


@pytest.mark.parametrize("kind", ["cond", "uncond", "cfg", "interval"])
def test_mixture_trajectories_golden(golden, kind):
    g = golden.guidance("mixture_ddim")
    mean, variance, w = g["means"], g["variances"], float(g["w"])
    acp = g["alphas_cumprod"]
    acp = acp if acp[0] < acp[-1] else acp[::-1]
    nodes = [vp_node(a, t=len(acp) - 1 - i) for i, a in enumerate(acp)]

    def eps(x, node, parts):
        d2 = [node.alpha**2 * variance[k] + node.sigma**2 for k in parts]
        r = torch.stack(
            [
                -((x - node.alpha * mean[k]) ** 2) / (2 * v) - 0.5 * math.log(v) + math.log(g["weights"][k])
                for k, v in zip(parts, d2)
            ]
        ).softmax(0)
        return sum(
            r[j] * node.sigma * (x - node.alpha * mean[k]) / v for j, (k, v) in enumerate(zip(parts, d2))
        )

    low, high = map(float, g["interval"])
    guidance = {"cond": CFG(1.0), "uncond": CFG(0.0), "cfg": CFG(w), "interval": CFG(w, low=low, high=high)}[
        kind
    ]
    grid = fs.schedules.TimeGrid(
        np.array([n.t for n in nodes]),
        np.array([n.alpha for n in nodes]),
        np.array([n.sigma for n in nodes]),
        VP.linear(),
    )
    program = fs.compile("ddim", grid, prediction="epsilon")
    session = fs.guidance.Guidance((guidance,)).session(run_of(program.evaluations, "epsilon"))
    x = torch.from_numpy(g["x_T"])[:, None]
    stepper = fs.Stepper(program, x)
    path = [x]
    while not stepper.done:
        node = stepper.node
        call = session.begin(stepper.x, node)
        both = {n: torch.as_tensor(eps(stepper.x, node, k)) for n, k in PARTS.items()}
        stepper.step(session.finish(call, {k: both[k] for k in call.branches}))
        path.append(stepper.x)
    np.testing.assert_allclose(torch.stack(path)[..., 0], g[f"x_{kind}"], atol=1e-8)


def test_text_and_objects_are_the_same():
    text = "cfg:scale=7.5,start=0.1,high=5.0+rescale:phi=0.5"
    assert parse(text).spec == text == (Rescale(0.5) + CFG(7.5, start=0.1, high=5.0)).spec
    assert parse(7.5) == parse("cfg:7.5") == parse(CFG(7.5))


def test_half_precision_is_computed_in_single():
    c, u = (noise(1, 2, 64, seed=i).bfloat16() for i in range(2))
    out = drive(CFG(7.5) + Rescale(0.7), c.float(), u.float())[0][0]
    session = (CFG(7.5) + Rescale(0.7)).session(run_of([Node(1.0, 1.0, 1.0)]))
    call = session.begin(c[0], Node(1.0, 1.0, 1.0))
    half = session.finish(call, {"conditional": c[0], "unconditional": u[0]})
    assert half.dtype == torch.bfloat16 and torch.equal(half, out.bfloat16())


def test_flow_interval_by_ratio():
    x = noise(1, 4)
    denoiser = two_gaussians(Flow(), "flow")
    fs.sample(denoiser, x, "euler", sigmas=[1.0, 0.8, 0.5, 0.2, 0.0], guidance=CFG(2.0, low=0.3, high=2.0))
    assert [n for n, _ in denoiser.calls].count("unconditional") == 1  # ratio 1 at sigma 0.5 only
