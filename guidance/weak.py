"""Guidance by a weaker prediction under the same condition: another network, or the same one disturbed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from ..schedules.spec import Fraction, NonNegative, Range
from .method import Method, method
from .predictor import Network
from .run import Call, Run


class WeakBranch(Method):
    """What the methods have in common: a branch of their own, added as ``strength (c - weak)`` in a window of steps."""

    needs_steps = True
    weak: Network | None

    @property
    def strength(self) -> float:
        """What the difference is multiplied by."""
        raise NotImplementedError

    def active(self, step: int, steps: int) -> bool:
        """Whether the branch runs in a step."""
        return True

    def networks(self) -> Mapping[str, Any]:
        return {self.name: self.weak}

    def begin(self, run: Run) -> dict[str, bool]:
        return {}

    def plan(self, call: Call, state: dict[str, bool]) -> None:
        if self.strength and self.active(call.step, call.run.steps):
            call.branches[self.name] = None

    def add(
        self,
        g: torch.Tensor,
        c: torch.Tensor,
        predictions: Mapping[str, torch.Tensor],
        call: Call,
        state: dict[str, bool],
    ) -> torch.Tensor:
        weak = predictions.get(self.name)
        return g if weak is None else g + self.strength * (c - weak)


@method(
    "autoguidance",
    rank=70,
    reference="Guiding a Diffusion Model with a Bad Version of Itself, https://arxiv.org/abs/2406.02507",
)
@dataclass(frozen=True)
class AutoGuidance(WeakBranch):
    """Autoguidance, ``D + (w - 1) (D - D_0)`` with a worse network D_0 under the same condition, in any space.

    ``scale`` is w, 2 or so. ``weak`` is the worse network, ``weak(x, t)``: smaller, or less trained; or a branch
    ``autoguidance`` of the denoiser. It counts as an evaluation, however small it is. With CFG both differences are
    added: ``CFG(1 + (w - 1)(1 - a)) + AutoGuidance(1 + (w - 1) a)`` shares w between them.
    """

    scale: float = 2.0
    _: KW_ONLY
    weak: Network | None = None

    needs_steps = False

    @property
    def strength(self) -> float:
        return self.scale - 1.0


@dataclass(frozen=True)
class _Disturbed(WeakBranch):
    """The same network, disturbed, in the steps ``int(start N) <= i < int(stop N)``."""

    scale: float = 3.0
    _: KW_ONLY
    start: Fraction = 0.0
    stop: Fraction = 1.0
    layers: tuple[int, ...] = ()
    weak: Network | None = None

    @property
    def strength(self) -> float:
        return self.scale

    def active(self, step: int, steps: int) -> bool:
        return int(self.start * steps) <= step < int(self.stop * steps)


@method(
    "pag",
    rank=71,
    reference="Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance, https://arxiv.org/abs/2403.17377",
)
@dataclass(frozen=True)
class PAG(_Disturbed):
    """Perturbed-attention guidance, ``g + scale (c - c_weak)``: c_weak with identity as the map of self-attention.

    ``scale`` is 3 alone and 1.5 with CFG. The branch runs in steps i of N with ``int(start N) <= i < int(stop N)``.
    ``weak`` is the network with values in the place of attention's results, ``weak(x, t)``; a host that disturbs the
    network itself does so in ``layers`` (numbers of attention layers in the order of the network; the middle ones if
    empty).
    """


@method(
    "seg",
    rank=72,
    reference="Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention, "
    "https://arxiv.org/abs/2408.00760",
)
@dataclass(frozen=True)
class SEG(_Disturbed):
    """Smoothed energy guidance, ``g + scale (c - c_weak)``: c_weak with blurred queries in self-attention.

    ``blur`` is the deviation of the Gaussian, in tokens of the 2-d grid; infinite, every query is the mean
    (:func:`smooth_queries`). The branch runs in steps i of N with ``int(start N) <= i < int(stop N)``. ``weak`` is
    the disturbed network, ``weak(x, t)``; a host that disturbs the network itself does so in ``layers`` (the middle
    ones if empty).
    """

    blur: Annotated[float, Range(0.0, above=True)] = math.inf


@dataclass(frozen=True)
class _Window(_Disturbed):
    """As diffusers has it: both ends of the window are left out, so that the first step never runs the branch."""

    def active(self, step: int, steps: int) -> bool:
        return int(self.start * steps) < step < int(self.stop * steps)


@method("slg", rank=73, reference="Stable Diffusion 3.5, https://github.com/Stability-AI/sd3.5")
@dataclass(frozen=True)
class SLG(_Window):
    """Skip-layer guidance, ``g + scale (c - c_weak)``: c_weak without some blocks of the transformer.

    ``scale`` is 2.8 and ``layers`` 7, 8, 9 for SD 3.5 medium. The branch runs in steps i of N with ``int(start N) < i
    < int(stop N)``, both ends left out. ``weak`` is the network without the blocks, ``weak(x, t)``.
    """

    scale: float = 2.8
    _: KW_ONLY
    start: Fraction = 0.01
    stop: Fraction = 0.2
    layers: tuple[int, ...] = (7, 8, 9)


@method(
    "stg",
    rank=74,
    reference="Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling, https://arxiv.org/abs/2411.18664",
)
@dataclass(frozen=True)
class STG(_Disturbed):
    """Spatiotemporal skip guidance for video, ``g + scale (c - c_weak)``: c_weak with layers or attention skipped.

    ``scale`` is about 1. The branch runs in steps i of N with ``int(start N) <= i < int(stop N)``. ``weak`` is the
    network that skips, ``weak(x, t)``; a host that disturbs the network itself skips the blocks ``layers``.
    """

    scale: float = 1.0


def smooth_queries(queries: torch.Tensor, height: int, width: int, blur: NonNegative) -> torch.Tensor:
    """Queries (..., height * width, channels) under a Gaussian blur over the grid of tokens; the mean if infinite.

    The kernel reaches ``ceil(3 blur)`` tokens, at most to the border, which is reflected. ValueError where the tokens
    are not the grid's.
    """
    tokens, channels = queries.shape[-2:]
    if tokens != height * width:
        raise ValueError(f"{tokens} queries are not a grid of {height} x {width}")
    if math.isinf(blur):
        return queries.mean(dim=-2, keepdim=True).expand_as(queries)
    if blur == 0.0:
        return queries
    images = queries.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    for dim, size in ((2, height), (3, width)):
        reach = min(math.ceil(3.0 * blur), size - 1)
        at = torch.arange(-reach, reach + 1, dtype=torch.float32, device=queries.device)
        kernel = torch.exp(-0.5 * (at / blur) ** 2)
        kernel = (kernel / kernel.sum()).to(images.dtype).expand(channels, 1, 1, -1)
        padding = (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach)
        kernel = kernel if dim == 3 else kernel.transpose(2, 3)
        images = F.conv2d(F.pad(images, padding, mode="reflect"), kernel, groups=channels)
    return images.permute(0, 2, 3, 1).reshape(queries.shape)
