"""Triton's kernels in its interpreter; run by test_triton_in_its_interpreter, with TRITON_INTERPRET=1.

The interpreter truncates to bf16 where a device rounds to nearest, so a last place more is allowed there.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import COEFS, FLOATS, check, layouts

import fewstep as fs
from fewstep.kernels import Rule, available, combine, dispatch, guided, products, reference, triton_combine
from fewstep.kernels.guidance import reference_guided
from fewstep.samplers import PhiloxNoise, Stepper
from fewstep.schedules import VP, make_grid


@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_combine(layout):
    dtype = FLOATS[len(layout) % 4]
    check_layout(layout, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_combine_dtypes(dtype):
    check_layout("contiguous", dtype)
    check_layout("mixed", dtype)


def check_layout(layout, dtype):
    inputs = layouts(dtype)[layout]
    most = 1.01 if dtype == torch.bfloat16 else 1.0
    check(combine(inputs, COEFS), inputs, torch.tensor(COEFS, dtype=torch.float64), most)
    if inputs[0].ndim and inputs[0].numel():
        rows = torch.randn(
            5, 2, 4, inputs[0].shape[0]
        ).double()  # fp32 holds them: a kernel rounds them to it
        check(combine(inputs, rows, torch.tensor([3])), inputs, rows[3], most)
    steps = torch.randn(5, 2, 4).double()
    check(combine(inputs, steps, torch.tensor([2])), inputs, steps[2], most)


def test_mixed_dtypes_promote():
    x, y = torch.randn(3, 5), torch.randn(3, 5).bfloat16()
    (result,) = combine([y, x], [[2.0, -1.0]])
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, 2.0 * y.float() - x)


@pytest.mark.parametrize("wide", [False, True])
def test_offsets_of_64_bits_are_the_same(wide, monkeypatch):
    monkeypatch.setattr(triton_combine, "_INT32", 0 if wide else 2**31)
    for name in ("contiguous", "mixed", "a slice of frames"):
        inputs = layouts(torch.float32)[name]
        check(combine(inputs, COEFS), inputs, torch.tensor(COEFS, dtype=torch.float64))


@pytest.mark.parametrize("key", [0, 3, 2**61 + 5])
def test_fused_noise_is_the_reference_s(key):
    seeds = torch.tensor([1, 2**63 - 1, -5])
    for like in (torch.randn(3, 4, 10, 7), torch.randn(3, 7, 4).transpose(1, 2)):
        noise = reference.philox_normal(seeds, key, like)
        one, two = triton_combine.combine([like], [[0.5], [0.0]], noise=(seeds, key, [2.0, 1.0]))
        torch.testing.assert_close(two, noise, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one, 0.5 * like + 2.0 * noise, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["unipc:order=3", "sa_solver", "euler_ancestral"])
def test_a_run_is_the_same_with_and_without_kernels(spec, monkeypatch):
    program = fs.compile(spec, make_grid(VP.linear(), 5, "karras"), prediction="v")
    x, results = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), []
    for mode in ("triton", "torch"):
        monkeypatch.setattr(dispatch, "mode", lambda mode=mode: mode)
        stepper = Stepper(program, x, PhiloxNoise([1, 2]))
        while not stepper.done:
            stepper.step(torch.tanh(stepper.x))
        results.append(stepper.x)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


RULES = {
    "projected": (Rule("projected", 9.0, eta=0.2, cap=5.0), (1.0, -1.0, 0.0, -0.5), (2.0, 0.0, 0.3, 0.0)),
    "projected without cap": (Rule("projected", 9.0), (1.0, -1.0, 0.0, -0.5), (2.0, 0.0, 0.3, 0.0)),
    "rescaled": (Rule("rescaled", phi=0.7), (7.0, -6.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)),
    "scaled": (Rule("scaled", 5.0), (1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rules_of_guidance(dtype, name):
    rule, p, q = RULES[name]
    base = (1.0, 0.0, 0.0, 0.0)
    both = torch.randn(4, 4, 20, 17).to(dtype)  # several parts of a sample, and one that is not full
    u, c = both.chunk(2)
    x, m = torch.randn(2, 4, 20, 17).to(dtype), torch.randn(2, 4, 20, 17)
    last = [t.to(memory_format=torch.channels_last) for t in (c, u, x, m)]
    for inputs in ([both[1::2], both[::2], x, m], last):
        assert available(inputs)
        result, kept = guided(inputs, p, q, base, rule, keep=True)
        expected, p_exact = reference_guided([t.double() for t in inputs], p, q, base, rule, keep=True)
        assert result.dtype == dtype and kept is not None and kept.dtype == torch.float32
        eps = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(
            result.double(), expected, rtol=1.01 * eps, atol=4e-6 * expected.abs().max().item()
        )
        torch.testing.assert_close(kept.double(), p_exact, rtol=1e-5, atol=1e-5)
        exact = torch.stack([(c.double() ** 2).flatten(1).sum(1), (c.double() * u).flatten(1).sum(1)])
        found = products([c, u], (1.0, 0.0), (0.0, 1.0))[:2].double()
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-3)


def test_rules_where_a_norm_is_zero():
    zero, one = torch.zeros(2, 8), torch.ones(2, 8)
    for rule, p, q in RULES.values():
        for inputs in ([zero, zero, zero, zero], [one, one, zero, zero], [zero, one, one, zero]):
            result, _ = guided(inputs, p, q, (1.0, 0.0, 0.0, 0.0), rule)
            expected, _ = reference_guided(inputs, p, q, (1.0, 0.0, 0.0, 0.0), rule)
            torch.testing.assert_close(result, expected)


def test_a_large_mean_does_not_cancel():
    p, q = torch.randn(2, 4000) + 1000.0, torch.randn(2, 4000)
    rule = Rule("rescaled", phi=1.0)
    result, _ = guided([p, q], (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), rule)
    expected, _ = reference_guided([p.double(), q.double()], (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), rule)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-3)


SPECS = [
    ("apg:7", "epsilon"),
    ("apg:7,momentum=0", "v"),
    ("apg:7,space=network,eta=0.3,size=100", "epsilon"),
    ("apg:7,norm=0,form=diffusers", "denoised"),
    ("apg:7,form=comfy,cfg_steps=1", "v"),
    ("cfg:7+rescale:0.7", "v"),
    ("cfg:7+rescale:0.7,space=v", "epsilon"),
    ("cfg_zero:5,zero_steps=0", "v"),
    ("cfg:4,stop=0.5+rescale:0.7", "denoised"),
    ("cfg:4+adaptive:0.99", "v"),
    ("cfg:4+adaptive:0.9,policy=per_sample", "denoised"),
]


@pytest.mark.parametrize(("spec", "prediction"), SPECS)
def test_guided_runs_are_the_same_with_and_without_kernels(spec, prediction, monkeypatch):
    x, results = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)), []
    for mode in ("triton", "torch"):
        monkeypatch.setattr(dispatch, "mode", lambda mode=mode: mode)
        denoiser = fs.Denoiser(
            lambda x, t: torch.tanh(x) * 0.8,
            VP.linear(),
            prediction,
            unconditional=lambda x, t: 0.5 * torch.sin(x) + 0.1,
        )
        results.append((fs.sample(denoiser, x, steps=3, guidance=spec), denoiser.nfe))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-4, atol=2e-4)
