"""Two small networks on 8x8 images: a class-conditional noise predictor and a classifier that gives features.

Both are plain torch and small enough for a CPU. ``examples/train_digits.py`` trains them,
``fewstep.eval.digits`` loads them.

=================  ==========================================  ==================
network            map                                         parameters
=================  ==========================================  ==================
``DigitsUNet``     (B, 1, 8, 8), (B,), (B,) -> (B, 1, 8, 8)    241,153
``DigitsFeatures`` (B, 1, 8, 8) -> (B, 64) -> (B, 10)          72,842
=================  ==========================================  ==================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
NULL_CLASS = 10
"""The label that stands for "no label": what classifier-free guidance calls unconditional."""

BETA_START, BETA_END, TRAIN_STEPS = 1e-4, 0.02, 1000
"""The noise schedule the U-Net is trained with: variance preserving, betas linear in the index."""


def log_levels() -> Tensor:
    """log(sigma / alpha) at the training indices 0 .. 999 of the linear VP schedule, float64, shape (1000,)."""
    beta = torch.linspace(BETA_START, BETA_END, TRAIN_STEPS, dtype=torch.float64)
    alpha_squared = torch.cumprod(1.0 - beta, 0)
    return 0.5 * (torch.log1p(-alpha_squared) - torch.log(alpha_squared))


class Residual(nn.Module):
    """``skip(x) + conv(silu(norm(conv(silu(norm(x)))) * (1 + scale) + shift))``; scale and shift from the embedding."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, groups: int = 8) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.modulation = nn.Linear(c_emb, 2 * c_out)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)  # every block starts as the identity
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1.0 + scale)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Multi-head self-attention over the pixels, added to the input."""

    def __init__(self, channels: int, heads: int = 4, groups: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.GroupNorm(groups, channels), nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        q, k, v = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.out(mixed).transpose(1, 2).reshape(b, c, h, w)


class DigitsUNet(nn.Module):
    r"""Noise predictor ``eps(x, t, label)`` at two resolutions, 8x8 and 4x4, with attention at the lower one.

    With alpha, sigma the signal and noise at index t, and F the layers below,

        eps = sigma x + alpha F(x, log(sigma / alpha), label)

    so that F has targets of unit size at every t (F is the "v" of Salimans and Ho, "Progressive Distillation for
    Fast Sampling of Diffusion Models", https://arxiv.org/abs/2202.00512), while the output is epsilon. F sees the
    time through log(sigma / alpha) at a few low frequencies only: a smooth field, on which solvers show their order.

    Arguments of ``forward``: x (B, 1, 8, 8), images in [-1, 1] plus noise; t (B,), index 0 .. 999, fractions allowed
    (log(sigma / alpha) is linear in between); label (B,) int64, 0 .. 9 or ``NULL_CLASS``, or what the embedding
    ``label`` makes of it, (B, 64), for guidance that changes the condition. Returns (B, 1, 8, 8).
    """

    log_level: Tensor
    frequency: Tensor

    def __init__(self, channels: tuple[int, int] = (32, 64), c_emb: int = 64, n_frequencies: int = 8) -> None:
        super().__init__()
        c0, c1 = channels
        self.register_buffer("log_level", log_levels().float(), persistent=False)
        # radians per unit of log(sigma / alpha), which spans -4.6 .. 5.1
        frequency = torch.exp(torch.linspace(math.log(0.2), math.log(3.0), n_frequencies))
        self.register_buffer("frequency", frequency, persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * n_frequencies, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(CLASSES + 1, c_emb)
        self.stem = nn.Conv2d(1, c0, 3, padding=1)
        self.down1, self.down2 = Residual(c0, c0, c_emb), Residual(c0, c1, c_emb)
        self.pool = nn.Conv2d(c0, c0, 2, stride=2)
        self.mix, self.middle = Attention(c1), Residual(c1, c1, c_emb)
        self.grow = nn.ConvTranspose2d(c1, c0, 2, stride=2)
        self.up = Residual(2 * c0, c0, c_emb)
        self.norm, self.out = nn.GroupNorm(8, c0), nn.Conv2d(c0, 1, 3, padding=1)

    def level(self, t: Tensor) -> Tensor:
        """log(sigma / alpha) at fractional indices t (B,)."""
        last = len(self.log_level) - 1
        t = t.to(self.log_level.dtype).clamp(0, last)
        below = t.floor().clamp(max=last - 1).long()
        return torch.lerp(self.log_level[below], self.log_level[below + 1], t - below)

    def velocity(self, x: Tensor, log_level: Tensor, label: Tensor) -> Tensor:
        """F: ``alpha eps - sigma x0`` at noise level ``exp(log_level)`` (B,)."""
        angle = log_level[:, None] * self.frequency
        condition = label if label.is_floating_point() else self.label(label)
        emb = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], dim=1)) + condition)
        x = self.stem(x)
        high = self.down1(x, emb)
        low = self.down2(self.pool(high), emb)
        low = self.middle(self.mix(low), emb)
        x = self.up(torch.cat([self.grow(low), high], dim=1), emb)
        return self.out(F.silu(self.norm(x)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        log_level = self.level(t)
        # sigma^2 = sigmoid(2 log(sigma / alpha)) under alpha^2 + sigma^2 = 1
        sigma = torch.sigmoid(2 * log_level).sqrt()[:, None, None, None]
        alpha = torch.sigmoid(-2 * log_level).sqrt()[:, None, None, None]
        return sigma * x + alpha * self.velocity(x, log_level, label)


class DigitsFeatures(nn.Module):
    """Classifier of 8x8 digits; the 64 numbers before the logits are the feature space of the Frechet distance.

    Images are (B, 1, 8, 8) in [-1, 1] (values outside are accepted: samplers overshoot).
    """

    def __init__(self, channels: tuple[int, int, int] = (32, 64, 64), features: int = 64) -> None:
        super().__init__()
        c0, c1, c2 = channels
        self.body = nn.Sequential(
            nn.Conv2d(1, c0, 3, padding=1), nn.SiLU(),
            nn.Conv2d(c0, c1, 3, padding=1, stride=2), nn.SiLU(),
            nn.Conv2d(c1, c2, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(4 * c2, features), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(features, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 64)."""
        return self.body(images)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 10)."""
        return self.head(self.body(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)
