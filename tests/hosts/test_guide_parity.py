"""A guided pipeline gives what fs.sample gives with the same network, noise included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from guided_pipelines import KINDS, close
from tiny_pipelines import CASES

import fewstep as fs

STEPS = 5
STABLE_DIFFUSION = (
    (fs.APG(3.0), "dpmpp_2m"),
    (fs.APG(3.0) + fs.CADS(0.5), "unipc"),
    (fs.CFG(3.0) + fs.AdaptiveGuidance(0.5, min_guided_steps=2), "heun"),
    (fs.PCG(3.0, steps=2), "ddim"),
    (fs.CFGPlusPlus(0.6), "ddim"),
    (fs.CFGPlusPlus(0.6), "dpmpp_2m"),
    (fs.CFG(3.0) + fs.SelfGuidedMinority(every=2), "ddim"),
    (fs.CFG(3.0) + fs.Extrapolate("h3/s3", protect_first=0, protect_last=0), "euler"),
    (fs.CFG(2.0) + fs.DPS(operator=lambda x: x[:, :1], measurement=torch.zeros(1, 1, 16, 16)), "ddim"),
    (
        fs.CFG(2.0)
        + fs.MMPS(2, noise=0.2, operator=lambda x: x[:, :1], measurement=torch.zeros(1, 1, 16, 16)),
        "deis",
    ),
)
FLUX = (
    (fs.APG(3.0) + fs.CADS(0.5), "euler"),
    (fs.CFGZeroStar(3.0, zero_steps=1), "dpmpp_2m"),
    (fs.PCG(3.0), "euler"),
    (fs.CFG(3.0) + fs.SelfGuidedMinority(every=2), "euler"),
)


def start(pipe: Any, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * pipe.scheduler.init_noise_sigma


def ids(uses: Any) -> list[str]:
    return [f"{guidance.spec}-{solver}" for guidance, solver in uses]


@pytest.mark.parametrize(("guidance", "solver"), STABLE_DIFFUSION, ids=ids(STABLE_DIFFUSION))
def test_stable_diffusion(guidance: Any, solver: str) -> None:
    kind = KINDS["sd"]
    pipe = kind.pipeline()
    pipe.scheduler = fs.FewStepScheduler.from_config(pipe.scheduler.config, solver=solver)
    given = CASES["sd"].arguments()
    latents = start(pipe, (1, 4, 16, 16))
    with fs.guide(pipe, guidance) as handle:
        guided = kind.call(pipe, STEPS, latents=latents)

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return pipe.unet(x, t, encoder_hidden_states=y).sample

    denoiser = fs.Denoiser(
        network,
        fs.schedules.from_diffusers(pipe.scheduler.config),
        "epsilon",
        unconditional=lambda x, t: network(x, t, given["negative_prompt_embeds"]),
        condition=given["prompt_embeds"],
    )
    assert close(guided, sampled(denoiser, latents, pipe, guidance, solver)) < 1e-3
    assert handle.nfe == denoiser.nfe


@pytest.mark.parametrize(("guidance", "solver"), FLUX, ids=ids(FLUX))
def test_flux(guidance: Any, solver: str) -> None:
    kind = KINDS["flux"]
    pipe = kind.pipeline()
    pipe.scheduler = fs.FewStepScheduler.from_config(pipe.scheduler.config, solver=solver)
    given = {**CASES["flux"].arguments(), **kind.changes()}
    latents = start(pipe, (1, 64, 16))
    inputs: dict[str, Any] = {}
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True
    )
    with fs.guide(pipe, guidance) as handle:
        guided = kind.call(pipe, STEPS, latents=latents)
    hook.remove()
    fixed = {k: inputs[k] for k in ("guidance", "txt_ids", "img_ids")}

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return pipe.transformer(
            hidden_states=x, timestep=t, encoder_hidden_states=y, pooled_projections=pooled, **fixed
        ).sample

    def conditional(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return network(x, t, y, given["pooled_prompt_embeds"])

    def unconditional(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(x, t, given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"])

    denoiser = fs.Denoiser(
        conditional,
        fs.schedules.from_diffusers(pipe.scheduler.config),
        "flow",
        unconditional=unconditional,
        condition=given["prompt_embeds"],
    )
    assert close(guided, sampled(denoiser, latents, pipe, guidance, solver)) < 1e-3
    assert handle.nfe == denoiser.nfe


def sampled(denoiser: Any, x: torch.Tensor, pipe: Any, guidance: Any, solver: str) -> torch.Tensor:
    """The run of the pipeline in our own loop, at the same levels."""
    stages = fs.solver(solver).evaluations_per_step
    levels = pipe.scheduler.sigmas[:-1][::stages].tolist()
    with torch.no_grad():
        return fs.sample(denoiser, x, solver, sigmas=[*levels, 0.0], guidance=guidance)
