"""Control of the size of a guided prediction."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

import torch

from ..kernels import Rule, available, guided
from ..schedules import conversion
from ..schedules.spec import Fraction, Range
from .method import Method, method
from .run import Call
from .tensors import deviation, norm, ratio


@method(
    "rescale",
    rank=80,
    reference="Common Diffusion Noise Schedules and Sample Steps are Flawed, https://arxiv.org/abs/2305.08891",
)
@dataclass(frozen=True)
class Rescale(Method):
    """Guidance rescale, ``phi g std(c) / std(g) + (1 - phi) g``: the contrast of the conditional prediction.

    The standard deviation of each sample has n - 1 in its denominator. ``phi`` is 0.5 to 0.75 in practice; 0 changes
    nothing. ``space``: ``network`` is that of the network (diffusers); ``v`` is the velocity of the variance
    preserving state, as ComfyUI's node has it for every network (the same for v networks only); or another form of
    the prediction. A prediction of zeros stays zero.
    """

    phi: Fraction = 0.7
    _: KW_ONLY
    space: Literal["network", "denoised", "epsilon", "v", "flow"] = "network"

    def correct(
        self, g: torch.Tensor, c: torch.Tensor, u: torch.Tensor | None, call: Call, state: None
    ) -> torch.Tensor:
        g, c = call.to(g, self.space), call.to(c, self.space)
        factor = ratio(deviation(c), deviation(g))
        return call.back(g * (self.phi * factor + (1.0 - self.phi)), self.space)

    def fused(self, c: torch.Tensor, u: torch.Tensor, call: Call, state: None) -> torch.Tensor | None:
        space, w = call.space(self.space), call.scale
        t_x, t_m = conversion(call.run.prediction, space, call.node)
        b_x, b_m = conversion(space, call.run.prediction, call.node)
        inputs, p, q, base = [c, u], [t_m * w, t_m * (1.0 - w)], [t_m, 0.0], [0.0, 0.0]
        if t_x or b_x:
            inputs, p, q, base = [*inputs, call.x], [*p, t_x], [*q, t_x], [*base, b_x]
        if not available(inputs):
            return None
        return guided(inputs, p, q, base, Rule("rescaled", gain=b_m, phi=self.phi))[0]


@method("cfg_norm", rank=81, reference="ComfyUI, https://github.com/comfyanonymous/ComfyUI")
@dataclass(frozen=True)
class CFGNorm(Method):
    """Norm of the conditional prediction as a limit: ``strength g min(1, |c| / |g|)`` with norms over the channels.

    The norms are those at each position, over dimension 1, of the denoised predictions (``space``). ``strength``
    multiplies the result.
    """

    strength: Annotated[float, Range(0.0)] = 1.0
    _: KW_ONLY
    space: Literal["denoised", "network", "epsilon", "v", "flow"] = "denoised"

    needs_scale = True

    def correct(
        self, g: torch.Tensor, c: torch.Tensor, u: torch.Tensor | None, call: Call, state: None
    ) -> torch.Tensor:
        g, c = call.to(g, self.space), call.to(c, self.space)
        limit = (_along(c, 1) / (_along(g, 1) + 1e-8)).clamp(0.0, 1.0)
        return call.back(self.strength * g * limit, self.space)


@method("renorm", rank=82, reference="Diffusers, https://github.com/huggingface/diffusers")
@dataclass(frozen=True)
class Renorm(Method):
    """Norm of the conditional prediction, as pipelines of diffusers have it, in the space of the network.

    ``over=sample``: a limit of ``limit |c|`` on the norm of each sample (Z-Image's ``cfg_normalization``);
    ``over=token``: the norm of each vector along the last dimension becomes that of c (Qwen-Image; Lumina 2), and
    ``limit`` is not used. A prediction of zeros stays zero.
    """

    limit: Annotated[float, Range(0.0, above=True)] = 1.0
    _: KW_ONLY
    over: Literal["sample", "token"] = "sample"

    needs_scale = True

    def correct(
        self, g: torch.Tensor, c: torch.Tensor, u: torch.Tensor | None, call: Call, state: None
    ) -> torch.Tensor:
        if self.over == "token":
            return g * ratio(_along(c, -1), _along(g, -1))
        return g * ratio(self.limit * norm(c), norm(g)).clamp(max=1.0)


def _along(value: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.linalg.vector_norm(value, dim=dim, keepdim=True)
