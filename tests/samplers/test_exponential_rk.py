"""RES and SEEDS: what they reduce to, which orders their options have, and the one path of their noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import solver_checks as checks
import torch

import fewstep as fs
from fewstep.samplers import BrownianNoise, Noise

VP = checks.SCHEDULES["vp"]


def result(spec: str, steps: int = 6) -> np.ndarray:
    grid = checks.ratio_grid(VP, steps)
    return checks.solve(fs.compile(spec, grid), grid)


@pytest.mark.parametrize("c", [0.3, 0.5, 1.0])
def test_seeds_without_noise_are_res(c):
    for seeds, res in (
        (f"seeds_2:eta=0,solver_type=phi_2,r={c}", f"res_2s:c2={c}"),
        (f"seeds_3:eta=0,r_1={c / 2}", f"res_3s:c2={c / 2},c3={2 / 3}"),
    ):
        np.testing.assert_allclose(result(seeds), result(res), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("spec", "rule"), [("res_2s", "heun"), ("seeds_2:eta=0", "midpoint")])
def test_stages_in_the_middle_are_the_nodes_of_a_singlestep_method(spec, rule):
    expected = result(f"dpmpp_2s:solver_type={rule}", 12)
    np.testing.assert_allclose(result(spec, 6), expected, rtol=0, atol=1e-12)


def test_two_stages_on_a_brownian_path_are_dpmpp_sde():
    np.testing.assert_allclose(result("seeds_2"), result("dpmpp_sde"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        "res_2s:c2=0.2",
        "res_2s:c2=1",
        "res_3s:c2=0.3,c3=0.9",
        "res_3s:c2=0.5,c3=0.6666666666666666",
        "seeds_2:eta=0,r=0.3",
        "seeds_3:eta=0",
        "seeds_3:eta=0,r_2=0.8",
    ],
)
def test_every_choice_of_stages_has_the_declared_order(spec):
    solver = fs.solver(spec)
    observed = checks.slope(lambda grid: fs.compile(solver, grid), VP, False)
    assert abs(observed - solver.order) < 0.2


@pytest.mark.parametrize("spec", ["res_3s:c2=0.6666666666666666", "res_3s:c2=0.5,c3=0.5", "seeds_3:r_1=0.7"])
def test_stages_that_no_method_has_are_refused(spec):
    with pytest.raises(ValueError, match=r"option '(c2|r_1)' of solver '(res_3s|seeds_3)' must be"):
        fs.compile(spec, checks.ratio_grid(VP, 3))


@pytest.mark.parametrize(("spec", "draws"), [("seeds_2", 2), ("seeds_2:r=1", 1), ("seeds_3", 3)])
def test_noise_covers_every_step_once_and_adds_up_to_its_increment(spec, draws):
    """With eta = 1 the noise of a step is the increment of the Brownian path over it, however it is divided."""
    grid = checks.ratio_grid(VP, 1)
    s, t = grid
    program = fs.compile(spec, grid)
    ops = [op for op in program.ops if isinstance(op, Noise)]
    ends = [(program.nodes[op.start], program.nodes[op.stop]) for op in ops]
    assert len(ops) == draws and ends[0][0] == s and ends[-1][1] == t
    assert all(a[1] == b[0] for a, b in zip(ends, ends[1:]))

    source, like = BrownianNoise([5]), torch.zeros(1, 3, dtype=torch.float64)
    _, form = program.unroll()
    total = sum(form[op.dst] * source(like, *end) for op, end in zip(ops, ends))
    expected = t.sigma * math.sqrt(-math.expm1(-2 * (t.lam - s.lam))) * source(like, s, t)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-6)
