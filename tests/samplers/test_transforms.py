"""Transforms: Restart, heavy ball, dynamic compensation, skipping; what each claims, on programs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import solver_checks as checks
import torch

import fewstep as fs
from fewstep.samplers import BrownianNoise, Combine, Evaluate, Noise, Program, Stepper, WhiteNoise, transforms
from fewstep.samplers.compensation import CASCADES, cascade_ratios
from fewstep.samplers.restart import TABLES
from fewstep.schedules import EDM, TimeGrid, VPContinuous, make_grid


def karras(steps: int, schedule=None) -> TimeGrid:
    return make_grid(schedule or EDM(), steps, "karras")


def coefficients(program: Program) -> list[list[float]]:
    """The evaluated states and the result on the start state and the predictions, in order of evaluation."""
    states, result = program.unroll()
    order = [0] + [op.dst for op in program.ops if isinstance(op, Evaluate)]
    return [[form.get(r, 0.0) for r in order] for form in [*states, result]]


def assert_same(one: Program, other: Program) -> None:
    assert one.evaluations == other.evaluations
    np.testing.assert_allclose(coefficients(one), coefficients(other), rtol=0, atol=1e-12)


# the text ---------------------------------------------------------------------------------------------------------


def test_specs_with_transforms_are_canonical():
    s = fs.solver("dpmpp_2m + heavy_ball:beta=0.8 +restart: t_min=0.06 , steps=4")
    assert s.spec == "dpmpp_2m+heavy_ball+restart:steps=4,t_min=0.06" or fs.solver(s.spec).spec == s.spec
    assert fs.solver("euler+skip:h3/s4").spec == "euler+skip:pattern=h3/s4"
    assert fs.solver("euler:churn=1e+1+skip:h2").options == {"churn": 10.0}
    assert fs.solver("uni_pc_bh2+restart").name == "unipc"
    assert len(s.transforms) == 2 and s.stochastic and s.order == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("euler+skp:h2", "no transform 'skp'; allowed: .*restart, skip; did you mean 'skip'"),
        ("euler+skip:h2/s1", "option 'pattern' of transform 'skip' must be h2/s2 to h2/s6"),
        ("euler+skip:patern=h2", "transform 'skip' has no option 'patern'; allowed: pattern"),
        (
            "dpmpp_2m+heavy_ball:beta=0",
            "option 'beta' of transform 'heavy_ball' must be a number > 0 and <= 1",
        ),
        ("heun+heavy_ball", "needs a solver with one evaluation a step, 'heun' has 2"),
        ("ghvb+heavy_ball", "those of 'ghvb' combine values derived from them"),
        ("unipc+dc", "needs exactly one of ratios, file and cascade"),
        ("unipc+dc:ratios=1/1/1.1", "has 3 ratios for 8 evaluations"),
        (
            "unipc+dc:cascade=sd2",
            "no cascade polynomial 'sd2'; allowed: sd21, or a .json file; did you mean 'sd21'",
        ),
        ("unipc+dc:file=/nowhere/r.json", "cannot read the ratios of dc from '/nowhere/r.json'"),
        ("heun+dc:cascade=sd21", "one evaluation a step"),
        ("heun+restart:t_min=0.3,t_max=0.06", "0 < t_min < t_max"),
        ("heun+restart:t_min=0.06/0.3,t_max=1/2,steps=2/2/2", "one value or 3 of each"),
        (
            "heun+restart:table=cifar10_vp_44",
            "no restart table 'cifar10_vp_44'.*did you mean 'cifar10_vp_43'",
        ),
        (
            "heun+restart:t_min=1,t_max=1.2",
            "nearest node of this grid has sigma / alpha = 1.287, above t_max",
        ),
        ("heun+restart:spacing=linspace", "has no option 'sigma_max'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(spec, words):
    with pytest.raises(ValueError, match=words):
        fs.compile(spec, karras(8))


def test_every_transform_is_documented():
    for name, d in transforms().items():
        assert d.summary and d.reference.count("https://") == 1, name
        for option in d.options:
            assert option in d.documentation, f"{name}: option {option} is not in the docstring"


# Restart ----------------------------------------------------------------------------------------------------------


def test_restart_costs_what_is_published_and_goes_up_and_down():
    """(18, 3, 2, .06, .30) takes 43 evaluations, (14, three intervals of 3 points) 39."""
    for name, (steps, intervals) in TABLES.items():
        if name.startswith("sd15") or name == "cifar10_vp_519":
            continue
        program = fs.compile(f"heun+restart:table={name}", karras(steps))
        assert program.nfe == int(name.rpartition("_")[2]), name
        assert sum(isinstance(op, Noise) for op in program.ops) == sum(i.repeats for i in intervals)
    ratios = [n.ratio for n in fs.compile("heun+restart", karras(18)).evaluations]
    assert sum(b > a for a, b in zip(ratios, ratios[1:])) == 2  # two jumps


@pytest.mark.parametrize("inner", ["heun", "ddim", "dpm_2"])
def test_no_repeats_is_the_inner_solver(inner):
    assert_same(fs.compile(f"{inner}+restart:repeats=0", karras(10)), fs.compile(inner, karras(10)))


@pytest.mark.parametrize("schedule", list(checks.SCHEDULES))
def test_restart_leaves_the_distribution_as_it_is(schedule):
    """On Gaussian data the variance of the result approaches the true one as the steps shrink."""
    spec = "heun+restart:t_min=0.2,t_max=0.7,steps=STEPS,repeats=3"
    errors = []
    for n in (10, 20, 40):
        grid = checks.ratio_grid(checks.SCHEDULES[schedule], 3 * n)
        program = fs.compile(spec.replace("STEPS", str(n)), grid)
        errors.append(abs(checks.gaussian_variance(program, grid) - 1.0))
    assert errors[0] > 3.5 * errors[1] > 12 * errors[2] > 0


def test_restart_contracts_trajectories_that_share_their_noise():
    grid = karras(18)
    x = 80 * torch.randn(1, 24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 20

    def distance(spec: str) -> float:
        ends = []
        for start in (x, other):
            stepper = Stepper(fs.compile(spec, grid), start, WhiteNoise([7]))
            while not stepper.done:
                node = stepper.node
                stepper.step(
                    torch.from_numpy(checks.mixture().denoised(stepper.x.numpy(), node.alpha, node.sigma))
                )
            ends.append(stepper.x)
        return float((ends[0] - ends[1]).norm())

    many = distance("heun+restart:t_min=0.3,t_max=3,steps=6,repeats=8")
    assert many < 0.5 * distance("heun")


@pytest.mark.parametrize("source", [WhiteNoise, BrownianNoise])
def test_every_repeat_has_noise_of_its_own(source):
    grid, like = karras(12), torch.zeros(1, 4000)
    program = fs.compile("dpmpp_2m_sde+restart:repeats=3", grid)
    noise = source([3])
    ops = [op for op in program.ops if isinstance(op, Noise)]
    drawn = [noise(like, program.nodes[op.start], program.nodes[op.stop]) for op in ops]
    assert sum(program.nodes[op.stop].ratio > program.nodes[op.start].ratio for op in ops) == 3
    together = torch.cat(drawn)
    correlation = torch.corrcoef(together) - torch.eye(len(together))
    assert correlation.abs().max() < 0.1


def test_another_solver_inside_the_intervals():
    program = fs.compile("ddim+restart:table=sd15_w3,solver=heun", karras(30))
    assert program.nfe == 30 + 2 * 9 * 2
    plain = fs.compile("ddim+restart:table=sd15_w3", karras(30))
    assert plain.nfe == 30 + 9 * 2


# heavy ball -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner", ["ipndm", "dpmpp_2m", "dpmpp_3m", "unipc:order=3", "deis", "dpmpp_2m:form=epsilon"]
)
def test_damping_one_changes_nothing(inner):
    for grid in (karras(8), checks.ratio_grid(VPContinuous(), 7)):
        assert_same(fs.compile(f"{inner}+heavy_ball:beta=1", grid), fs.compile(inner, grid))


def test_a_velocity_is_the_filtered_slope():
    """On Euler in noise form: v_i = sum_k beta (1 - beta)^k eps_{i-k}, with the first eps as start."""
    grid = TimeGrid.from_levels(EDM(), [5.0, 4.0, 3.0, 2.0])
    program = fs.compile("ipndm:order=1+heavy_ball:beta=0.7", grid, prediction="epsilon")
    row = coefficients(program)[-1]
    b = 0.7
    v = np.array([[1, 0, 0], [1 - b, b, 0], [(1 - b) ** 2, (1 - b) * b, b]])
    np.testing.assert_allclose(row, [1.0, *(-v.sum(axis=0))], atol=1e-14)


@pytest.mark.parametrize("beta", [0.9, 0.6, 0.4])
@pytest.mark.parametrize(("order", "limit"), [(1, 2.0), (2, 1.0), (3, 6 / 11), (4, 0.3)])
def test_heavy_ball_widens_the_stable_interval_by_the_known_factor(order, limit, beta):
    plain = checks.stability_limit(f"ipndm:order={order}")
    assert plain == pytest.approx(limit, rel=2e-3)
    widened = checks.stability_limit(f"ipndm:order={order}+heavy_ball:beta={beta}")
    assert widened == pytest.approx(limit * (2 - beta) / beta, rel=4e-3)


@pytest.mark.parametrize(
    ("order", "limits"),
    [
        (2, (1.1, 1.2, 1.4, 1.6, 1.8)),
        (3, (0.59, 0.64, 0.735, 0.825, 0.915)),
        (4, (0.325, 0.35, 0.40, 0.45, 0.50)),
    ],
)
def test_ghvb_lies_between_the_adams_bashforth_orders(order, limits):
    for b, limit in zip((0.9, 0.8, 0.6, 0.4, 0.2), limits):
        assert checks.stability_limit(f"ghvb:order={order - 1 + b}") == pytest.approx(limit, abs=0.012)


# dynamic compensation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["unipc:order=3", "dpmpp_2m", "deis", "ipndm"])
def test_ratios_of_one_change_nothing(inner):
    ratios = "/".join(["1"] * 8)
    assert_same(fs.compile(f"{inner}+dc:ratios={ratios}", karras(8)), fs.compile(inner, karras(8)))


def test_ratio_zero_is_the_prediction_before():
    """t' = t_{i-1}: DDIM then steps with the older prediction, and keeps it."""
    grid = karras(4)
    program = fs.compile("dpmpp_2m:solver_type=heun+dc:ratios=1/0/1/1,order=1", grid)
    rows = coefficients(program)
    assert rows[2][2] == 0.0 and rows[-1][2] == 0.0  # evaluation 1 has no weight anywhere


