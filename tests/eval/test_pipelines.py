"""Diffusers pipelines as models of the command line: the network that they call, with their condition."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_pipelines
import torch

import fewstep as fs
from fewstep.eval.cli import main
from fewstep.eval.pipelines import PROMPTS, load_model, model_of
from fewstep.eval.targets import load_target
from fewstep.tuning import load

TUNE = "--nfe 3 --trajectories 8 --teacher-steps 16 --test 4 --schedule arctan --method closed-form".split()


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> tuple[Any, str]:
    torch.manual_seed(0)
    pipe, folder = tiny_pipelines._dit(), tmp_path_factory.mktemp("dit")
    pipe.transformer.eval()  # in training it drops labels
    pipe.save_pretrained(folder)
    return pipe, str(folder)


def test_a_folder_is_tuned_with_guidance(dit, tmp_path, capsys):
    """And the recipe runs on its network, with the network's own classes."""
    _, folder = dit
    out = tmp_path / "recipe.json"
    assert main(["tune", "--model", folder, "--guidance", "2", *TUNE, "-o", str(out), "--json"]) == 0
    recipe = load(json.loads(capsys.readouterr().out))
    assert recipe.model == folder and recipe.guidance.startswith("cfg") and recipe.prediction == "epsilon"
    model = load_model(folder)
    x = recipe.init_noise_sigma(model.noise_schedule) * model.noise([0, 1])
    samples = fs.sample(model.denoiser([0, 1]), x, guidance=2.0, recipe=recipe)
    assert samples.shape == (2, *model.shape) and samples.isfinite().all()


def test_the_same_weights_have_the_same_fingerprint_and_others_another(dit):
    pipe, folder = dit
    assert load_model(folder).fingerprint == model_of(pipe, "here").fingerprint
    torch.manual_seed(1)
    assert model_of(tiny_pipelines._dit(), "here").fingerprint != load_model(folder).fingerprint


def test_a_pipeline_without_condition_is_its_network():
    pipe = tiny_pipelines._ddpm()
    model = model_of(pipe, "ddpm")
    x, t = model.noise([0, 1]), torch.tensor([10.0, 10.0])
    torch.testing.assert_close(model.denoiser([0, 1]).fn(x, t), pipe.unet(x, t).sample)
    assert not model.guided


def test_a_prompt_is_encoded_once_and_belongs_to_its_sample():
    pipe, asked = tiny_pipelines._sd(), []

    class Encoder:
        def to(self, device):
            return self

    def encode_prompt(prompt, device, count, guided):
        asked.append(prompt)
        value = float(PROMPTS.index(prompt) + 1)
        return torch.full((1, 3, 8), value), torch.zeros(1, 3, 8)

    object.__setattr__(pipe, "text_encoder", Encoder())
    object.__setattr__(pipe, "encode_prompt", encode_prompt)
    model = model_of(pipe, "sd")
    denoiser = model.denoiser([1, 0, 9])
    model.denoiser([0, 1])
    assert sorted(asked) == sorted(PROMPTS[:2]) and model.guided
    x, t = model.noise([1, 0, 9]), torch.full((3,), 500.0)
    hidden = torch.stack([torch.full((3, 8), v) for v in (2.0, 1.0, 2.0)])
    torch.testing.assert_close(denoiser.fn(x, t), pipe.unet(x, t, encoder_hidden_states=hidden).sample)


def test_what_is_no_pipeline_is_refused_with_what_is_allowed(tmp_path):
    with pytest.raises(ValueError, match="builtin:NAME, module:callable, or a diffusers folder or Hub id"):
        load_target(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="is a FluxPipeline, which is not known; allowed: DDPMPipeline"):
        model_of(tiny_pipelines._flux(), "flux")
    clips = tiny_pipelines._dit()
    clips.scheduler.register_to_config(clip_sample=True)
    with pytest.raises(ValueError, match="set clip_sample and thresholding to false"):
        model_of(clips, "dit")
