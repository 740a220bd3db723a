"""The contract of a diffusers scheduler: configs, positions, noise, state."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import repository
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")

import fewstep as fs

diffusers: Any = importlib.import_module("diffusers")
FewStepScheduler: Any = fs.FewStepScheduler
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SOLVERS = ("ddim", "dpmpp_2m", "unipc:order=3", "deis", "heun", "euler_ancestral")
TRANSFORMED = ("dpmpp_2m+restart:t_max=3", "unipc+skip", "dpmpp_2m+heavy_ball")
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(1.3 * x) + 0.1 * t.float() / 1000


def run(scheduler: Any, x: torch.Tensor = X, start: int = 0, **arguments: Any) -> torch.Tensor:
    for t in scheduler.timesteps[start:]:
        x = scheduler.step(network(x, t), t, x, return_dict=False, **arguments)[0]
    return x


def make(solver: str = "unipc", steps: int | None = 8, **options: Any) -> Any:
    scheduler = FewStepScheduler(**{**SD, "timestep_spacing": "trailing", **options}, solver=solver)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solvr": "unipc"}, "no argument 'solvr'.*did you mean 'solver'"),
        ({"timestep_spacin": "trailing"}, "did you mean 'timestep_spacing'"),
        ({"algorithm_type": "sde-dpmsolver++"}, "no argument 'algorithm_type'"),
        ({"solver": "unipcc"}, "did you mean 'unipc'"),
        ({"solver": "unipc:ordr=2"}, "did you mean 'order'"),
        ({"solver": "unipc:order=two"}, "must be an integer"),
        ({"schedule": "karas"}, "did you mean 'karras'"),
        ({"schedule": "karras:rh=3"}, "did you mean 'rho'"),
        ({"schedule": 7}, "must be a spec"),
        ({"beta_schedule": "linaer"}, "did you mean 'linear'"),
        ({"prediction_type": "v_predicton"}, "did you mean 'v_prediction'"),
    ],
)
def test_a_users_mistake_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewStepScheduler(**arguments)
    with pytest.raises(ValueError, match=message):
        FewStepScheduler.from_config(diffusers.DDIMScheduler().config, **arguments)


@pytest.mark.parametrize("wrong", ["stabilityai/some-model", None, 3])
def test_from_config_takes_a_config(wrong: Any) -> None:
    with pytest.raises(TypeError, match="from_pretrained"):
        FewStepScheduler.from_config(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "integer >= 1"),
        ({"num_inference_steps": 2.5}, "integer >= 1"),
        ({}, "needs num_inference_steps"),
        ({"timesteps": [1, 2, 3]}, "strictly decreasing"),
        ({"timesteps": [1000, 2]}, r"lie in \[0, 999\]"),
        ({"timesteps": [500, -2]}, r"lie in \[0, 999\]"),
        ({"sigmas": [1.0, 1.0, 0.5]}, "strictly decreasing"),
        ({"sigmas": []}, "must not be empty"),
        ({"sigmas": [3.0, 1.0], "timesteps": [500]}, "same length"),
        ({"num_inference_steps": 5, "sigmas": [3.0, 1.0]}, "num_inference_steps is 5"),
    ],
)
def test_set_timesteps_names_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(steps=None).set_timesteps(**arguments)


FLOW_SOURCES = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}),
    (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
]


@pytest.mark.parametrize(("name", "options"), FLOW_SOURCES)
def test_a_flow_config_stays_one(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """From memory, where a config does not name its class, and from a file; through our own file too."""
    native = getattr(diffusers, name)(**options)
    native.save_pretrained(tmp_path)
    first = FewStepScheduler.from_config(native.config)
    second = FewStepScheduler.from_pretrained(tmp_path)
    first.save_pretrained(tmp_path / "ours")
    third = FewStepScheduler.from_pretrained(tmp_path / "ours")
    for scheduler in (first, second, third, copy.deepcopy(third)):
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
        assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0])
        assert scheduler.timesteps.dtype == torch.float32
        x, noise = X, X.flip(0)
        assert torch.allclose(scheduler.scale_noise(x, torch.tensor([750.0]), noise), 0.25 * x + 0.75 * noise)
    changed = FewStepScheduler.from_config(native.config, shift=1.0)
    changed.set_timesteps(sigmas=[1.0, 0.5])
    assert changed.sigmas.tolist() == [1.0, 0.5, 0.0]
    changed.set_shift(3.0)
    changed.set_timesteps(sigmas=[1.0, 0.5])
    assert changed.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0])
    with pytest.raises(ValueError, match="flow model"):
        FewStepScheduler.from_config(native.config, prediction_type="epsilon")
    back = type(native).from_config(first.config).config
    assert all(back[k] == v for k, v in native.config.items() if not k.startswith("_"))


def test_a_dynamic_shift_needs_mu() -> None:
    scheduler = FewStepScheduler.from_config({"shift": 3.0, "use_dynamic_shifting": True})
    with pytest.raises(ValueError, match="needs mu"):
        scheduler.set_timesteps(4)


def test_what_the_source_class_filled_in_is_kept(tmp_path: Path) -> None:
    """DDIM spaces "leading" unless told otherwise, DPM-Solver "linspace"."""
    ddim = FewStepScheduler.from_config(diffusers.DDIMScheduler().config)
    ddim.set_timesteps(10)
    assert ddim.timesteps.tolist() == list(range(900, -1, -100))
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler", "clip_sample": False})
    )
    sparse = FewStepScheduler.from_pretrained(tmp_path)
    sparse.set_timesteps(10)
    assert sparse.timesteps.tolist() == ddim.timesteps.tolist()
    assert not sparse.config.clip_sample
    dpm = FewStepScheduler.from_config(diffusers.DPMSolverMultistepScheduler().config)
    dpm.set_timesteps(10)
    assert dpm.timesteps.tolist()[:2] == [999, 899]


def test_save_and_load(tmp_path: Path) -> None:
    first = make(
        "unipc:order=3",
        schedule="karras:rho=5.0",
        clip_sample=True,
        trained_betas=np.linspace(1e-4, 0.02, 100),
    )
    first.save_pretrained(tmp_path)
    second, unused = FewStepScheduler.from_pretrained(tmp_path, return_unused_kwargs=True)
    second.set_timesteps(8)
    assert {k: v for k, v in second.config.items() if not k.startswith("_")} == {
        k: v for k, v in first.config.items() if not k.startswith("_")
    }
    assert torch.equal(run(first), run(second))
    assert "unknown" not in second.config
    native = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert native.config.trained_betas == second.config.trained_betas


def test_a_solver_object_stands_for_its_spec() -> None:
    assert FewStepScheduler(solver=fs.solver("unipc:order=3")).config.solver == "unipc:order=3"


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_as_many_steps_as_training_indices(spacing: str) -> None:
    """Rounding would visit indices twice."""
    for source in (diffusers.DPMSolverMultistepScheduler(), diffusers.DDIMScheduler()):
        scheduler = FewStepScheduler.from_config(
            source.config, solver="ddim", timestep_spacing=spacing, steps_offset=1
        )
        for steps in (999, 1000):
            scheduler.set_timesteps(steps)
            assert len(scheduler.timesteps) == steps
            assert 0 <= scheduler.timesteps[-1] < scheduler.timesteps[0] <= 999


def test_other_classes_fill_in_their_own_defaults() -> None:
    """From DDIM over ours to a third class is as from DDIM to the third class."""
    ddim = diffusers.DDIMScheduler(**SD)
    ours = FewStepScheduler.from_config(ddim.config, solver="heun")
    for name in (
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "DEISMultistepScheduler",
        "EDMEulerScheduler",
    ):
        target = getattr(diffusers, name)
        assert (
            target.from_config(ours.config).config.items()
            >= {
                k: v
                for k, v in target.from_config(ddim.config).config.items()
                if not k.startswith(("_", "trained"))
            }.items()
        )


def test_changed_configs_are_read_late() -> None:
    scheduler = make("ddim", steps=None)
    scheduler.config.timestep_spacing = "leading"  # diffusers lets users do this
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(range(900, -1, -100))
    scheduler.register_to_config(solver="heun")
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 19


def test_public_interface() -> None:
    scheduler = make("unipc")
    assert scheduler.order == 1
    assert scheduler.init_noise_sigma == 1.0
    assert len(scheduler) == 1000
    assert scheduler.compatibles
    assert scheduler.scale_model_input(X, 0.0) is X
    assert torch.allclose(scheduler.alphas_cumprod, diffusers.DDPMScheduler(**SD).alphas_cumprod, atol=1e-6)
    assert torch.allclose(scheduler.betas, diffusers.DDPMScheduler(**SD).betas, atol=1e-7)
    assert not hasattr(FewStepScheduler.from_config({"shift": 1.0}), "betas")
    fresh = make(steps=None)
    assert fresh.timesteps.tolist() == list(range(999, -1, -1))
    assert fresh.num_inference_steps is None
    every = make("ddim", steps=None)
    direct = make("ddim", steps=None)
    every.set_timesteps(timesteps=list(range(999, -1, -1)))
    assert torch.equal(
        direct.step(X, 7, X)[0], every.step(X, 7, X)[0]
    )  # without set_timesteps: every training step


# -- a run -----------------------------------------------------------------------------------------


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


# -- positions -------------------------------------------------------------------------------------


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


# -- noise -----------------------------------------------------------------------------------------


def test_add_noise_by_value() -> None:
    native = diffusers.DDPMScheduler(**SD)
    noise = X.flip(0)
    for scheduler in (make(steps=None), make(steps=7)):
        for times in (torch.tensor([503]), torch.tensor([10, 999]), torch.tensor([0])):
            expected = native.add_noise(X, noise, times)
            assert torch.allclose(scheduler.add_noise(X, noise, times), expected, atol=1e-5)
            assert torch.allclose(scheduler.add_noise(X, noise, times.float()), expected, atol=1e-5)
            assert torch.allclose(scheduler.scale_noise(X, times, noise), expected, atol=1e-5)
            assert torch.allclose(
                scheduler.get_velocity(X, noise, times), native.get_velocity(X, noise, times), atol=1e-5
            )
        low = scheduler.add_noise(X, noise, torch.tensor([502]))
        high = scheduler.add_noise(X, noise, torch.tensor([503]))
        between = scheduler.add_noise(X, noise, torch.tensor([502.5]))
        assert torch.allclose(between, (low + high) / 2, atol=1e-4)
        assert scheduler.add_noise(X.bfloat16(), noise.bfloat16(), torch.tensor([5])).dtype == torch.bfloat16


def test_add_noise_by_position() -> None:
    for solver in ("dpmpp_2m", "heun"):
        scheduler = make(solver)
        scheduler.set_begin_index(4)
        noise, anything = X.flip(0), torch.tensor([3, 3])

        def at(i: int, scheduler: Any = scheduler, noise: torch.Tensor = noise) -> torch.Tensor:
            sigma = scheduler.sigmas[i]
            return (X + sigma * noise) / (1 + sigma**2).sqrt()

        assert torch.allclose(scheduler.add_noise(X, noise, anything), at(4), atol=1e-5)
        t = scheduler.timesteps[4]
        scheduler.step(network(X, t), t, X)
        assert torch.allclose(scheduler.add_noise(X, noise, anything), at(5), atol=1e-5)


def test_add_noise_with_a_network_of_integers_only() -> None:
    scheduler = make("dpmpp_2m", schedule="karras", integer_timesteps=True)
    t = scheduler.timesteps[5]
    assert scheduler.index_for_timestep(t.clone()) == 5


# -- batches, precision, compilation --------------------------------------------------------------


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


# -- several users ---------------------------------------------------------------------------------


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


# -- loading ---------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_in_a_process_that_only_imported_fewstep(tmp_path: Path) -> None:
    """diffusers resolves the module of a saved class among those that are imported; importing ours is cheap."""
    unet = diffusers.UNet2DModel(
        block_out_channels=(4,),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
    )
    diffusers.DDPMPipeline(unet=unet, scheduler=make("heun")).save_pretrained(tmp_path / "pipe")
    (tmp_path / "some_clone").symlink_to(fs.__path__[0], target_is_directory=True)
    code = """
import inspect, pickle, sys
import fewstep
assert "fewstep.hosts.diffusers" in sys.modules, "fewstep/__init__.py must import hosts.diffusers"
module = sys.modules["fewstep.hosts.diffusers"]
for name in ("nothing", "__wrapped__", "ModelMixin"):
    assert not hasattr(module, name)
inspect.getmodule(fewstep.sample), inspect.stack()  # these look at every module
assert not any(name.partition(".")[0] == "diffusers" for name in sys.modules)

from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("pipe")
assert type(pipe.scheduler) is fewstep.FewStepScheduler is module.FewStepScheduler
assert pipe.scheduler.config.solver == "heun"
assert fewstep.FewStepScheduler.__module__ == "fewstep.hosts.diffusers"
assert pickle.loads(pickle.dumps(fewstep.FewStepScheduler)) is fewstep.FewStepScheduler

import some_clone  # as in ComfyUI's custom_nodes: another folder name, another class
assert some_clone.FewStepScheduler.__module__ == "some_clone.hosts.diffusers"
assert some_clone.FewStepScheduler is not fewstep.FewStepScheduler
scheduler = some_clone.FewStepScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(4)
assert type(scheduler._run.plan).__module__ == "some_clone.hosts.diffusers_plan"
print("loaded")
"""
    assert "loaded" in python(code, tmp_path)


def test_without_diffusers_the_message_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["diffusers"] = None
import fewstep
try:
    fewstep.FewStepScheduler
except ImportError as error:
    assert "fewstep[diffusers]" in str(error), error
else:
    raise SystemExit("no error")
"""
    python(code, tmp_path)


def python(code: str, tmp_path: Path) -> str:
    """Run code in a new process that finds fewstep and the folder."""
    folders = f"{Path(fs.__path__[0]).parent}{os.pathsep}{tmp_path}"
    done = repository.python(["-c", code], cwd=tmp_path, env={"PYTHONPATH": folders})
    assert done.returncode == 0, done.stdout
    return done.stdout
