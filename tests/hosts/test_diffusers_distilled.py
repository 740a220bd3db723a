"""Pipelines of distilled models: what they ask of a scheduler that others do not."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_pipelines import CASES, diffusers, randn

import fewstep as fs

FewStepScheduler: Any = fs.FewStepScheduler


@functools.cache
def sana_sprint(cls: str = "SanaSprintPipeline") -> Any:
    if not hasattr(diffusers, cls):
        pytest.skip(f"this version of diffusers has no {cls}")
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=16,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    parts = {"vae": CASES["sana"].pipeline().vae, "text_encoder": None, "tokenizer": None}
    pipe = getattr(diffusers, cls)(
        transformer=transformer.eval(), scheduler=diffusers.SCMScheduler(), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.native = pipe.scheduler
    return pipe


def sprint(pipe: Any, steps: int, batch: int = 1, **more: Any) -> torch.Tensor:
    if steps != 2:
        more.setdefault("intermediate_timesteps", None)
    arguments = {
        "prompt_embeds": randn(batch, 5, 16),
        "prompt_attention_mask": torch.ones(batch, 5),
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": steps,
    }
    with torch.no_grad():
        return pipe(**arguments | more).images


@pytest.mark.parametrize("batch", [1, 3])
def test_sana_sprint(batch: int) -> None:
    """The numbers of its own scheduler; the pipeline hands step one timestep a sample, all the same."""
    pipe = sana_sprint()
    for steps in (1, 2, 4):
        pipe.scheduler = pipe.native
        expected = sprint(pipe, steps, batch)
        pipe.scheduler = FewStepScheduler.from_config(pipe.native.config)
        assert torch.allclose(sprint(pipe, steps, batch), expected, atol=1e-4, rtol=1e-4)
        assert pipe.scheduler._run.rows is None


@pytest.mark.parametrize(
    "solver", ["dpmpp_2m", "heun", "unipc:order=3", "deis", "euler_ancestral", "dpmpp_2m+restart"]
)
def test_sana_sprint_with_any_solver(solver: str) -> None:
    pipe = sana_sprint()
    pipe.scheduler = FewStepScheduler.from_config(pipe.native.config, solver=solver, schedule="arctan")
    for steps in (12,) if "restart" in solver else (1, 2, 5):
        out = sprint(pipe, steps)
        assert torch.isfinite(out).all()
        assert pipe.scheduler.step_index == pipe.num_timesteps == len(pipe.scheduler.timesteps) - 1


def test_sana_sprint_from_an_image() -> None:
    pipe = sana_sprint("SanaSprintImg2ImgPipeline")
    image = {"image": CASES["sd_img2img"].arguments()["image"], "strength": 0.5}
    pipe.scheduler = pipe.native
    expected = sprint(pipe, 4, **image)
    pipe.scheduler = FewStepScheduler.from_config(pipe.native.config)
    assert torch.allclose(sprint(pipe, 4, **image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("image", [False, True])
def test_latent_consistency_models(image: bool) -> None:
    source = CASES["sd"].pipeline()
    cls = (
        diffusers.LatentConsistencyModelImg2ImgPipeline if image else diffusers.LatentConsistencyModelPipeline
    )
    unet = type(source.unet).from_config(source.unet.config, time_cond_proj_dim=16).eval()
    parts = dict.fromkeys(
        ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    )
    native = diffusers.LCMScheduler()
    pipe = cls(unet=unet, vae=source.vae, scheduler=native, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    more = (
        {"image": CASES["sd_img2img"].arguments()["image"], "strength": 0.6}
        if image
        else {"height": 32, "width": 32}
    )

    def call(scheduler: Any) -> torch.Tensor:
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return pipe(
                prompt_embeds=randn(1, 5, 8),
                num_inference_steps=4,
                output_type="latent",
                generator=generator,
                **more,
            ).images

    expected = call(native)
    assert torch.allclose(call(FewStepScheduler.from_config(native.config)), expected, atol=1e-4, rtol=1e-4)
    for solver in ("dpmpp_2m", "deis"):  # the pipeline returns what step says of x_0, not the state
        ours = FewStepScheduler.from_config(native.config, solver=solver)
        out = call(ours)
        assert torch.isfinite(out).all()
        assert torch.equal(out, ours._run.stepper.x)


def test_a_timestep_for_each_token() -> None:
    """LTX-Video and Sana-WM send the negative of the velocity; given frames have a timestep of their own."""
    native = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = FewStepScheduler.from_config(native.config, solver="euler")
    for scheduler in (native, ours):
        scheduler.set_timesteps(4)
    x, noise = randn(2, 6, 3), randn(2, 6, 3, seed=1)
    for t in ours.timesteps:
        tokens = torch.minimum(t.expand(2, 6), torch.tensor([1000.0, 1000.0, 1000.0, 1000.0, 0.0, 600.0]))
        expected = native.step(-noise, t, x, per_token_timesteps=tokens, return_dict=False)[0]
        found = ours.step(-noise, t, x, per_token_timesteps=tokens, return_dict=False)[0]
        due = tokens == t
        assert torch.allclose(found[due], expected[due], atol=1e-6)
        assert torch.equal(found[~due], x[~due])  # the pipelines put these back themselves
        x = found


def test_what_the_priors_of_kandinsky_pass_is_allowed() -> None:
    native = diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    ours = FewStepScheduler.from_config(native.config, solver="ddim")
    ours.set_timesteps(5)
    x = randn(1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t, after in zip(ours.timesteps, [*ours.timesteps[1:], None]):
            x = ours.step(
                torch.tanh(x), timestep=t, sample=x, generator=None, prev_timestep=after
            ).prev_sample
    assert torch.isfinite(x).all()
