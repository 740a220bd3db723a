"""Configs of the diffusers scheduler: what is read, kept, refused, saved and loaded."""

from __future__ import annotations

import copy
import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import repository
import torch

pytest.importorskip("diffusers")

from diffusers_runs import SD, FewStepScheduler, X, diffusers, make, run

import fewstep as fs


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


def test_align_your_steps_of_the_family_that_the_config_tells() -> None:
    """SDXL has the noise schedule of its ancestors, but is shipped with other settings."""
    shared = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    xl = shared | {"timestep_spacing": "leading", "interpolation_type": "linear"}
    for config, family in ((shared, "sd15"), (xl, "sdxl")):
        native = diffusers.EulerDiscreteScheduler.from_config(config)
        chosen, named = (
            FewStepScheduler.from_config(native.config, schedule=s) for s in ("ays", f"ays:model={family}")
        )
        for scheduler in (chosen, named):
            scheduler.set_timesteps(10)
        assert torch.equal(chosen.sigmas, named.sigmas)
        assert chosen.sigmas[1] == pytest.approx({"sd15": 6.475, "sdxl": 6.315}[family])


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
    t = scheduler.timesteps[0]
    assert isinstance(
        scheduler.step(X, t, X), importlib.import_module("fewstep.hosts.diffusers").FewStepSchedulerOutput
    )
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
for name in ("FewStepScheduler", "guide", "GuidanceNotApplied"):
    try:
        getattr(fewstep, name)
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
