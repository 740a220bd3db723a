"""Pipelines around a tiny U-Net."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from tiny_cases import IMAGE, LATENT, _pipeline, diffusers, randn


def _image() -> torch.Tensor:
    return randn(1, 3, IMAGE, IMAGE).clamp(-1, 1) * 0.5 + 0.5


def _vae(channels: int = 4) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=IMAGE,
        shift_factor=0.0,
        force_upcast=False,
    )


def _unet(**changes: Any) -> Any:
    settings = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": LATENT,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**{**settings, **changes})


_SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

_SD_OPTIONS = {
    "text_encoder": None,
    "tokenizer": None,
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def _sd(cls: str = "StableDiffusionPipeline", **unet: Any) -> Any:
    scheduler = diffusers.PNDMScheduler(
        **_SCALED, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    return getattr(diffusers, cls)(vae=_vae(), unet=_unet(**unet), scheduler=scheduler, **_SD_OPTIONS)


def _sd_v() -> Any:
    scheduler = diffusers.DDIMScheduler(
        **_SCALED, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )
    return diffusers.StableDiffusionPipeline(vae=_vae(), unet=_unet(), scheduler=scheduler, **_SD_OPTIONS)


def _controlnet() -> Any:
    """The components of Stable Diffusion and a ControlNet."""
    control = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    source = _pipeline("sd")
    components = dict(source.components, scheduler=type(source.native).from_config(source.native.config))
    return diffusers.StableDiffusionControlNetPipeline(
        **components, controlnet=control, requires_safety_checker=False
    )


def _sdxl() -> Any:
    scheduler = diffusers.EulerDiscreteScheduler(**_SCALED, timestep_spacing="leading", steps_offset=1)
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def _ddpm() -> Any:
    unet = diffusers.UNet2DModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=LATENT,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())


def _converted(name: str, cls: str) -> Callable[[], Any]:
    """The components of one pipeline in another class."""

    def build() -> Any:
        source, target = _pipeline(name), getattr(diffusers, cls)
        options = {"requires_safety_checker": False, "add_watermarker": False, **source.components}
        options["scheduler"] = type(source.native).from_config(source.native.config)
        taken = inspect.signature(target.__init__).parameters
        return target(**{k: v for k, v in options.items() if k in taken})

    return build
