"""A run of the diffusers scheduler: what it publishes, steps, positions, and what hosts do in between."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")

from diffusers_runs import SOLVERS, FewStepScheduler, X, diffusers, make, network, run

import fewstep as fs

TRANSFORMED = ("dpmpp_2m+restart:t_max=3", "unipc+skip", "dpmpp_2m+heavy_ball")


@pytest.mark.parametrize("solver", SOLVERS)
def test_published_arrays(solver: str) -> None:
    for schedule in (None, "karras"):
        scheduler = make(solver, schedule=schedule)
        times, sigmas = scheduler.timesteps, scheduler.sigmas
        assert len(times) == (15 if solver == "heun" else 8)
        assert len(sigmas) == len(times) + 1
        assert sigmas.dtype == torch.float32
        assert sigmas[-1] == 0
        assert times.dtype == (torch.int64 if schedule is None else torch.float32)
        noise_schedule = fs.schedules.from_diffusers(scheduler.config)
        assert sigmas[:-1].tolist() == pytest.approx(noise_schedule.level(times.numpy()).tolist(), rel=1e-4)
        whole = make(solver, schedule=schedule, integer_timesteps=True)
        assert whole.timesteps.dtype == torch.int64
        assert (whole.timesteps - times).abs().max() <= 0.5
        assert torch.equal(whole.sigmas, sigmas)


@pytest.mark.parametrize("solver", SOLVERS)
def test_result_has_the_promoted_dtype(solver: str) -> None:
    for sample in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for output in (torch.float32, torch.bfloat16, torch.float16):
            scheduler = make(solver, 3)
            x = X.to(sample)
            for t in scheduler.timesteps:
                before = x.clone()
                m = network(x, t).to(output)
                held = m.clone()
                result = scheduler.step(m, t, x)
                assert result.prev_sample.dtype == torch.promote_types(sample, output)
                assert result.pred_original_sample.dtype == torch.promote_types(sample, output)
                assert torch.equal(x, before)
                assert torch.equal(m, held)
                x = result.prev_sample.to(sample)


def test_both_forms_of_the_result() -> None:
    one, two = make("dpmpp_2m"), make("dpmpp_2m")
    t = one.timesteps[0]
    out = one.step(network(X, t), t, X)
    result = two.step(network(X, t), t, X, return_dict=False)
    previous, denoised = result
    assert isinstance(result, tuple)
    assert len(result) == 2
    assert torch.equal(out.prev_sample, previous)
    assert torch.equal(out.pred_original_sample, denoised)
    assert torch.equal(result[1], denoised)
    assert torch.equal(result[0], previous)
    assert torch.equal(out[0], previous)
    alpha, sigma = fs.schedules.from_diffusers(one.config).alpha_sigma(999)
    assert torch.allclose(denoised, (X - float(sigma) * network(X, t)) / float(alpha), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_repeats_and_copies(solver: str) -> None:
    scheduler = make(solver)
    first = run(scheduler, generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(1)
    x = X
    for i, t in enumerate(scheduler.timesteps):
        if i == 3:  # in the middle of a run
            for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
                state = generator.get_state()
                assert torch.equal(run(other, x, 3, generator=generator), first)
                generator.set_state(state)
        x = scheduler.step(network(x, t), t, x, generator=generator)[0]
    assert torch.equal(x, first)
    with pytest.raises(ValueError, match="over; call set_timesteps"):
        scheduler.step(X, 0, X)


@pytest.mark.parametrize("solver", ["heun", "unipc+restart:t_max=3", "unipc"])
@pytest.mark.parametrize("keep_float32", [False, True])
def test_the_host_of_a_copy_holds_tensors_of_the_original(solver: str, keep_float32: bool) -> None:
    """That is no edit of the latents, and the fp32 state behind them is found again."""
    scheduler = make(solver, 12, keep_float32=keep_float32)
    x = X.bfloat16() if keep_float32 else X
    times = scheduler.timesteps
    for t in times[:5]:
        x = scheduler.step(network(x, t), t, x)[0]
    edited, copied = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        results = [run(s, x, 5, generator=torch.Generator().manual_seed(1)) for s in (scheduler, copied)]
    assert torch.equal(*results)
    if solver == "heun":
        with pytest.warns(UserWarning, match="were replaced"):
            edited.step(network(x, times[5]), times[5], x * 0.5)


class NoReads(TorchDispatchMode):
    """Fails where a tensor's value would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_to_copy"), name
        self.count += "promote" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("begin", [True, False])
