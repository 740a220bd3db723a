"""The diffusers scheduler with many samples, 16 bits, torch.compile and several threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers_runs import SOLVERS, X, make, network, run


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_timestep_for_each_sample(solver: str) -> None:
    """Every sample has its own run: the numbers are those of one batch after the other."""
    starts = {"heun": (0, 4), "euler_ancestral": (0, 3)}.get(solver, (0, 3))
    expected = []
    for i, start in enumerate(starts):
        scheduler = make(solver)
        scheduler.set_begin_index(start)
        expected.append(run(scheduler, X[i : i + 1], start, generator=torch.Generator().manual_seed(i)))
    scheduler = make(solver)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    x, last = X, len(scheduler.timesteps)
    for k in range(last - starts[1]):
        t = scheduler.timesteps[[starts[0] + k, starts[1] + k]]
        output = torch.cat([network(x[i : i + 1], t[i]) for i in range(2)])
        x, x_0 = scheduler.step(output, t, x, generator=generators, return_dict=False)
        assert x_0.shape == x.shape
    assert torch.equal(x[1:], expected[1])
    one = x[:1]
    for k in range(last - starts[1], last):  # the other goes on with a neighbour that begins again
        t = scheduler.timesteps[[k, k]]
        output = torch.cat([network(one, t[0])] * 2)
        one = scheduler.step(output, t, torch.cat([one, one]), generator=generators)[0][:1]
    assert torch.equal(one, expected[0])


def test_what_a_solver_keeps_can_be_cropped() -> None:
    """ChronoEdit leaves frames off in the middle of a run."""
    for solver in ("dpmpp_2m", "unipc:order=3", "deis", "heun"):
        whole, part = make(solver), make(solver)
        x = y = X
        for i, t in enumerate(whole.timesteps):
            if i == 4:
                y = y[:, :, :2]
                for j in range(len(part.model_outputs)):
                    assert part.model_outputs[j].shape == X.shape
                    part.model_outputs[j] = part.model_outputs[j][:, :, :2]
                assert part.last_sample is None
                assert len(part.model_outputs) > 0 or solver == "heun"
            x = whole.step(network(x, t), t, x)[0]
            y = part.step(network(y, t), t, y)[0]
        assert torch.equal(x[:, :, :2], y)


def test_keeping_fp32_between_16_bit_steps(record_property: Any) -> None:
    """Only the network's input and the result are rounded: the error of 50 steps falls to that of a few roundings."""
    exact = run(make("unipc", 50), X.double()).float()
    for dtype in (torch.bfloat16, torch.float16):
        error = {}
        for keep in (False, True):
            scheduler = make("unipc", 50, keep_float32=keep)
            x = X.to(dtype)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x.double(), t).to(dtype), t, x)[0]
            assert x.dtype == dtype
            error[keep] = (x.float() - exact).square().mean().sqrt().item()
        record_property(f"rms error without and with fp32 latents, {dtype}", (error[False], error[True]))
        assert error[True] < 0.6 * error[False]
    scheduler = make("dpmpp_2m", 4, keep_float32=True)
    plain = make("dpmpp_2m", 4)
    x = y = X.bfloat16()
    for t in scheduler.timesteps:  # latents that a host has replaced are taken
        x = scheduler.step(network(x, t), t, x.clone())[0]
        y = plain.step(network(y, t), t, y)[0]
        assert (x - y).abs().mean() < 0.02 * y.abs().mean()


def test_compiled_once_for_every_step() -> None:
    from torch._dynamo.testing import CompileCounter

    for solver in ("unipc:order=3", "euler_ancestral"):
        scheduler = make(solver, 12)
        torch.manual_seed(0)
        expected = run(scheduler)
        scheduler.set_timesteps(12)
        torch.manual_seed(0)
        count = CompileCounter()
        step = torch.compile(scheduler.step, fullgraph=True, backend=count)
        x = X
        with torch.no_grad():
            for t in scheduler.timesteps:
                x, _ = step(network(x, t), t, x, return_dict=False)
        assert torch.equal(x, expected)
        assert count.frame_count == 1
        torch._dynamo.reset()


def test_threads_do_not_mix() -> None:
    """One object, 8 threads, different step counts: the numbers of serial runs."""
    scheduler = make("unipc:order=3", None)
    expected = {}
    for steps in range(4, 12):
        scheduler.set_timesteps(steps)
        expected[steps] = run(scheduler)
    found: dict[int, list[torch.Tensor]] = {steps: [] for steps in expected}
    barrier = threading.Barrier(len(expected))

    def work(steps: int) -> None:
        barrier.wait()
        for _ in range(5):
            scheduler.set_timesteps(steps)
            found[steps].append(run(scheduler))

    threads = [threading.Thread(target=work, args=(steps,)) for steps in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(v) == 5 and all(torch.equal(x, expected[k]) for x in v) for k, v in found.items())


def test_a_run_may_change_threads() -> None:
    scheduler = make("unipc")
    expected = run(scheduler)
    scheduler.set_timesteps(8)
    result: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: result.append(run(scheduler)))
    thread.start()
    thread.join()
    assert torch.equal(result[0], expected)
