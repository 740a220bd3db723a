"""Tiny pipelines with their guidance on, and what they have to be compared with.

``KINDS`` are the 13 kinds of pipeline that guidance has to know, ``FURTHER`` those that need something special.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_pipelines import _SD_OPTIONS as SD_OPTIONS
from tiny_pipelines import CASES, IMAGE, Case, diffusers, randn
from tiny_pipelines import _image as image
from tiny_pipelines import _prompt as prompt
from tiny_pipelines import _text as text
from tiny_pipelines import _unet as unet
from tiny_pipelines import _vae as vae

import fewstep as fs
from fewstep.guidance import Guidance

STEPS = 4


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@dataclass(frozen=True)
class Kind:
    """A case, arguments that turn its guidance on, and its own guidance as ours: scale w and further methods.

    ``batched``: both branches in one call. ``two``: arguments for two samples besides ``num_images_per_prompt``.
    """

    case: str
    changes: Callable[[], dict[str, Any]] = dict
    w: float = 3.0
    more: tuple[Any, ...] = ()
    batched: bool = True
    network: str = "transformer"
    two: dict[str, Any] = field(default_factory=lambda: {"num_images_per_prompt": 2})

    def pipeline(self) -> Any:
        """The pipeline with a fresh scheduler of its own."""
        case = CASES[self.case]
        pipe = case.pipeline()
        pipe.scheduler = case.native()
        return pipe

    def call(self, pipe: Any, steps: Any = STEPS, **changes: Any) -> torch.Tensor:
        """Run the pipeline from the same noise."""
        torch.manual_seed(0)
        return CASES[self.case].call(pipe, steps, **{**self.changes(), **changes})

    @property
    def own(self) -> Guidance:
        """The pipeline's own guidance."""
        return Guidance((fs.CFG(self.w), *self.more))


