"""One recipe, one result: ``fs.sample``, real diffusers pipelines with guidance, and the sampler function.

The pipelines are tiny, of random weights and in float64. Their recipe is no method that has a name, and on VP models
begins below the noisiest level.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_cases import LATENT, diffusers
from tiny_pipelines import CASES, IMAGE
from tiny_text import text_encoder

import fewstep as fs
from fewstep.eval.pipelines import PROMPTS, model_of
from fewstep.guidance import parse
from fewstep.hosts.k_diffusion import recipe_sampler
from fewstep.schedules import NoiseSchedule, TimeGrid, conversion, make_grid
from fewstep.schedules.diffusers_config import source_of
from fewstep.tuning import Recipe, schedule_digest, table_of

FewStepScheduler: Any = fs.FewStepScheduler
STEPS, SCALE, SAMPLES = 4, 2.0, 2


def recipe_for(noise_schedule: NoiseSchedule, spacing: str, guidance: str = "cfg:scale=2.0") -> Recipe:
    """DPM-Solver++(2M) with every weight changed."""
    table = table_of("dpmpp_2m", make_grid(noise_schedule, STEPS, spacing))
    rows = tuple(
        tuple(w * (1.0 + 0.01 * (i + j)) for j, w in enumerate(row)) for i, row in enumerate(table.rows)
    )
    frame, digest = noise_schedule.frame, schedule_digest(noise_schedule)
    return Recipe(
        STEPS, table.levels, rows, "fitted", "by hand", "tiny", "", frame, digest, "epsilon", guidance
    )


def pipeline(name: str, **parts: Any) -> Any:
    """The pipeline of a case in float64, on its own: others share theirs."""
    torch.manual_seed(0)
    pipe = CASES[name].build()
    for part, module in parts.items():
        pipe.register_modules(**{part: module})
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.double().eval().requires_grad_(False)
    return pipe


def through(pipe: Any, recipe: Recipe, **arguments: Any) -> torch.Tensor:
    """The latents that a pipeline ends with; of the last call of ``step``, as DiT and DDPM return images only."""
    pipe.scheduler = FewStepScheduler.from_config(pipe.scheduler.config, recipe=recipe)
    step, states = pipe.scheduler.step, []

    @functools.wraps(step)
    def recorder(*args: Any, **more: Any) -> Any:
        result = step(*args, **more)
        states.append(result[0])
        return result

    pipe.scheduler.step = recorder
    pipe(num_inference_steps=STEPS, **arguments)
    assert len(states) == STEPS
    return states[-1][:SAMPLES]


def as_sampler(
    recipe: Recipe, denoiser: fs.Denoiser, noise: torch.Tensor, guidance: float | None
) -> torch.Tensor:
    """What k-diffusion does: sigma_0 times the noise, and a model in the frame x_0 + sigma eps (of flows their own)."""
    predictor = denoiser if guidance is None else parse(guidance).bind(denoiser)

    def model(y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        node = TimeGrid.from_levels(denoiser.noise_schedule, [float(sigma[0]), 0.0])[0]
        x = y if recipe.frame == "flow" else node.alpha * y
        c_x, c_m = conversion(predictor.prediction, "denoised", node)
        return c_x * x + c_m * predictor(x, node)

    sigmas = torch.tensor(recipe.levels, dtype=torch.float64)
    return recipe_sampler(recipe)(model, sigmas[0] * noise, sigmas, {}, None, True)


def one_result(
    recipe: Recipe, denoiser: fs.Denoiser, noise: torch.Tensor, theirs: torch.Tensor, guidance: float | None
) -> None:
    """All three agree far beyond what another start or another first time would make of it."""
    start = recipe.init_noise_sigma(denoiser.noise_schedule) * noise
    ours = fs.sample(denoiser, start, recipe=recipe, guidance=guidance)
    # Networks are told the time in float32.
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(as_sampler(recipe, denoiser, noise, guidance), ours, rtol=1e-6, atol=1e-6)
    other = fs.sample(denoiser, 1.001 * start, recipe=recipe, guidance=guidance)
    assert (other - ours).abs().max() > 1e-4 * ours.abs().max()


def unit_noise(*shape: int) -> torch.Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("model", "spacing"),
    [
        ("DDIMScheduler", "arctan:sigma_max=4"),
        ("EDMEulerScheduler", "karras:sigma_max=20"),
        ("FlowMatchEulerDiscreteScheduler", "arctan"),
    ],
)
def test_every_host_starts_from_the_same_noise(model, spacing):
    native = getattr(diffusers, model)()
    schedule = source_of(dict(native.config)).noise_schedule
    recipe = recipe_for(schedule, spacing)
    scheduler = FewStepScheduler.from_config(native.config, recipe=recipe)
    scheduler.set_timesteps(STEPS)
    size = recipe.init_noise_sigma(schedule)
    assert scheduler.init_noise_sigma == pytest.approx(size, rel=1e-6)
    assert size == pytest.approx(recipe.levels[0] if schedule.frame == "edm" else 1.0, rel=1e-12)


@pytest.mark.parametrize("spacing", ["trailing", "arctan:sigma_max=4"])
def test_class_labels_with_guidance(spacing):
    """DiT doubles its latents, guides half of the channels, and takes no noise but its own."""
    pipe = pipeline("dit")
    model = model_of(pipe, "dit")
    recipe, noise = recipe_for(model.noise_schedule, spacing), unit_noise(*model.shape)
    theirs = through(
        pipe,
        recipe,
        class_labels=[3, 4],
        guidance_scale=SCALE,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    one_result(recipe, model.denoiser([3, 4]), noise, theirs, SCALE)


def test_a_prompt_with_guidance(tmp_path):
    """Stable Diffusion: prompts through its text encoder."""
    tokenizer, encoder = text_encoder(tmp_path)
    pipe = pipeline("sd", tokenizer=tokenizer, text_encoder=encoder)
    model = model_of(pipe, "sd")
    recipe, noise = recipe_for(model.noise_schedule, "arctan:sigma_max=4"), unit_noise(*model.shape)
    theirs = through(
        pipe,
        recipe,
        prompt=list(PROMPTS[:SAMPLES]),
        guidance_scale=SCALE,
        latents=noise,
        height=IMAGE,
        width=IMAGE,
        output_type="latent",
    )
    one_result(recipe, model.denoiser(range(SAMPLES)), noise, theirs, SCALE)


def test_a_clipped_prediction():
    """DDPM in pixels: the network that a fit sees is clipped as its scheduler says."""
    pipe = pipeline("ddpm")
    assert pipe.scheduler.config.clip_sample
    model = model_of(pipe, "ddpm")
    recipe = recipe_for(model.noise_schedule, "arctan:sigma_max=4", guidance="")
    noise = unit_noise(*model.shape)
    theirs = through(
        pipe, recipe, batch_size=SAMPLES, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    one_result(recipe, model.denoiser(range(SAMPLES)), noise, theirs, None)


def test_a_flow_with_guidance():
    """Stable Diffusion 3: the recipe was fitted on a flow without the shift of the pipeline."""
    pipe = pipeline("sd3")
    assert pipe.scheduler.config.shift == 3.0
    given = {
        k: torch.cat([v.double()] * SAMPLES) for k, v in CASES["sd3"].arguments().items() if "embeds" in k
    }

    def network(prefix: str) -> Any:
        return lambda x, t: (
            pipe.transformer(
                hidden_states=x,
                timestep=1000.0 * t,
                encoder_hidden_states=given[f"{prefix}prompt_embeds"],
                pooled_projections=given[f"{prefix}pooled_prompt_embeds"],
            ).sample
        )

    noise = unit_noise(16, LATENT, LATENT)
    denoiser = fs.Denoiser(network(""), fs.schedules.Flow(), "flow", noise.shape[1:], network("negative_"))
    recipe = recipe_for(denoiser.noise_schedule, "arctan")
    assert recipe.levels[0] == 1.0
    theirs = through(
        pipe,
        recipe,
        **given,
        guidance_scale=SCALE,
        latents=noise,
        height=IMAGE,
        width=IMAGE,
        output_type="latent",
    )
    one_result(recipe, denoiser, noise, theirs, SCALE)
