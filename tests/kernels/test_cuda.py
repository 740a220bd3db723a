"""On a CUDA device: the kernels as compiled, one launch and no wait a step, and the captured loop."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import COEFS, FLOATS, check, layouts

import fewstep as fs
from fewstep.kernels import Rule, combine, guided
from fewstep.kernels.guidance import reference_guided
from fewstep.samplers import Stepper
from fewstep.schedules import VP, make_grid


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_combine(dtype):
    for inputs in layouts(dtype).values():
        on = [x.cuda() for x in inputs]
        outputs = [y.cpu() for y in combine(on, COEFS)]
        check(outputs, inputs, torch.tensor(COEFS, dtype=torch.float64))


@pytest.mark.gpu
def test_beyond_32_bits():
    x = torch.ones(2**31 + 4096, dtype=torch.float16, device="cuda")
    (y,) = combine([x, x], [[2.0, 1.0]])
    assert bool((y[-4096:] == 3.0).all()) and bool((y[2**31 - 8 : 2**31 + 8] == 3.0).all())


@pytest.mark.gpu
def test_a_step_is_one_kernel_and_waits_for_nothing():
    program = fs.compile("unipc:order=3", make_grid(VP.linear(), 8, "karras"), prediction="epsilon")
    x = torch.randn(1, 4, 128, 128, device="cuda", dtype=torch.bfloat16)
    kernels = []
    for _ in range(2):  # the first run compiles
        stepper = Stepper(program, x, check=False)
        torch.cuda.set_sync_debug_mode("error")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(program.nfe):
                stepper.step(x)
        torch.cuda.set_sync_debug_mode("default")
        kernels = [e for e in profile.events() or () if e.device_type.name == "CUDA"]
    assert len(kernels) == program.nfe


@pytest.mark.gpu
def test_guidance():
    both = torch.randn(4, 16, 64, 64, device="cuda", dtype=torch.bfloat16)
    u, c = both.chunk(2)
    rule = Rule("projected", 6.5, cap=5.0)
    result, _ = guided([c, u], (1.0, -1.0), (1.0, 0.0), (1.0, 0.0), rule)
    expected, _ = reference_guided([c.double(), u.double()], (1.0, -1.0), (1.0, 0.0), (1.0, 0.0), rule)
    torch.testing.assert_close(result.double(), expected, rtol=0.008, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("solver", "guidance", "noise"),
    [("unipc:order=3", None, "white"), ("dpmpp_2m", "apg:5", "white"), ("euler_ancestral", 4.0, "philox")],
)
def test_a_captured_loop_is_the_plain_one(solver, guidance, noise):
    weight = torch.randn(8, 8, device="cuda") / 8

    def denoiser():
        return fs.Denoiser(
            lambda x, t: torch.tanh(x @ weight + t[:, None, None] / 1000),
            VP.linear(),
            "epsilon",
            unconditional=lambda x, t: torch.sin(x @ weight),
        )

    plain, captured = denoiser(), denoiser()
    for seed in range(3):
        x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed)).cuda()
        options = {"solver": solver, "steps": 6, "guidance": guidance, "noise": noise}
        expected = fs.sample(plain, x, **options)
        torch.testing.assert_close(fs.sample(captured, x, **options, cuda_graph=True), expected)
        assert captured.nfe == plain.nfe


@pytest.mark.gpu
def test_a_captured_loop_finds_nan():
    denoiser = fs.Denoiser(lambda x, t: torch.where(t[:, None] < 500, torch.nan, x), VP.linear(), "epsilon")
    with pytest.raises(fs.NumericalError, match="is not finite"):
        fs.sample(denoiser, torch.randn(2, 4, device="cuda"), cuda_graph=True)


NETWORK = fs.Denoiser(
    lambda x, t: 0.1 * x, VP.linear(), "epsilon", unconditional=lambda x, t: 0.05 * x, condition=None
)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "needs a CUDA device; x is on 'cpu'"),
        ({"solver": "euler_ancestral"}, "drawn on the CPU; use noise='philox'"),
        ({"guidance": "cfg:3+adaptive:0.9"}, "'adaptive', which decides by the data"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_any_work(options, why):
    before = NETWORK.nfe
    with pytest.raises(ValueError, match=why):
        fs.sample(NETWORK, torch.randn(2, 4), steps=3, cuda_graph=True, **options)
    assert NETWORK.nfe == before
