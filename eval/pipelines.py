"""A diffusers pipeline, from a folder or the Hub, as a model: its network, noise schedule and condition.

Pipelines without condition (DDPM), with class labels (DiT) and with a text prompt for a U-Net (Stable Diffusion) are
known; any other model is reached as ``module:callable``, a few lines around its network. Samples are latents where the
pipeline has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..guidance import Denoiser
from ..schedules import Node
from ..schedules.diffusers_config import Source, source_of
from .eval_model import EvalModel

PROMPTS = (
    "a photo of a red fox in the snow",
    "a bowl of fruit on a wooden table",
    "a narrow street in an old town at night",
    "a portrait of an old man with a beard",
    "a lighthouse on a cliff, oil painting",
    "a cup of coffee beside an open book",
    "mountains reflected in a lake at dawn",
    "a blue bicycle against a brick wall",
)
"""Sample i is of prompt i mod 8."""

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Clip = Callable[[torch.Tensor], torch.Tensor]
Pair = tuple[Network, Network | None]
"""A network with its condition, and the one without for guidance."""


def load_model(name: str) -> EvalModel:
    """The pipeline in a folder or on the Hub.

    Raises ValueError where it cannot be loaded, saying why, and for a kind of pipeline that is not known.
    """
    try:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    except ImportError:
        raise ValueError(f"{name!r}: a pipeline needs diffusers; pip install 'fewstep[diffusers]'") from None
    try:
        pipe = DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no model {name!r}: a model is builtin:NAME, module:callable, or a diffusers folder or Hub id, and as the "
            f"last it cannot be loaded: {reason}"
        ) from None
    return model_of(pipe, name)


def model_of(pipe: Any, name: str) -> EvalModel:
    """A pipeline that is loaded."""
    from ..hosts.diffusers_scheduler import FewStepScheduler
    from ..hosts.diffusers_step import clipped

    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    kind = type(pipe).__name__
    if kind not in _CONDITIONS or network is None:
        raise ValueError(
            f"{name!r} is a {kind}, which is not known; allowed: {', '.join(_CONDITIONS)}. For another give "
            "module:callable returning a fewstep.Denoiser around its network"
        )
    network.eval().requires_grad_(False)
    config = dict(
        FewStepScheduler.from_config(pipe.scheduler.config).config
    )  # of any class, with its defaults
    source, clips = source_of(config), config["clip_sample"] or config["thresholding"]
    pair, guided = _CONDITIONS[kind](pipe, network)
    if clips and guided:
        raise ValueError(
            f"{name!r} clips its predictions, known without guidance only; set clip_sample and thresholding to "
            "false in its scheduler's config"
        )
    size = network.config["sample_size"]
    side = (size, size) if isinstance(size, int) else tuple(size)
    shape = (int(network.config["in_channels"]), *side)

    def bind(indices: Sequence[int], device: torch.device) -> Denoiser:
        network.to(device)
        conditional, unconditional = pair(list(indices), device)
        if clips:
            return _Clipped(conditional, source, shape, lambda x_0: clipped(x_0, config))
        return Denoiser(conditional, source.noise_schedule, source.prediction, shape, unconditional)

    return EvalModel(
        name=name,
        noise_schedule=source.noise_schedule,
        shape=shape,
        bind=bind,
        description=f"{kind} {Path(name).name}.",
        licence="that of the pipeline",
        fingerprint=fingerprint(network),
        guided=guided,
        dtype=network.dtype,
    )


class _Clipped(Denoiser):
    """A network whose prediction of x_0 is clipped as its scheduler says."""

    def __init__(self, fn: Network, source: Source, shape: Sequence[int], clip: Clip) -> None:
        super().__init__(fn, source.noise_schedule, "denoised", shape)
        self.source, self.clip = source, clip

    def run(self, network: Network, x: torch.Tensor, node: Node, condition: Any = None) -> torch.Tensor:
        c_x, c_m = self.source.denoised(node)
        return self.clip(c_x * x + c_m * super().run(network, x, node, condition))


def fingerprint(network: torch.nn.Module) -> str:
    """Of the weights: of names, shapes, and sixteen numbers of each, so that large models need no second reading."""
    found = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        flat = value.detach().flatten()
        some = flat[torch.linspace(0, len(flat) - 1, min(16, len(flat))).long()].double().cpu()
        found.update(f"{key} {tuple(value.shape)} {some.tolist()}".encode())
    return found.hexdigest()[:16]


def _unconditional(pipe: Any, network: Any) -> tuple[Callable[..., Pair], bool]:
    def pair(indices: list[int], device: torch.device) -> Pair:
        return lambda x, t: network(x, t).sample, None

    return pair, False


def _classes(pipe: Any, network: Any) -> tuple[Callable[..., Pair], bool]:
    """Sample i is of class i mod their number; the last embedding means none."""
    count = int(network.config["num_embeds_ada_norm"])

    def run(label: torch.Tensor) -> Network:
        # Half of the channels are a learned variance.
        return lambda x, t: network(x, timestep=t, class_labels=label).sample[:, : x.shape[1]]

    def pair(indices: list[int], device: torch.device) -> Pair:
        labels = torch.tensor(indices, device=device) % count
        return run(labels), run(torch.full_like(labels, count))

    return pair, True


def _text(pipe: Any, network: Any) -> tuple[Callable[..., Pair], bool]:
    encoded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def embedding(which: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if which not in encoded:
            pipe.text_encoder.to(device)
            with torch.no_grad():
                with_prompt, without = pipe.encode_prompt(PROMPTS[which], device, 1, True)
            encoded[which] = with_prompt, without
        return encoded[which]

    def run(hidden: torch.Tensor) -> Network:
        return lambda x, t: network(x, t, encoder_hidden_states=hidden).sample

    def pair(indices: list[int], device: torch.device) -> Pair:
        both = [embedding(i % len(PROMPTS), device) for i in indices]
        conditional, unconditional = (torch.cat(part).to(device) for part in zip(*both))
        return run(conditional), run(unconditional)

    return pair, True


_CONDITIONS: dict[str, Callable[[Any, Any], tuple[Callable[..., Pair], bool]]] = {
    "DDPMPipeline": _unconditional,
    "DDIMPipeline": _unconditional,
    "DiTPipeline": _classes,
    "StableDiffusionPipeline": _text,
}