class Counter:
    """Rows and calls of a network, counted by a hook that knows nothing of guidance."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    @property
    def rows(self) -> int:
        """Evaluations of one sample."""
        return sum(self.calls)

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        value = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample", kwargs.get("x")))
        self.calls.append(len(value))


@contextmanager
def counted(*modules: Any) -> Iterator[Counter]:
    """Count what really runs."""
    counter = Counter()
    hooks = [m.register_forward_pre_hook(counter, with_kwargs=True) for m in modules]
    try:
        yield counter
    finally:
        for hook in hooks:
            hook.remove()


def with_image_prompt(kind: Kind) -> Any:
    """A Stable Diffusion pipeline whose network is given the embedding of an image too, with random weights."""
    source = kind.pipeline()
    network = unet()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    adapter, key = {}, 1
    for name in network.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        channels = network.get_submodule(name.removesuffix(".processor")).to_k.out_features
        adapter |= {f"{key}.to_{k}_ip.weight": normal(channels, 8) for k in "kv"}
        key += 2
    projection = {
        "proj.weight": normal(4 * 8, 8),
        "proj.bias": normal(4 * 8),
        "norm.weight": torch.ones(8),
        "norm.bias": torch.zeros(8),
    }
    network._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])
    network.eval().requires_grad_(False)
    pipe = type(source)(**{**source.components, "unet": network}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _negative(*names: str, **changes: Any) -> Callable[[], dict[str, Any]]:
    shapes = {
        "negative_prompt_embeds": (1, 5, 8),
        "negative_pooled_prompt_embeds": (1, 8),
    }
    return lambda: {**{n: randn(*shapes[n], seed=8 + i) for i, n in enumerate(names)}, **changes}


def _qwen_negative() -> dict[str, Any]:
    return {
        "true_cfg_scale": 3.0,
        "negative_prompt_embeds": randn(1, 5, 16, seed=8),
        "negative_prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long),
    }


# -- pipelines that schedulers need not know --------------------------------------------------------------------------


def _hunyuan_video() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    video_vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return diffusers.HunyuanVideoPipeline(
        transformer=transformer,
        vae=video_vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _hunyuan_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": randn(1, 5, 16),
        "pooled_prompt_embeds": randn(1, 8),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_embeds": randn(1, 5, 16, seed=8),
        "negative_pooled_prompt_embeds": randn(1, 8, seed=9),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "true_cfg_scale": 3.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "output_type": "latent",
    }


def _instruct() -> Any:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    return diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=vae(), unet=unet(in_channels=8), scheduler=scheduler, **SD_OPTIONS
    )


def _lumina() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        text_encoder=None,
        tokenizer=None,
    )


def _lumina_arguments() -> dict[str, Any]:
    masks = {name: mask[:1].long() for name, mask in _MASKS.items()}
    return {**prompt()(), **masks, "height": IMAGE, "width": IMAGE}


def _hidream() -> Any:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[16, 16],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    parts = {f"{name}{i}": None for name in ("text_encoder", "tokenizer") for i in ("", "_2", "_3", "_4")}
    return diffusers.HiDreamImagePipeline(
        transformer=transformer,
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    )


def _hidream_arguments() -> dict[str, Any]:
    embeds = {}
    for i, negative in enumerate(("", "negative_")):
        embeds[f"{negative}prompt_embeds_t5"] = randn(1, 5, 16, seed=20 + i)
        embeds[f"{negative}prompt_embeds_llama3"] = randn(2, 1, 5, 16, seed=30 + i)
        embeds[f"{negative}pooled_prompt_embeds"] = randn(1, 8, seed=40 + i)
    return {**embeds, "guidance_scale": 3.0, "height": IMAGE, "width": IMAGE, "output_type": "latent"}


def _ltx2() -> Any:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    video_vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return diffusers.LTX2Pipeline(
        transformer=transformer,
        connectors=connectors,
        vae=video_vae,
        audio_vae=audio_vae,
        vocoder=vocoder,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def _ltx2_arguments() -> dict[str, Any]:
    return {
        **prompt()(),
        "prompt_attention_mask": torch.ones(1, 5),
        "negative_prompt_attention_mask": torch.ones(1, 5),
        "audio_guidance_scale": 3.0,
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "audio_guidance_rescale": 0.0,
        "spatio_temporal_guidance_blocks": [0],
        "height": IMAGE,
        "width": IMAGE,
        "num_frames": 5,
        "frame_rate": 25.0,
    }


CASES.update(
    {
        case.name: case
        for case in (
            Case("hunyuan_video", _hunyuan_video, _hunyuan_arguments, flow=True, output="frames"),
            Case("instruct", _instruct, text(image=image, image_guidance_scale=1.5)),
            Case("lumina", _lumina, _lumina_arguments, flow=True),
            Case("hidream", _hidream, _hidream_arguments, flow=True),
            Case("ltx2", _ltx2, _ltx2_arguments, flow=True, output="frames"),
        )
    }
)


def _twice(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """Embeddings of two samples, of the shapes of one."""
    return {name: randn(2, *shape, seed=50 + i) for i, (name, shape) in enumerate(shapes.items())}


_TWO_TEXTS = _twice(prompt_embeds=(5, 16), negative_prompt_embeds=(5, 16))
_MASKS = {name: torch.ones(2, 5) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
_WHOLE = {name: mask.long() for name, mask in _MASKS.items()}
_TWO_POOLED = _twice(
    prompt_embeds=(5, 8),
    negative_prompt_embeds=(5, 8),
    pooled_prompt_embeds=(8,),
    negative_pooled_prompt_embeds=(8,),
)
_TOKENS = (fs.Renorm(over="token"),)
_TWO_VIDEOS = {"num_videos_per_prompt": 2}
KINDS: dict[str, Kind] = {
    "sd": Kind("sd", network="unet"),
    "sdxl": Kind("sdxl", network="unet"),
    "sd3": Kind("sd3", two=_TWO_POOLED),
    "flux": Kind(
        "flux",
        _negative("negative_prompt_embeds", "negative_pooled_prompt_embeds", true_cfg_scale=3.0),
        batched=False,
    ),
    "pixart": Kind("pixart"),
    "dit": Kind("dit", w=2.0, two={"class_labels": [3, 4]}),
    "wan": Kind("wan", batched=False, two=_TWO_VIDEOS),
    "qwen": Kind("qwen", _qwen_negative, more=_TOKENS, batched=False),
    "cogvideox": Kind("cogvideox", two=_TWO_TEXTS),
    "sana": Kind("sana"),
    "ltx": Kind("ltx", two=_TWO_TEXTS | _MASKS),
    "z_image": Kind("z_image", w=4.0),
    "hunyuan_video": Kind("hunyuan_video", batched=False, two=_TWO_VIDEOS),
}
FURTHER: dict[str, Kind] = {
    "controlnet": Kind("controlnet", network="unet"),
    "img2img": Kind("sd_img2img", network="unet"),
    "inpaint_9": Kind("sd_inpaint_9", network="unet"),
    "sd3_img2img": Kind("sd3_img2img", two=_TWO_POOLED),
    "instruct": Kind("instruct", network="unet"),
    "lumina": Kind("lumina", more=_TOKENS, batched=False, two=_TWO_TEXTS | _WHOLE),
    "hidream": Kind("hidream"),
    "ltx2": Kind("ltx2", two=_TWO_TEXTS | _MASKS),
    "cosmos": Kind("cosmos", w=4.0, batched=False),
}
ALL = KINDS | FURTHER
