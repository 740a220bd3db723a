"""Frequency-decoupled guidance."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from .method import Method, method
from .run import Call, Run
from .tensors import inner, ratio

if TYPE_CHECKING:
    from .composition import Guidance


@method(
    "fdg",
    rank=61,
    reference="Guidance in the Frequency Domain Enables High-Fidelity Sampling at Low CFG Scales, "
    "https://arxiv.org/abs/2506.19713",
)
@dataclass(frozen=True)
class FDG(Method):
    """Frequency-decoupled guidance: a scale for each level of a Laplacian pyramid, ``u_l + w_l (c_l - u_l)``.

    Level l is ``G_l - up(G_{l+1})``, the last one G itself, with ``G_{l+1} = down(G_l)``; down blurs by (1 4 6 4 1) /
    16 and averages 2 x 2, up is bilinear and blurs. ``scales`` are from fine to coarse, two or more: 10 and 5 for
    SDXL; half the usual w for the coarse one. ``parallel`` (a number for each level, or none) is the share that is
    kept of the part of ``c_l - u_l`` along c_l. ``space``: equal scales without ``parallel`` are CFG in any.

    For latents of shape (B, C, H, W) and (B, C, T, H, W), padded to a multiple of 2^(L-1) by reflection and cut back.
    ValueError for others, before the network runs.
    """

    scales: tuple[float, ...] = (10.0, 5.0)
    _: KW_ONLY
    parallel: tuple[float, ...] = ()
    space: Literal["network", "denoised", "epsilon", "v", "flow"] = "network"

    needs_scale = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.scales) < 2 or min(self.scales) < 0:
            raise ValueError(
                f"option 'scales' of guidance 'fdg' must be two or more numbers >= 0, got {self.scales}"
            )
        if self.parallel and len(self.parallel) != len(self.scales):
            raise ValueError(
                f"option 'parallel' of guidance 'fdg' must have one number for each of {len(self.scales)} scales, "
                f"got {self.parallel}"
            )

    @property
    def guides(self) -> bool:
        return True

    def check(self, run: Run, guidance: Guidance) -> None:
        if guidance.weight != 1.0:
            raise ValueError(
                f"guidance 'fdg' has scales of its own, {guidance.weight:g} is one more; leave the other out"
            )

    def plan(self, call: Call, state: None) -> None:
        smallest = 3 * 2 ** (len(self.scales) - 1)
        if call.x.ndim not in (4, 5) or min(call.x.shape[-2:]) < smallest:
            raise ValueError(
                f"guidance 'fdg' with {len(self.scales)} levels is for latents (B, C, H, W) or (B, C, T, H, W) of at "
                f"least {smallest} x {smallest}, got {tuple(call.x.shape)}"
            )

    def combine(
        self, c: torch.Tensor, u: torch.Tensor, d: torch.Tensor, call: Call, state: None
    ) -> torch.Tensor:
        shape, levels = c.shape, len(self.scales)
        c, d = call.to(c, self.space), call.factor(self.space) * d
        base, shift = (pyramid(_images(value, levels), levels) for value in (c, d))
        result: torch.Tensor | None = None
        for i in reversed(range(levels)):
            moved = shift[i]
            if self.parallel:
                frames = len(moved) // shape[0]
                a, b = (v.reshape(shape[0], frames, -1) for v in (moved, base[i]))
                along = (ratio(inner(a, b), inner(b, b), 0.0) * b).reshape(moved.shape)
                moved = moved - (1.0 - self.parallel[i]) * along
            level = base[i] - shift[i] + self.scales[i] * moved
            result = level if result is None else up(result) + level
        assert result is not None
        result = result[..., : shape[-2], : shape[-1]]
        if len(shape) == 5:
            result = result.unflatten(0, (shape[0], shape[2])).movedim(2, 1)
        return call.back(result.reshape(shape), self.space)


def pyramid(images: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """The Laplacian pyramid of (B, C, H, W), fine to coarse; H and W are multiples of 2^(levels - 1)."""
    result = []
    for _ in range(levels - 1):
        coarse = F.avg_pool2d(_blur(images), 2)
        result.append(images - up(coarse))
        images = coarse
    return [*result, images]


def up(images: torch.Tensor) -> torch.Tensor:
    """Twice the size."""
    return _blur(F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False))


def _blur(images: torch.Tensor) -> torch.Tensor:
    channels = images.shape[1]
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=images.dtype, device=images.device) / 16.0
    kernel = row.expand(channels, 1, 1, 5)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)


def _images(value: torch.Tensor, levels: int) -> torch.Tensor:
    """Frames of a video as images; sides padded to what the pyramid can halve."""
    if value.ndim == 5:
        value = value.movedim(2, 1).flatten(0, 1)
    unit = 2 ** (levels - 1)
    height, width = ((-n) % unit for n in value.shape[-2:])
    return F.pad(value, (0, width, 0, height), mode="reflect") if height or width else value
