"""Guidance away from a negative prompt, and rules for the direction and length of the difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch

from ..schedules.spec import NonNegative
from .method import Method, method
from .predictor import Network
from .run import Call, Run
from .tensors import inner, norm, ratio

Space = Literal["denoised", "network", "epsilon", "v", "flow"]


@method(
    "perp_neg",
    rank=60,
    reference="Re-imagine the Negative Prompt Algorithm: Transform 2D Diffusion into 3D, alleviate Janus problem and "
    "Beyond, https://arxiv.org/abs/2304.04968",
)
@dataclass(frozen=True)
class PerpNeg(Method):
    """Perpendicular negative prompt: only the part of it that does not oppose the positive one is used.

    With c, u and n the predictions for the prompt, for no prompt and for the negative one, ``P = c - u``, ``N = n -
    u``: ``u + w (P - strength (N - <N, P> / |P|^2 P))``. Three evaluations a step. ``scale`` is w; left out, another
    method gives it. ``strength`` weighs the negative prompt. ``stats=sample`` takes scalar products of each sample,
    ``batch`` of the whole batch (ComfyUI). ``space`` is where they are taken.

    ``negative`` is the network with the negative prompt, ``negative(x, t)``, or a branch ``perp_neg`` of the denoiser;
    the unconditional network must be that without any prompt.
    """

    scale: float | None = None
    _: KW_ONLY
    strength: NonNegative = 1.0
    stats: Literal["sample", "batch"] = "sample"
    space: Space = "denoised"
    negative: Network | None = None

    needs_scale = True

    @property
    def weight(self) -> float | None:
        return self.scale

    def networks(self) -> Mapping[str, Any]:
        return {self.name: self.negative}

    def begin(self, run: Run) -> dict[str, torch.Tensor]:
        return {}

    def plan(self, call: Call, state: dict[str, torch.Tensor]) -> None:
        if call.guided:
            call.branches[self.name] = call.rows

    def branches(
        self, predictions: dict[str, torch.Tensor], call: Call, state: dict[str, torch.Tensor]
    ) -> None:
        if call.guided:
            state["negative"] = predictions[self.name]

    def combine(
        self, c: torch.Tensor, u: torch.Tensor, d: torch.Tensor, call: Call, state: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        n = state.pop("negative")
        if call.rows is not None:
            n = c.index_put((call.rows,), n)
        factor = call.factor(self.space)
        positive, other = factor * d, factor * (n - u)
        products = inner(other, positive), inner(positive, positive)
        if self.stats == "batch":
            products = products[0].sum(), products[1].sum()
        across = other - ratio(*products, 0.0) * positive
        return u + (call.scale / factor) * (positive - self.strength * across)


@method("mahiro", rank=83, reference="ComfyUI, https://github.com/comfyanonymous/ComfyUI")
@dataclass(frozen=True)
class MaHiRo(Method):
    """MaHiRo: less of the guided and more of the scaled conditional prediction where the two point away from u.

    With ``leap = w c``, ``m = (leap + g) / 2``, ``q(z) = sign(z) sqrt|z|`` and ``k = 2 (cos + 1)``, cos the mean over
    all positions of the cosine along dimension 1 between q(w u) and q(m): ``(k g + (4 - k) leap) / 4``.

    ``stats``: that mean for each ``sample``, or over the ``batch`` (ComfyUI). ``space`` is where it is computed.
    """

    stats: Literal["sample", "batch"] = "sample"
    _: KW_ONLY
    space: Space = "denoised"

    needs_scale = True

    def correct(
        self, g: torch.Tensor, c: torch.Tensor, u: torch.Tensor | None, call: Call, state: None
    ) -> torch.Tensor:
        assert u is not None
        g, leap, u = call.to(g, self.space), call.scale * call.to(c, self.space), call.to(u, self.space)
        cosine = torch.cosine_similarity(_root(call.scale * u), _root((leap + g) / 2.0), dim=1)
        mean = cosine.mean() if self.stats == "batch" else cosine.reshape(len(g), -1).mean(1)
        k = 2.0 * (mean.reshape(-1, *(1 for _ in g.shape[1:])) + 1.0)
        return call.back((k * g + (4.0 - k) * leap) / 4.0, self.space)


@method("mambo", rank=62, reference="Diffusers, https://github.com/huggingface/diffusers")
@dataclass(frozen=True)
class MAMBO(Method):
    """MAMBO-G: a scale that falls with the size of the difference, ``1 + (w - 1) exp(-alpha |c - u| / |u|)``.

    Norms of each sample. ``scale`` is w (10 in diffusers); left out, another method gives it. ``alpha`` is the rate.
    ``space``: that of the network.
    """

    scale: float | None = None
    _: KW_ONLY
    alpha: NonNegative = 8.0
    space: Literal["network", "denoised", "epsilon", "v", "flow"] = "network"

    needs_scale = True

    @property
    def weight(self) -> float | None:
        return self.scale

    def combine(
        self, c: torch.Tensor, u: torch.Tensor, d: torch.Tensor, call: Call, state: None
    ) -> torch.Tensor:
        size = abs(call.factor(self.space)) * norm(d) / (norm(call.to(u, self.space)) + 1e-8)
        return c + (call.scale - 1.0) * torch.exp(-self.alpha * size) * d


def _root(value: torch.Tensor) -> torch.Tensor:
    return value.sign() * value.abs().sqrt()
