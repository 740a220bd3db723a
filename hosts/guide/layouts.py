"""How pipelines of diffusers make their conditional and unconditional predictions: one entry a kind.

What an entry does not say is seen while the pipeline runs: a network called with twice as many rows as there are
latents holds both branches, one called with as many is called once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...guidance import CFG, Guidance, Renorm, Rescale
from ...guidance.run import CONDITIONAL, UNCONDITIONAL
from .arguments import Arguments, Rows

IMAGE = "image"
"""The branch of a three-way pipeline that is given neither text nor image."""
DENOISERS = ("unet", "transformer", "transformer_2", "transformer_3", "transformer_ode", "dit", "prior")
CONTROLS = ("controlnet",)
OWN_WEAK = ("skip_layers", "spatio_temporal_guidance_blocks", "isolate_modalities")
"""Arguments by which pipelines ask their network for weak branches of their own."""


@dataclass(frozen=True)
class Layout:
    """One kind of pipeline.

    ``order``: the branches in the rows of a batched call; of two calls the conditional comes first, unless contexts
    say otherwise. ``scale``: the argument of the pipeline for the scale, which is ``value + offset`` in our
    convention; guidance is on above ``threshold``, and needs one of the arguments ``negative`` where these are named.
    ``sign``: what the network's output is multiplied by for the prediction that the scheduler takes. ``lists``:
    arguments that are lists of one tensor a row; ``second``: tensors with the rows in their second dimension.
    ``condition``: arguments that hold the embedded condition; none
    where the network embeds labels itself. ``clock``: ``1 - t`` where the network is told how much signal there is.
    ``streams``: further states besides the first, each with its own output. ``flow``: levels of a diffusion model,
    sigma / alpha, whose network predicts the velocity of a flow. ``solved``: the conditional prediction is converted
    before the unconditional one is asked for, ``c + s (c - u)``. ``token_norm``: the pipeline rescales each token.
    ``doubled``: the scheduler steps both halves. ``channels``: their dimension, where latents are no tokens.
    """

    order: tuple[str, ...] = (UNCONDITIONAL, CONDITIONAL)
    scale: str = "guidance_scale"
    offset: float = 0.0
    threshold: float = 1.0
    negative: tuple[str, ...] = ()
    sign: float = 1.0
    lists: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    condition: tuple[str, ...] = ("encoder_hidden_states",)
    clock: str = "t"
    streams: tuple[str, ...] = ()
    flow: bool = False
    solved: bool = False
    token_norm: bool = False
    doubled: bool = False
    channels: int = 1

    def own_scale(self, arguments: Mapping[str, Any]) -> float:
        """The scale w that a call of the pipeline asks for, 1 where its guidance is off."""
        value = arguments.get(self.scale)
        if not isinstance(value, (int, float)) or value <= self.threshold:
            return 1.0
        if self.negative and all(arguments.get(name) is None for name in self.negative):
            return 1.0
        return float(value) + self.offset

    def own_guidance(self, arguments: Mapping[str, Any]) -> Guidance:
        """The pipeline's own guidance as methods of ours."""
        methods: list[Any] = [CFG(self.own_scale(arguments))]
        if self.token_norm:
            methods.append(Renorm(over="token"))
        if arguments.get("guidance_rescale"):
            methods.append(Rescale(float(arguments["guidance_rescale"])))
        return Guidance(tuple(methods))

    def rows(self, arguments: Arguments, rows: Rows, count: int) -> Arguments:
        """The arguments of a call of ``count`` rows, for some of them."""
        return arguments.rows(rows, count, self.lists, self.second)

    def remedy(self) -> str:
        """How to turn the pipeline's guidance on."""
        also = f" and {self.negative[0]}" if self.negative else ""
        return f"pass {self.scale} > {self.threshold:g}{also} to the pipeline (the value is not used)"


_NEGATIVE = ("negative_prompt", "negative_prompt_embeds")
_TRUE_CFG = Layout(scale="true_cfg_scale", negative=_NEGATIVE)
_REVERSED = (CONDITIONAL, UNCONDITIONAL)

LAYOUTS: dict[str, Layout] = {
    "": Layout(),
    "DiTPipeline": Layout(_REVERSED, condition=(), doubled=True),
    "Flux": _TRUE_CFG,
    "Flux2Klein": Layout(),
    "HunyuanVideo": _TRUE_CFG,
    "HunyuanSkyreels": _TRUE_CFG,
    "QwenImage": Layout(scale="true_cfg_scale", negative=_NEGATIVE, token_norm=True),
    "NucleusMoE": Layout(sign=-1.0, token_norm=True),
    "ZImage": Layout(
        _REVERSED,
        offset=1.0,
        sign=-1.0,
        lists=("x", "cap_feats"),
        condition=("cap_feats",),
        clock="1 - t",
    ),
    "Lumina2": Layout(sign=-1.0, clock="1 - t", token_norm=True),
    "HiDream": Layout(
        sign=-1.0, second=("encoder_hidden_states_llama3",), condition=("encoder_hidden_states_t5",)
    ),
    "StableDiffusionInstructPix2Pix": Layout((CONDITIONAL, UNCONDITIONAL, IMAGE)),
    "StableDiffusionXLInstructPix2Pix": Layout((CONDITIONAL, UNCONDITIONAL, IMAGE)),
    "CogVideoX": Layout(channels=2),
    "Cosmos2_5": Layout(offset=1.0),
    "Cosmos2": Layout(offset=1.0, flow=True, solved=True),
    "Krea2": Layout(offset=1.0, threshold=0.0),
    "LTX2": Layout(streams=("audio_hidden_states",)),
}
_UNSUPPORTED = {
    "OmniGen": "predicts three branches in one call of a language model, with caches of its own",
    "DreamLite": "predicts three branches",
    "LEdits": "predicts a branch for each edit",
    "SemanticStableDiffusion": "predicts a branch for each edit",
    "StableDiffusionPipelineSafe": "predicts a third branch for safety",
    "CosmosTextToWorld": "converts predictions with trial steps of its scheduler",
    "CosmosVideoToWorld": "converts predictions with trial steps of its scheduler",
    "SkyReelsV2DiffusionForcing": "has a time for each frame",
    "StableDiffusionAttendAndExcite": "calls its network for gradients too",
}


def layout_of(pipe: Any) -> Layout:
    """The layout of a pipeline: the entry with the longest name that its class's begins with.

    ValueError for pipelines whose guidance cannot be replaced, with the reason.
    """
    name = type(pipe).__name__
    for prefix, reason in _UNSUPPORTED.items():
        if name.startswith(prefix):
            raise ValueError(f"{name} cannot be guided from outside: it {reason}")
    if "PAG" in name:
        raise ValueError(
            f"{name} runs a perturbed branch of its own; load the plain pipeline and use fs.CFG(w) + fs.PAG()"
        )
    return LAYOUTS[max((p for p in LAYOUTS if name.startswith(p)), key=len)]


def enabled(pipe: Any) -> bool | None:
    """What a running pipeline says about its own guidance; None where it does not."""
    try:
        value = pipe.do_classifier_free_guidance
    except (AttributeError, TypeError):
        return None
    return None if isinstance(value, Callable) else bool(value)


def image_term(pipe: Any, u: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """The image's share of three-way guidance, ``(s - 1) (u - plain)`` with s the pipeline's image_guidance_scale."""
    return (float(pipe.image_guidance_scale) - 1.0) * (u - plain)