def test_ratios_come_from_a_file(tmp_path):
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps({"ratios": [1, 1, 0.9, 1.1]}))
    assert_same(
        fs.compile(f"unipc+dc:file={path}", karras(4)), fs.compile("unipc+dc:ratios=1/1/0.9/1.1", karras(4))
    )
    path.write_text('{"ratio": [1]}')
    with pytest.raises(ValueError, match="does not hold a list of numbers"):
        fs.compile(f"unipc:order=3+dc:file={path}", karras(4))


def test_the_published_cascade_gives_the_published_ratios(golden):
    case = golden.case("dc_cpr_sd21")
    for name, ratios in case.arrays.items():
        if name.startswith("ratios"):
            guidance, steps = float(name.split("cfg")[1].split("_")[0]), int(name.rpartition("nfe")[2])
            found = cascade_ratios(CASCADES["sd21"], guidance, steps)
            np.testing.assert_allclose(found, ratios, atol=case.tol)


# skipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler_h2s2", "euler_h3s3", "euler_h4s4", "ddim_h2s2"])
def test_the_skipped_steps_are_the_published_ones(golden, name):
    case = golden.case(f"fs_{name}")
    given = case.meta["kwargs"]
    grid = TimeGrid.from_levels(EDM(), case["sigmas"])
    program = fs.compile(f"euler+skip:{given['skip_mode']}", grid)
    called = [list(grid).index(node) for node in program.evaluations]
    assert sorted(set(range(grid.steps)) - set(called)) == case.meta["skipped"]


