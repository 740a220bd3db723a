"""A recipe in the diffusers scheduler: the numbers of the library, saved with the pipeline, refused elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import fewstep as fs
from fewstep import FewStepScheduler
from fewstep.eval.models import load_model
from fewstep.eval.targets import load_target
from fewstep.eval.tuning import fit

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "sample"}


@pytest.fixture(scope="module")
def recipe():
    return fit(
        load_target("builtin:gmm"), 5, trajectories=12, teacher_steps=40, schedules=["arctan:sigma_max=8"]
    )


def scheduler(recipe, **betas) -> FewStepScheduler:
    return FewStepScheduler.from_config(
        DDIMScheduler(**(BETAS | betas), clip_sample=False).config, recipe=recipe
    )


def run(chosen: FewStepScheduler, noise: torch.Tensor, denoiser: fs.Denoiser, first: int = 0) -> torch.Tensor:
    chosen.set_begin_index(first)
    x = noise * chosen.init_noise_sigma
    for t in chosen.timesteps[first:]:
        x = chosen.step(denoiser.fn(x, t.float().expand(len(x))), t, x, return_dict=False)[0]
    return x


def test_the_scheduler_gives_the_library_s_numbers(recipe, tmp_path):
    model, indices = load_model("builtin:gmm"), range(6)
    noise = model.noise(indices)
    assert model.denoiser(indices).prediction == "denoised"
    grid = recipe.grid(model.noise_schedule)
    expected = fs.sample(
        model.denoiser(indices), recipe.init_noise_sigma(model.noise_schedule) * noise, recipe=recipe
    )
    path = tmp_path / "recipe.json"
    recipe.save(path)
    for given in (recipe, path, json.loads(path.read_text())):
        chosen = scheduler(given)
        chosen.set_timesteps(5)
        assert len(chosen.timesteps) == 5 == grid.steps
        torch.testing.assert_close(run(chosen, noise, model.denoiser(indices)), expected, rtol=0, atol=1e-4)
    chosen.save_pretrained(tmp_path)  # the file holds the recipe itself
    path.unlink()
    again: Any = FewStepScheduler.from_pretrained(tmp_path)
    again.set_timesteps(5)
    torch.testing.assert_close(run(again, noise, model.denoiser(indices)), expected, rtol=0, atol=1e-4)


def test_image_to_image_goes_through_the_rest_of_the_levels(recipe):
    model, indices = load_model("builtin:gmm"), range(4)
    chosen = scheduler(recipe)
    chosen.set_timesteps(5)
    grid = recipe.grid(model.noise_schedule)
    start = chosen.init_noise_sigma * model.noise(indices)
    expected = fs.sample(model.denoiser(indices), start, "dpmpp_2m", sigmas=grid.level[2:])
    result = run(chosen, model.noise(indices), model.denoiser(indices), first=2)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_other_steps_and_other_models_are_refused(recipe):
    with pytest.raises(
        ValueError, match="this recipe is for 5 evaluations: num_inference_steps must be that, got 6"
    ):
        scheduler(recipe).set_timesteps(6)
    with pytest.raises(ValueError, match="not the one of this model"):
        scheduler(recipe, beta_schedule="scaled_linear").set_timesteps(5)
    with pytest.raises(ValueError, match="cannot read the recipe"):
        scheduler("nowhere.json")
