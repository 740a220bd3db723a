"""Diffusers pipelines with tiny random weights, built offline: what a scheduler meets in the wild, in milliseconds.

``CASES`` names them. A case builds a pipeline (text encoders are None, embeddings are passed) and the arguments of a
call; every one has the scheduler that its family ships with. The weights are fixed by a seed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

diffusers: Any = importlib.import_module(
    "diffusers"
)  # its classes are loaded lazily, which type checkers cannot see

IMAGE = 32
LATENT = 16


@dataclass(frozen=True)
class Case:
    """A pipeline and how to call it; ``latents`` is the shape that ``callback`` and ``output_type="latent"`` show."""

    name: str
    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    latents: tuple[int, ...] | None
    flow: bool = False
    image_to_image: bool = False

    def pipeline(self) -> Any:
        """The pipeline; built once, so assign a scheduler before each use. Its native scheduler is ``pipe.native``."""
        return _pipeline(self.name)

    def native(self) -> Any:
        """A fresh scheduler of the class and config that the family ships with."""
        pipe = self.pipeline()
        return type(pipe.native).from_config(pipe.native.config)

    def call(self, pipe: Any, steps: int | None = 2, seed: int = 0, **changes: Any) -> torch.Tensor:
        """Run the pipeline from a seed; returns latents, or the image where the family has none."""
        arguments = {**self.arguments(), "generator": torch.Generator().manual_seed(seed), **changes}
        if steps is not None:
            arguments["num_inference_steps"] = steps
        with torch.no_grad():
            return torch.as_tensor(pipe(**arguments).images)


def randn(*shape: int, seed: int = 7) -> torch.Tensor:
    """Fixed normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _image() -> torch.Tensor:
    return randn(1, 3, IMAGE, IMAGE).clamp(-1, 1) * 0.5 + 0.5


def _vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
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


def _sd() -> Any:
    scheduler = diffusers.PNDMScheduler(
        **_SCALED, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
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


def _sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=LATENT,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=LATENT // 2,
        num_embeds_ada_norm=1000,  # DiTPipeline's class without condition
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(
        transformer=transformer, vae=_vae(), scheduler=scheduler, id2label={i: str(i) for i in range(10)}
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
    """The same components in another pipeline class."""

    def build() -> Any:
        source = _pipeline(name)
        components = dict(source.components, scheduler=type(source.native).from_config(source.native.config))
        if "StableDiffusionXL" in cls:
            return getattr(diffusers, cls)(**components, add_watermarker=False)
        return getattr(diffusers, cls)(
            **components, **({"requires_safety_checker": False} if name == "sd" else {})
        )

    return build


def _text(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "prompt_embeds": randn(1, 5, 8),
        "negative_prompt_embeds": randn(1, 5, 8, seed=8),
        "guidance_scale": 3.0,
        "output_type": "latent",
        **{k: v() if callable(v) else v for k, v in more.items()},
    }


def _size() -> dict[str, Any]:
    return {"height": IMAGE, "width": IMAGE}


_POOLED = {
    "pooled_prompt_embeds": lambda: randn(1, 8),
    "negative_pooled_prompt_embeds": lambda: randn(1, 8, seed=9),
}
_FROM_IMAGE = {"image": _image, "strength": 0.6}


def _flux_text(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "prompt_embeds": randn(1, 5, 8),
        "pooled_prompt_embeds": randn(1, 8),
        "guidance_scale": 3.0,
        "output_type": "latent",
        **{k: v() if callable(v) else v for k, v in more.items()},
    }


_MASK = {
    "mask_image": lambda: (randn(1, 1, IMAGE, IMAGE, seed=3) > 0).float(),
    "image": _image,
    "strength": 1.0,
}
_SHAPE = (1, 4, LATENT, LATENT)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("sd", _sd, _text(**_size()), _SHAPE),
        Case(
            "sd_img2img",
            _converted("sd", "StableDiffusionImg2ImgPipeline"),
            _text(**_FROM_IMAGE),
            _SHAPE,
            image_to_image=True,
        ),
        Case(
            "sd_inpaint",
            _converted("sd", "StableDiffusionInpaintPipeline"),
            _text(**_MASK, **_size()),
            _SHAPE,
        ),
        Case("sdxl", _sdxl, _text(**_POOLED, **_size()), _SHAPE),
        Case(
            "sdxl_img2img",
            _converted("sdxl", "StableDiffusionXLImg2ImgPipeline"),
            _text(**_POOLED, **_FROM_IMAGE),
            _SHAPE,
            image_to_image=True,
        ),
        Case("sd3", _sd3, _text(**_POOLED, **_size()), _SHAPE, flow=True),
        Case(
            "sd3_img2img",
            _converted("sd3", "StableDiffusion3Img2ImgPipeline"),
            _text(**_POOLED, **_FROM_IMAGE, **_size()),
            _SHAPE,
            flow=True,
            image_to_image=True,
        ),
        Case("flux", _flux, _flux_text(**_size()), (1, 64, 16), flow=True),
        Case(
            "flux_img2img",
            _converted("flux", "FluxImg2ImgPipeline"),
            _flux_text(**_FROM_IMAGE, **_size()),
            (1, 64, 16),
            flow=True,
            image_to_image=True,
        ),
        Case("dit", _dit, lambda: {"class_labels": [3], "guidance_scale": 2.0, "output_type": "np"}, None),
        Case("ddpm", _ddpm, lambda: {"output_type": "np"}, None),
    )
}


@functools.cache
def _pipeline(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = CASES[name].build()
    pipe.set_progress_bar_config(disable=True)
    pipe.native = pipe.scheduler
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe
