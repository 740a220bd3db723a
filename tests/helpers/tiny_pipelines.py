"""Diffusers pipelines with tiny random weights, built offline: what a scheduler meets, in milliseconds.

``CASES`` are 33 ways to call 27 pipeline classes, those marked ``fast`` cover the kinds of use. A case builds a
pipeline (text encoders are None, embeddings are passed) and the arguments of a call; every one has the scheduler
that its family ships with. The weights are fixed by a seed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

diffusers: Any = importlib.import_module(
    "diffusers"
)  # its classes are loaded lazily, which type checkers cannot see

IMAGE = 32
LATENT = 16


@dataclass(frozen=True)
class Case:
    """A pipeline and how to call it; ``callbacks``: whether it takes ``callback_on_step_end``."""

    name: str
    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    fast: bool = False
    flow: bool = False
    callbacks: bool = True
    image_to_image: bool = False
    output: str = "images"

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
            return torch.as_tensor(getattr(pipe(**arguments), self.output))


def randn(*shape: int, seed: int = 7) -> torch.Tensor:
    """Fixed normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


def _sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=16,
        pos_embed_max_size=LATENT,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(16),
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
    """The components of one pipeline in another class."""

    def build() -> Any:
        source, target = _pipeline(name), getattr(diffusers, cls)
        options = {"requires_safety_checker": False, "add_watermarker": False, **source.components}
        options["scheduler"] = type(source.native).from_config(source.native.config)
        taken = inspect.signature(target.__init__).parameters
        return target(**{k: v for k, v in options.items() if k in taken})

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


def _pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        vae=_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def _sana() -> Any:
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
        sample_size=LATENT,
    )
    block = ("ResBlock", "EfficientViTBlock")
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=block,
        decoder_block_types=block,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    )


def _qwen() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9, max_image_seq_len=8192
    )
    return diffusers.QwenImagePipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    )


def _z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        vae=_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None,
        tokenizer=None,
    )


def _wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    )


def _ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1, max_shift=2.05, base_shift=0.95
    )
    return diffusers.LTXPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    )


def _cogvideox() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=5,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return diffusers.CogVideoXPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    )


def _cosmos() -> Any:
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # the mask is resized with torchvision
        extra_pos_embed_type="learnable",
    )
    return diffusers.Cosmos2TextToImagePipeline(
        transformer=transformer,
        vae=_pipeline("wan").vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        text_encoder=None,
        tokenizer=None,
        safety_checker=Unguarded(),
    )


class Unguarded(torch.nn.Module):
    """Cosmos asks for a safety checker; latents are not shown to it."""

    device, dtype = torch.device("cpu"), torch.float32


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


CASES: dict[str, Case] = {
    case.name: case
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
}


@functools.cache
def _pipeline(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            pipe = CASES[name].build()
        except AttributeError as error:
            if "module diffusers has no attribute" not in str(error):
                raise
            pytest.skip(f"this version of diffusers has no {str(error).split()[-1]}")
    pipe.set_progress_bar_config(disable=True)
    pipe.native = pipe.scheduler
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe
