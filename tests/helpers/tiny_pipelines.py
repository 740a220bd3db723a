"""Diffusers pipelines with tiny random weights, built offline: what a scheduler meets, in milliseconds.

``CASES`` are 33 ways to call 27 pipeline classes, those marked ``fast`` cover the kinds of use. A case builds a
pipeline (text encoders are None, embeddings are passed) and the arguments of a call; every one has the scheduler
that its family ships with. The weights are fixed by a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_cases import CASES, IMAGE, LATENT, Case, diffusers, randn
from tiny_transformers import (
    _cogvideox,
    _cosmos,
    _dit,
    _flux,
    _ltx,
    _pixart,
    _qwen,
    _sana,
    _sd3,
    _wan,
    _z_image,
)
from tiny_unets import (
    _SD_OPTIONS,
    _controlnet,
    _converted,
    _ddpm,
    _image,
    _sd,
    _sd_v,
    _sdxl,
    _unet,
    _vae,
)

__all__ = [
    "CASES",
    "IMAGE",
    "Case",
    "_SD_OPTIONS",
    "_image",
    "_prompt",
    "_text",
    "_unet",
    "_vae",
    "diffusers",
    "randn",
]


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


def _masked() -> dict[str, Any]:
    return {"prompt_attention_mask": torch.ones(1, 5), "negative_prompt_attention_mask": torch.ones(1, 5)}


def _prompt(**more: Any) -> Callable[[], dict[str, Any]]:
    embeds = {
        "prompt_embeds": lambda: randn(1, 5, 16),
        "negative_prompt_embeds": lambda: randn(1, 5, 16, seed=8),
    }
    return _text(**{**embeds, **more})


_BINNING = {"use_resolution_binning": False, "negative_prompt": None}

_VIDEO = {"height": 16, "width": 16}

_QWEN = {
    "prompt_embeds": lambda: randn(1, 5, 16),
    "prompt_embeds_mask": lambda: torch.ones(1, 5, dtype=torch.long),
    "true_cfg_scale": 1.0,
    "output_type": "latent",
}

_Z_IMAGE = {
    "prompt_embeds": lambda: [randn(5, 16)],
    "negative_prompt_embeds": lambda: [randn(5, 16, seed=8)],
}


def _plain(*parts: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {k: v() if callable(v) else v for part in parts for k, v in part.items()}


CASES.update(
    (case.name, case)
    for case in (
        Case("sd", _sd, _text(**_size()), fast=True),
        Case(
            "sd_img2img",
            _converted("sd", "StableDiffusionImg2ImgPipeline"),
            _text(**_FROM_IMAGE),
            fast=True,
            image_to_image=True,
        ),
        Case(
            "sd_inpaint",
            _converted("sd", "StableDiffusionInpaintPipeline"),
            _text(**_MASK, **_size()),
            fast=True,
        ),
        Case(
            "sd_inpaint_9",  # a network that is given the mask and the masked image
            lambda: _sd("StableDiffusionInpaintPipeline", in_channels=9),
            _text(**_MASK, **_size()),
        ),
        Case("sd_v", _sd_v, _text(**_size())),
        Case("controlnet", _controlnet, _text(image=_image), fast=True),
        Case(
            "controlnet_img2img",
            _converted("controlnet", "StableDiffusionControlNetImg2ImgPipeline"),
            _text(**_FROM_IMAGE, control_image=_image, guess_mode=True),
            image_to_image=True,
        ),
        Case(
            "controlnet_inpaint",
            _converted("controlnet", "StableDiffusionControlNetInpaintPipeline"),
            _text(**_MASK, control_image=_image),
        ),
        Case("sdxl", _sdxl, _text(**_POOLED, **_size()), fast=True),
        Case(
            "sdxl_img2img",
            _converted("sdxl", "StableDiffusionXLImg2ImgPipeline"),
            _text(**_POOLED, **_FROM_IMAGE),
            fast=True,
            image_to_image=True,
        ),
        Case(
            "sdxl_inpaint",
            _converted("sdxl", "StableDiffusionXLInpaintPipeline"),
            _text(**_POOLED, **_MASK, **_size()),
        ),
        Case(
            "sdxl_end",
            _converted("sdxl", "StableDiffusionXLPipeline"),
            _text(**_POOLED, **_size(), denoising_end=0.6),
        ),
        Case(
            "sdxl_start",
            _converted("sdxl", "StableDiffusionXLImg2ImgPipeline"),
            _text(**_POOLED, denoising_start=0.4, image=lambda: randn(1, 4, LATENT, LATENT)),
            image_to_image=True,
        ),
        Case("sd3", _sd3, _text(**_POOLED, **_size()), fast=True, flow=True),
        Case(
            "sd3_img2img",
            _converted("sd3", "StableDiffusion3Img2ImgPipeline"),
            _text(**_POOLED, **_FROM_IMAGE, **_size()),
            fast=True,
            flow=True,
            image_to_image=True,
        ),
        Case(
            "sd3_inpaint",
            _converted("sd3", "StableDiffusion3InpaintPipeline"),
            _text(**_POOLED, **_MASK, **_size()),
            flow=True,
        ),
        Case("flux", _flux, _flux_text(**_size()), fast=True, flow=True),
        Case(
            "flux_img2img",
            _converted("flux", "FluxImg2ImgPipeline"),
            _flux_text(**_FROM_IMAGE, **_size()),
            fast=True,
            flow=True,
            image_to_image=True,
        ),
        Case(
            "flux_inpaint",
            _converted("flux", "FluxInpaintPipeline"),
            _flux_text(**_MASK, **_size()),
            flow=True,
        ),
        Case("qwen", _qwen, _plain(_QWEN, _size()), flow=True),
        Case(
            "qwen_img2img",
            _converted("qwen", "QwenImageImg2ImgPipeline"),
            _plain(_QWEN, _FROM_IMAGE, _size()),
            flow=True,
            image_to_image=True,
        ),
        Case(
            "qwen_inpaint",
            _converted("qwen", "QwenImageInpaintPipeline"),
            _plain(_QWEN, _MASK, _size()),
            flow=True,
        ),
        Case("z_image", _z_image, _prompt(**_size(), **_Z_IMAGE), flow=True),
        Case(
            "z_image_img2img",
            _converted("z_image", "ZImageImg2ImgPipeline"),
            _prompt(**_FROM_IMAGE, **_size(), **_Z_IMAGE),
            flow=True,
            image_to_image=True,
        ),
        Case("pixart", _pixart, lambda: {**_prompt(**_size(), **_BINNING)(), **_masked()}, callbacks=False),
        Case(
            "dit",
            _dit,
            lambda: {"class_labels": [3], "guidance_scale": 2.0, "output_type": "np"},
            fast=True,
            callbacks=False,
        ),
        Case("ddpm", _ddpm, lambda: {"output_type": "np"}, fast=True, callbacks=False),
        Case(
            "sana",
            _sana,
            lambda: {**_prompt(**_size(), **_BINNING)(), **_masked(), "complex_human_instruction": None},
            flow=True,
        ),
        Case("wan", _wan, _prompt(**_VIDEO, num_frames=5), flow=True, output="frames"),
        Case(
            "wan_video2video",
            _converted("wan", "WanVideoToVideoPipeline"),
            _prompt(**_VIDEO, video=lambda: [_image()[0, :, :16, :16]] * 5, strength=0.6),
            flow=True,
            image_to_image=True,
            output="frames",
        ),
        Case(
            "ltx",
            _ltx,
            lambda: {**_prompt(**_size(), num_frames=9)(), **_masked()},
            flow=True,
            output="frames",
        ),
        Case("cogvideox", _cogvideox, _prompt(**_VIDEO, num_frames=8), output="frames"),
        Case("cosmos", _cosmos, _prompt(**_size()), flow=True),
    )
)
