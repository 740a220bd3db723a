from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep as fs
from fewstep.samplers import BrownianNoise, Combine, Evaluate, Noise, Program, Stepper, WhiteNoise
from fewstep.samplers.noise import standard_normal
from fewstep.schedules import EDM, VP, Node, make_grid

GRID = make_grid(VP.linear(), 5, "karras")


def run(stepper: Stepper, at: int = -1, value: float = 0.0) -> torch.Tensor:
    while not stepper.done:
        bad = torch.full_like(stepper.x, value)
        stepper.step(bad if stepper.evaluations == at else 0.1 * stepper.x)
    return stepper.x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_prediction_that_is_not_finite_is_named(value, at):
    stepper = Stepper(fs.compile("unipc", GRID), torch.randn(2, 3))
    with pytest.raises(fs.NumericalError, match=f"evaluation {at + 1} of 5, t = .*solver 'unipc'") as info:
        run(stepper, at, value)
    error = pickle.loads(pickle.dumps(info.value))
    assert (error.step, error.t, error.solver) == (at, GRID[at].t, "unipc")
    assert torch.isfinite(error.state).all()  # nothing is lost: the last finite state is there
    assert stepper.evaluations == at


def test_large_but_finite_values_are_not_an_error():
    big = torch.full((1, 4), 1e38)
    stepper = Stepper(fs.compile("euler", GRID), big)
    stepper.step(big)
    assert stepper.evaluations == 1


def test_the_check_can_be_left_out():
    stepper = Stepper(fs.compile("euler", GRID), torch.randn(2, 3), check=False)
    assert torch.isnan(run(stepper, 0, float("nan"))).all()


def test_shapes_must_agree():
    stepper = Stepper(fs.compile("euler", GRID), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"returned shape \(2, 6\) for a state of shape \(2, 3\) at t = 999"):
        stepper.step(torch.zeros(2, 6))


def test_there_is_an_end():
    stepper = Stepper(fs.compile("euler", GRID), torch.randn(2, 3))
    run(stepper)
    for act in (lambda: stepper.step(stepper.x), lambda: stepper.node):
        with pytest.raises(IndexError, match="nothing left to evaluate"):
            act()


def test_a_host_may_replace_the_state():
    stepper = Stepper(fs.compile("euler", GRID), torch.zeros(1, 2))
    stepper.step(torch.zeros(1, 2))
    stepper.x = torch.ones(1, 2)
    assert torch.equal(stepper.x, torch.ones(1, 2))
    assert stepper.step(torch.zeros(1, 2)).abs().min() > 0


def test_noise_needs_a_source():
    with pytest.raises(ValueError, match="draws noise"):
        Stepper(fs.compile("ddim:eta=1", GRID), torch.zeros(1, 2))


def test_registers_are_freed_as_soon_as_nothing_reads_them():
    program = fs.compile("unipc:order=3", GRID)
    stepper, most = Stepper(program, torch.zeros(1, 2)), 0
    while not stepper.done:
        most = max(most, len(stepper._registers))
        stepper.step(stepper.x * 0.1)
    assert most <= program.memory and len(stepper._registers) == 1


def combined(tensors: list[torch.Tensor], coefs: list[float]) -> torch.Tensor:
    """What the executor makes of one combination."""
    ops = (Noise(1, 0, 1), Noise(2, 0, 1), Noise(3, 0, 1))[: len(tensors) - 1]
    program = Program(tuple(GRID), (*ops, Combine(4, tuple(enumerate(coefs)))), 4).check()
    noises = iter(tensors[1:])
    return Stepper(program, tensors[0], lambda like, start, stop: next(noises)).x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_combination_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1000, generator=generator).to(dtype) for _ in range(4)]
    coefs = [1.7, -0.3, 0.9, 1e-3]
    exact = torch.stack([c * t.double() for c, t in zip(coefs, tensors)]).sum(0)
    result = combined(tensors, coefs)
    assert result.dtype == dtype
    eps = torch.finfo(dtype).eps
    bound = eps * exact.abs() if dtype in (torch.float16, torch.bfloat16) else torch.full_like(exact, 8 * eps)
    assert ((result.double() - exact).abs() <= bound.clamp_min(torch.finfo(dtype).tiny)).all()