def test_no_step_reads_a_tensor(solver: str, begin: bool) -> None:
    """Nor the first, with a begin index or an element of timesteps; and few operators run."""
    scheduler = make(solver, 10)
    if begin:
        scheduler.set_begin_index(0)
    x, most = X, 0
    for t in scheduler.timesteps:
        m = network(x, t)
        with NoReads() as mode:
            x = scheduler.step(m, t, x, return_dict=False)[0]
        most = max(most, mode.count)
    assert 0 < most <= 12


@pytest.mark.parametrize("solver", [*SOLVERS, *(s for s in fs.solvers() if s not in SOLVERS), *TRANSFORMED])
def test_a_whole_run_on_a_device_whose_values_nobody_knows(solver: str) -> None:
    """The meta device has shapes and no numbers: whatever would wait for a device fails there."""
    scheduler = make(solver, None)
    scheduler.set_timesteps(6, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    scheduler.set_begin_index(2)
    x = scheduler.add_noise(X.to("meta"), X.to("meta"), scheduler.timesteps[2:3])
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(scheduler.scale_model_input(x, t), t, x, return_dict=False)[0]
        x = x + 0 * scheduler.add_noise(x, x, t[None])
    assert x.shape == X.shape


def test_generators_and_given_noise() -> None:
    scheduler = make("euler_ancestral", 4)
    together = run(scheduler, generator=[torch.Generator().manual_seed(i) for i in (5, 6)])
    for i in range(2):
        scheduler.set_timesteps(4)
        assert torch.allclose(
            run(scheduler, X[i : i + 1], generator=torch.Generator().manual_seed(5 + i)), together[i : i + 1]
        )
    scheduler.set_timesteps(4)
    noise = torch.ones_like(X)
    a = scheduler.step(X, scheduler.timesteps[0], X, variance_noise=noise)[0]
    scheduler.set_timesteps(4)
    b = scheduler.step(X, scheduler.timesteps[0], X, variance_noise=2 * noise)[0]
    c = b - a
    assert torch.allclose(c, c.mean().expand_as(c), atol=1e-5)


def test_eta_of_the_call() -> None:
    for eta, spec in ((0.0, "ddim"), (0.7, "ddim:eta=0.7")):
        a = run(make("ddim"), eta=eta, generator=torch.Generator().manual_seed(0))
        assert torch.equal(a, run(make(spec), generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="has no eta"):
        run(make("unipc"), eta=0.5)
    with pytest.raises(TypeError, match=r"no argument 'genrator'.*did you mean 'generator'"):
        run(make("unipc"), genrator=None)


def test_learned_variance_is_split_off() -> None:
    a, b = make("dpmpp_2m"), make("dpmpp_2m")
    t = a.timesteps[0]
    m = network(X, t)
    assert torch.equal(a.step(torch.cat([m, m], 1), t, X)[0], b.step(m, t, X)[0])
    with pytest.raises(ValueError, match="must be equal"):
        b.step(m[:, :3], t, X)


def test_clipping() -> None:
    scheduler = make("dpmpp_2m", clip_sample=True, clip_sample_range=0.5)
    assert run(scheduler).abs().max() <= 0.5
    scheduler = make("dpmpp_2m", thresholding=True, sample_max_value=1.0)
    assert run(scheduler).abs().max() <= 1.0


def test_the_first_step_finds_its_place() -> None:
    for solver, at in (("dpmpp_2m", 3), ("heun", 4)):
        expected = make(solver)
        expected.set_begin_index(at)
        expected = run(expected, start=at)
        reference = make(solver)
        value = reference.timesteps[at]
        for timestep in (
            value,
            value.clone(),
            value.item(),
            float(value) + 1e-5,
            np.float32(value),
            value[None],
        ):
            scheduler = make(solver)
            first = scheduler.step(network(X, value), timestep, X, return_dict=False)[0]
            assert scheduler.step_index == at + 1
            assert torch.equal(run(scheduler, first, at + 1), expected)
    with pytest.raises(ValueError, match="one for each of 2, got 3"):
        make().step(X, torch.tensor([3, 2, 1]), X)
    scheduler = make()
    with pytest.warns(UserWarning, match="not on the schedule"):
        scheduler.step(X, 5000, X)


@pytest.mark.parametrize("solver", ["heun"])
def test_a_start_between_stages_waits_for_the_next_step(solver: str) -> None:
    aligned = make(solver)
    aligned.set_begin_index(4)
    expected = run(aligned, start=4)
    scheduler = make(solver)
    scheduler.set_begin_index(3)
    with pytest.warns(UserWarning, match="between the stages"):
        assert torch.equal(run(scheduler, start=3), expected)
    for wrong in (-1, 15):
        scheduler = make(solver)
        scheduler.set_begin_index(wrong)
        with pytest.raises(ValueError, match=r"15 evaluations, 0 to 14"):
            scheduler.step(X, 0, X)


def test_sigmas_edited_before_the_first_step_are_used() -> None:
    for solver in ("dpmpp_2m", "unipc", "heun", "euler_ancestral"):
        scheduler = make(solver, 6)
        plain = run(scheduler, generator=torch.Generator().manual_seed(0))
        scheduler.set_timesteps(6)
        scheduler.sigmas[-1] = scheduler.sigmas[-1]
        assert torch.equal(run(scheduler, generator=torch.Generator().manual_seed(0)), plain)
        scheduler.set_timesteps(6)
        scheduler.sigmas[0] *= 1.1
        assert not torch.equal(run(scheduler, generator=torch.Generator().manual_seed(0)), plain)
        scheduler.set_timesteps(6)
        assert torch.equal(run(scheduler, generator=torch.Generator().manual_seed(0)), plain)
    scheduler.set_timesteps(6)
    scheduler.sigmas[2] = scheduler.sigmas[1]
    with pytest.raises(ValueError, match="strictly decreasing"):
        run(scheduler)


def test_a_last_step_of_length_zero() -> None:
    """Cosmos 2: EDM levels in a flow class, the last level written over the final zero."""
    scheduler = FewStepScheduler.from_config(
        diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True).config, solver="dpmpp_2m"
    )
    scheduler.register_to_config(
        sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 8, dtype=torch.float64))
    scheduler.sigmas[-1] = scheduler.sigmas[-2]
    assert scheduler.sigmas[0] == 80
    assert scheduler.timesteps[0] == 80000
    truth, x = torch.full_like(X, 0.25), 80 * X
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step((x - truth) / scheduler.sigmas[i], t, x, return_dict=False)[0]
    assert scheduler.step_index == 8
    assert (x - truth).abs().max() < 0.02
    scheduler.set_timesteps(sigmas=torch.zeros(1))
    scheduler.sigmas[-1] = scheduler.sigmas[-2]  # one step: of no length, or to the end
    assert torch.allclose(
        scheduler.step(X, scheduler.timesteps[0], 80 * X)[0], torch.zeros_like(X), atol=1e-4
    )
    plain = FewStepScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config, solver="unipc")
    plain.set_timesteps(sigmas=[1.0, 0.6, 0.3])
    plain.sigmas[-1] = plain.sigmas[-2]
    x = run(plain)
    assert plain.step_index == 3
    assert torch.isfinite(x).all()


