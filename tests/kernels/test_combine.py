"""``combine`` against float64, in every dtype and layout, by every implementation that this machine has."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import pytest
import repository
import torch
from kernel_checks import COEFS, FLOATS, check, layouts

from fewstep.kernels import combine, dispatch, native, reference, table
from fewstep.kernels.layout import as_line, collapsed, dense
from fewstep.samplers import PhiloxNoise
from fewstep.schedules import Node


@pytest.mark.parametrize("layout", layouts(torch.float32))
@pytest.mark.parametrize("dtype", FLOATS)
def test_torch(dtype, layout):
    inputs = layouts(dtype)[layout]
    before = [x.clone() for x in inputs]
    coefs = torch.tensor(COEFS, dtype=torch.float64)
    check(combine(inputs, COEFS), inputs, coefs)
    check(reference.combine(inputs, coefs), inputs, coefs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))
    if inputs[0].ndim and inputs[0].numel():
        rows = torch.randn(3, 4, inputs[0].shape[0]).double()  # fp32 holds them: they are rounded to it
        check(combine(inputs, rows), inputs, rows)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
class TestNative:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_it_is_as_exact(self, dtype, tmp_path_factory, monkeypatch):
        if "FEWSTEP_CACHE" not in os.environ:
            monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for inputs in layouts(dtype).values():
            if native.fits(inputs, COEFS):
                check(native.combine(inputs, COEFS), inputs, torch.tensor(COEFS, dtype=torch.float64))
        assert not native.fits(layouts(dtype)["every other"], COEFS)
        special = [torch.tensor([float("nan"), float("inf"), 1e38, 65504.0, -0.0] * 5).to(dtype)]
        for result, expected in zip(
            native.combine(special, [[2.0], [1.0]]), reference.combine_numbers(special, [[2.0], [1.0]])
        ):
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)

    def test_a_compiler_that_fails_is_quoted(self, tmp_path, monkeypatch):
        fake = tmp_path / "broken-c++"
        fake.write_text("#!/bin/sh\necho this is not a compiler >&2\nexit 1\n")
        fake.chmod(0o755)
        monkeypatch.setenv("CXX", str(fake))
        monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
        with pytest.raises(RuntimeError, match="this is not a compiler"):
            native.library.__wrapped__()


def test_a_counter_reads_a_table():
    inputs = layouts(torch.float32)["contiguous"]
    steps = torch.randn(5, 2, 4).double()
    for i in range(5):
        expected = combine(inputs, steps[i].tolist())
        for counter in (i, torch.tensor([i]), torch.tensor(i)):
            results = combine(inputs, steps, counter)
            assert all(torch.equal(a, b) for a, b in zip(results, expected))
    assert table([COEFS]).shape == (1, 3, 4) and table([COEFS]).dtype == torch.float64


def test_wrong_shapes_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"one shape can be combined, got \(2, 3\) and \(3, 2\)"):
        combine([x, torch.zeros(3, 2)], [[1.0, 2.0]])
    with pytest.raises(ValueError, match="2 tensors need 2 coefficients in every row"):
        combine([x, x], [[1.0]])
    with pytest.raises(ValueError, match=r"have shape \(outputs, 2\)"):
        combine([x, x], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="coefficients for 3 samples, but the tensors have 2"):
        combine([x, x], torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("value", "error"), [("fast", "must be one of auto, torch"), ("triton", "needs CUDA")]
)
def test_the_setting_is_checked(value, error, monkeypatch):
    monkeypatch.setattr(dispatch, "mode", dispatch.mode.__wrapped__)
    monkeypatch.setattr(dispatch, "_interprets", lambda: False)
    monkeypatch.setenv("FEWSTEP_KERNELS", value)
    with pytest.raises(ValueError, match=error):
        dispatch.backend(torch.zeros(2))


def test_small_tensors_and_torch_have_no_kernel(monkeypatch):
    small, large = torch.zeros(8), torch.zeros(dispatch.LARGE)
    for mode, expected in (("auto", None), ("torch", None), ("native", native.combine)):
        monkeypatch.setattr(dispatch, "mode", lambda mode=mode: mode)
        assert dispatch.fused(small) is None
        assert dispatch.fused(large) is expected


def test_layouts_are_told_apart():
    x = torch.zeros(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    assert (
        dense(last)
        and dense(x.transpose(0, 3))
        and not dense(x[:, :, 1:])
        and not dense(x[:1].expand(2, 3, 4, 5))
    )
    assert as_line([last, last]) and not as_line([x, last])
    assert not as_line([x.transpose(0, 3)] * 2, rows=True)
    assert collapsed([x, x]) == ([2, 60], [[60, 1], [60, 1]])
    assert collapsed([x[:, :, 1:]]) == ([2, 3, 15], [[60, 20, 1]])


def test_philox_noise_is_normal_and_keyed():
    a, b = Node(1.0, 1.0, 3.0), Node(0.5, 1.0, 2.0)
    like = torch.empty(3, 100_000)
    whole = PhiloxNoise([7, -8, 2**63])(like, a, b)
    assert torch.equal(whole[1:2], PhiloxNoise([-8])(like[:1], a, b))
    noise = PhiloxNoise([7, -8, 2**63])
    assert torch.equal(noise(like, a, b), whole) and not torch.equal(noise(like, a, b), whole)
    assert torch.equal(noise.again()(like, a, b), whole)
    assert not torch.equal(PhiloxNoise([7, -8, 2**63])(like, b, a), whole)
    assert (whole.mean(1).abs() < 0.015).all() and ((whole.std(1) - 1).abs() < 0.01).all()
    assert (torch.corrcoef(whole) - torch.eye(3)).abs().max() < 0.015
    fourth = (whole**4).mean()
    assert abs(float(fourth) - 3.0) < 0.1
    with pytest.raises(ValueError, match="1 seeds for a batch of 3"):
        PhiloxNoise([1])(like, a, b)


def test_philox_has_the_published_numbers():
    """The known answer of Random123 for counter and key zero, made normal."""
    z = reference.philox_normal(torch.tensor([0]), 0, torch.empty(1, 1))
    u, v = ((word >> 8) * 2.0**-24 + 2.0**-25 for word in (0x6627E8D5, 0xE169C58D))
    assert float(z) == pytest.approx(math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * v), rel=1e-5)


def test_triton_in_its_interpreter():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton", reason="needs the package triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FEWSTEP_KERNELS": "triton"}
    tests = repository.ROOT / "tests" / "kernels" / "interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    done = subprocess.run(
        command, cwd=repository.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