def test_a_combination_promotes_and_leaves_its_operands():
    x, y, z = (torch.randn(100, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert combined([x, y.half()], [1.0, 2.0]).dtype == torch.float32
    assert combined([y.half(), x], [1.0, 2.0]).dtype == torch.float32
    before = x.clone()
    combined([x, y, z], [1.0, 2.0, 3.0])
    combined([x, y, z], [1.5, 2.0, 3.0])
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "spec", ["dpmpp_2m", "unipc:order=3", "sa_solver", "dpmpp_sde", "heun", "ddim+restart"]
)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_passes_compute_what_the_program_says(spec, prediction):
    """Scaled values, aliases and shared sums change nothing but roundings; float64 shows it."""
    program = fs.compile(spec, GRID, prediction=prediction)
    torch.manual_seed(0)
    start = torch.randn(2, 5, dtype=torch.float64)
    answers = [torch.randn(2, 5, dtype=torch.float64) for _ in range(program.nfe)]
    noises = {op.dst: torch.randn(2, 5, dtype=torch.float64) for op in program.ops if isinstance(op, Noise)}
    draws, sources = iter(noises.values()), dict(noises)
    sources[0] = start
    stepper, states = Stepper(program, start, lambda like, start, stop: next(draws)), []
    for op, answer in zip([op for op in program.ops if isinstance(op, Evaluate)], answers, strict=True):
        states.append(stepper.x)
        sources[op.dst] = answer
        stepper.step(answer)
    expected, result = program.unroll()
    for form, state in zip([*expected, result], [*states, stepper.x], strict=True):
        exact = sum((c * sources[r] for r, c in form.items()), torch.zeros_like(start))
        torch.testing.assert_close(state, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("spec", "most"), [("euler", 2), ("dpmpp_2m", 4), ("unipc", 5), ("unipc:order=3", 6), ("deis:order=3", 4)]
)
def test_a_steady_step_takes_few_operators(spec, most):
    program = fs.compile(spec, make_grid(VP.linear(), 10, "karras"), prediction="epsilon")
    stepper, counts = Stepper(program, torch.randn(1, 4), check=False), []
    answer = torch.ones(1, 4)
    while not stepper.done:
        with Operators() as seen:
            stepper.step(answer)
        counts.append(seen.count)
    assert max(counts) <= most


@pytest.mark.parametrize("spec", ["euler", "dpmpp_2m", "unipc:order=3", "heun"])
def test_a_step_allocates_its_outputs_and_nothing_else(spec):
    program = fs.compile(spec, make_grid(VP.linear(), 10, "karras"), prediction="epsilon")
    stepper, answer = Stepper(program, torch.randn(1, 4), check=False), torch.ones(1, 4)
    for i in range(program.nfe):
        with Operators() as seen:
            stepper.step(answer)
        assert len(seen.storages) == len(program.passes[i + 1].outputs)


class Operators(TorchDispatchMode):
    """Counts the operators that reach the dispatcher, and keeps what they return so that no memory is used twice."""

    def __init__(self):
        super().__init__()
        self.count, self._kept = 0, []

    @property
    def storages(self):
        return {t.untyped_storage().data_ptr() for t in self._kept}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self._kept.append(result := func(*args, **(kwargs or {})))
        return result


# -- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_interval_alone():
    a, b = Node(1.0, 1.0, 3.0), Node(0.5, 1.0, 2.0)
    like = torch.empty(3, 4)
    for kind in (WhiteNoise, BrownianNoise):
        whole = kind([7, 8, 9])(like, a, b)
        assert torch.equal(whole[1:2], kind([8])(like[:1], a, b))
        assert not torch.equal(whole[0], whole[1])
    white = WhiteNoise([7, 8, 9])
    assert not torch.equal(white(like, a, b), white(like, a, b))  # a second visit is a second draw


def test_noise_is_standard_normal():
    like = torch.empty(1, 200_000)
    for kind in (WhiteNoise, BrownianNoise):
        z = kind([1])(like, Node(1.0, 1.0, 3.0), Node(0.5, 1.0, 1.7)).double()
        assert abs(float(z.mean())) < 0.01 and abs(float(z.std()) - 1) < 0.01


@pytest.mark.parametrize("ratios", [(5.0, 2.2, 0.9), (3.0, 2.9, 2.8), (float("inf"), 4.0, 0.01)])
def test_brownian_increments_add_up(ratios):
    high, middle, low = (Node(0.0, 1.0, r) if r < float("inf") else Node(0.0, 0.0, 1.0) for r in ratios)
    noise, like = BrownianNoise([3]), torch.empty(1, 50_000, dtype=torch.float64)
    clock = [n.ratio**-2 for n in (high, middle, low)]
    first = noise(like, high, middle) * (clock[1] - clock[0]) ** 0.5
    second = noise(like, middle, low) * (clock[2] - clock[1]) ** 0.5
    whole = noise(like, high, low) * (clock[2] - clock[0]) ** 0.5
    torch.testing.assert_close(first + second, whole, rtol=1e-6, atol=1e-6 * clock[2] ** 0.5)
    assert abs(np.corrcoef(first[0], second[0])[0, 1]) < 0.02  # independent


def test_noise_wants_one_seed_a_sample():
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        standard_normal([1, 2], torch.empty(3, 4))


def test_sampling_with_brownian_noise_refines_one_path():
    """More steps on the same path approach one result; white noise does not."""
    denoiser = fs.Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), EDM(0.05, 5.0), "denoised")
    x = 5.0 * torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    change = {}
    for noise in ("white", "brownian"):
        a, b = (
            fs.sample(denoiser, x, "euler_ancestral", steps=n, schedule="exponential", noise=noise)
            for n in (40, 80)
        )
        change[noise] = float((a - b).std())
    assert change["brownian"] < 0.15 < 0.5 < change["white"]