@pytest.mark.parametrize("name", ["h2", "h3", "h4"])
def test_explicit_steps_follow_the_published_rule(golden, name):
    case = golden.case(f"fs_euler_explicit_{name}")
    listed = [int(i) for i in case.meta["kwargs"]["skip_indices"].replace(",", " ").split()[1:]]
    grid = TimeGrid.from_levels(EDM(), case["sigmas"])
    program = fs.compile(f"euler+skip:{name},indices={'/'.join(map(str, listed))}", grid)
    called = [list(grid).index(node) for node in program.evaluations]
    assert sorted(set(range(grid.steps)) - set(called)) == case.meta["skipped"]


@pytest.mark.parametrize(
    "solver", ["euler", "unipc", "dpmpp_2m", "heun", "dpmpp_2m_sde", "dpmpp_2m+heavy_ball"]
)
def test_a_polynomial_is_continued_exactly(solver):
    """Predictions that are linear in the number of the step: extrapolation is exact, so skipping changes nothing."""
    grid = TimeGrid.from_levels(EDM(), np.linspace(10.0, 1.0, 13))
    nodes = list(grid)

    def predict(program: Program) -> torch.Tensor:
        stepper = Stepper(program, torch.full((1, 3), 4.0, dtype=torch.float64), WhiteNoise([0]))
        while not stepper.done:
            stepper.step(torch.full((1, 3), 0.3 + 0.1 * nodes.index(stepper.node), dtype=torch.float64))
        return stepper.x

    whole = fs.compile(solver, grid)
    skipped = fs.compile(f"{solver}+skip:h2/s2,variable=denoised", grid)
    stages = fs.solver(solver).evaluations_per_step
    assert skipped.nfe == whole.nfe - 2 * stages
    if stages == 1:
        torch.testing.assert_close(predict(skipped), predict(whole), rtol=0, atol=1e-12)


def test_transforms_compose():
    grid = karras(12)
    program = fs.compile("dpmpp_2m+heavy_ball+skip:h2/s3+restart:t_max=1", grid)
    assert program.stochastic and program.nfe < fs.compile("dpmpp_2m+restart:t_max=1", grid).nfe
    assert fs.Program.from_json(program.to_json()) == program
    assert all(isinstance(op, (Combine, Evaluate, Noise)) for op in program.ops)