def test_a_trial_step_can_be_taken_back() -> None:
    """Cosmos 1: a step for x_0 alone, the counter set back, then the step with guided x_0."""
    config = diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min").config
    for solver in ("euler", "dpmpp_2m", "unipc"):
        plain = FewStepScheduler.from_config(config, solver=solver)
        trial = FewStepScheduler.from_config(config, solver=solver)
        plain.set_timesteps(6)
        trial.set_timesteps(6)
        a = b = X * plain.init_noise_sigma
        for t in plain.timesteps:
            m = network(plain.scale_model_input(a, t), t)
            a = plain.step(m, t, a, return_dict=False)[0]
            doubled = torch.cat([b, b])
            x_0 = trial.step(torch.cat([m, m]), t, doubled, return_dict=False)[1]
            trial._step_index -= 1
            b = trial.step(x_0[:2], t, b, return_dict=False, pred_original_sample=x_0[:2])[0]
        assert torch.allclose(a, b, atol=1e-5)


def test_replaced_latents_are_used_and_told_of_once() -> None:
    for solver, warns in (("dpmpp_2m", False), ("deis", False), ("ddim", False), ("heun", True)):
        scheduler = make(solver)
        kept = make(solver)
        x = y = X
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            for i, t in enumerate(scheduler.timesteps):
                if i in (3, 5):
                    x = x * 0.9
                x = scheduler.step(network(x, t), t, x)[0]
                y = kept.step(network(y, t), t, y[:])[0]  # a view of the same numbers is no edit
        assert len(record) == warns
        assert not torch.equal(x, y)
