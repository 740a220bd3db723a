"""What ``explain`` computes from a program, against what is known on paper."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest

from fewstep import solvers
from fewstep.eval import explain, mixture, stability
from fewstep.eval.explain import picture, render
from fewstep.schedules import VP


def test_quantiles_are_kept_by_the_exact_solution() -> None:
    """The states of one quantile solve the probability-flow ODE: compare with a fine Heun solution."""
    errors = [mixture.error("heun", VP.linear(), n) for n in (200, 400)]
    assert errors[1] < 2e-5 and errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0), ("dpmpp_2m", 2.0)])
@pytest.mark.parametrize("noise", ["vp", "edm", "flow"])
def test_measured_orders(solver: str, order: float, noise: str) -> None:
    slope, errors = mixture.measured_order(solver, mixture.NOISE_SCHEDULES[noise]())
    assert slope == pytest.approx(order, abs=0.2)
    assert all(a > b for a, b in zip(errors, errors[1:]))


def test_growth_of_euler_is_the_formula() -> None:
    """DDIM in lambda: y -> y (1 + z (1 - e^-h) / h)."""
    rng = np.random.default_rng(0)
    z = rng.uniform(-3, 0.5, 50) + 1j * rng.uniform(-2, 2, 50)
    for h in (0.3, 1.0):
        expected = np.abs(1.0 + z * (1.0 - math.exp(-h)) / h)
        assert stability.growth("euler", h, z) == pytest.approx(expected, rel=1e-9)


def test_growth_of_heun_is_the_formula() -> None:
    """In k = sigma / alpha the test problem is dy/dk = -(z / h) y / k; Heun takes the mean of both slopes."""
    z, h = np.array([-0.4 + 0.3j, -1.5 + 0.1j, -0.2 - 1.0j]), 0.7
    mu, k = z / h, math.exp(-h)  # one step from k = 1 to e^-h
    slope = -mu
    euler = 1.0 + (k - 1.0) * slope
    expected = np.abs(1.0 + 0.5 * (k - 1.0) * (slope - mu * euler / k))
    assert stability.growth("heun", h, z) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc", "deis", "unipc:order=3"])
def test_growth_near_zero_is_the_exact_one(solver: str) -> None:
    z = np.array([-0.05 + 0.02j, -0.02 - 0.05j, -0.1 + 0.0j])
    assert stability.growth(solver, 0.1, z) == pytest.approx(np.exp(np.real(z)), rel=3e-3)


def test_pure_noise_and_clean_data_are_stable() -> None:
    """c = 0 (z = -h) is where the network's answer does not depend on the state: exponential solvers decay exactly."""
    for solver in ("euler", "dpmpp_2m", "unipc"):
        assert stability.growth(solver, 1.0, np.array([-1.0 + 0j]))[0] == pytest.approx(
            math.exp(-1.0), rel=1e-6
        )


def test_region_is_symmetric_and_its_real_interval_right() -> None:
    area = stability.region("euler", size=(120, 80))
    assert (area.growth == area.growth[::-1]).all()
    low, high = area.real_interval
    assert low == pytest.approx(-2.0 / (1.0 - math.exp(-1.0)), abs=0.01) and high == pytest.approx(
        0.0, abs=0.01
    )
    text = stability.braille(area, 40)
    assert "⣿" in text and "Re z" in text and "stable on the real axis from -3.16" in area.words


def test_facts_are_json_and_complete() -> None:
    facts = explain.explain("unipc:order=3,variant=bh1", steps=5)
    json.dumps(facts, allow_nan=False)
    assert facts["nfe"] == 5 and facts["solver"] == "unipc:order=3,variant=bh1"
    assert {o["name"] for o in facts["options"]} >= {"order", "variant"}
    assert set(facts["measured_order"]) == {"vp", "edm", "flow"}
    assert len(facts["coefficients"]) == 6 and facts["coefficients"][0]["weights"] == {"x": 1.0}
    assert all(check["exact"] for check in facts["exactness"]) and len(facts["exactness"]) == 2


@pytest.mark.parametrize("name", sorted(solvers()))
def test_every_solver_can_be_explained(name: str) -> None:
    facts = explain.explain(name, steps=4)
    assert facts["nfe"] >= 4 and all(check["exact"] for check in facts["exactness"])
    assert (facts["measured_order"] is None) == facts["stochastic"]
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    for part in render(facts, 80, full=True):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Stability region" in text and "Program" in text and max(map(len, text.splitlines())) <= 80


def test_mistakes_are_named() -> None:
    for arguments, message in [
        (("unipcx",), "did you mean 'unipc'"),
        (("euler", 4, "karass"), "did you mean 'karras'"),
        (("euler", 4, "karras", "vpp"), "allowed: vp, edm, flow"),
        (("euler", 0), "steps must be an integer >= 1"),
        (("euler", 4, "karras", "vp", -1.0), "must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            explain.explain(*arguments)


def test_pictures() -> None:
    from PIL import Image

    facts = {"solver": "dpmpp_2m", "stability": {"step": 1.0}}
    svg = picture(facts, ".svg").decode()
    assert svg.startswith("<svg") and "dpmpp_2m" in svg and "data: -h to 0" in svg
    assert "<svg" in picture(facts, ".html").decode()
    assert Image.open(io.BytesIO(picture(facts, ".png"))).width > 700
    with pytest.raises(ValueError, match=r"\.svg, \.html, \.png"):
        picture(facts, ".pdf")


@pytest.mark.parametrize(
    "spec", ["ipndm:order=3+heavy_ball:beta=0.6", "dpmpp_2m+heavy_ball", "ghvb:order=2.5"]
)
def test_momentum_is_shown_beside_the_plain_method_and_is_wider(spec):
    facts = explain.explain(spec, steps=4)["stability"]
    assert facts["plain"]["solver"] in ("ipndm:order=3", "dpmpp_2m", "ghvb:order=3.0")
    assert facts["area"] > 1.05 * facts["plain"]["area"]
    assert (
        facts["real_from"]
        < stability.region(facts["plain"]["solver"], size=(213, 200)).real_interval[0] - 0.2
    )
    assert explain.explain("dpmpp_2m", steps=4)["stability"]["plain"] is None
