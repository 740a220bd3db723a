"""Where a covariance spectrum comes from: data, the teacher's samples, or the rule of natural images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

Kind = Literal["auto", "covariance", "fourier"]


def spectrum_of(samples: torch.Tensor, kind: Kind = "auto") -> np.ndarray:
    """Eigenvalues of the covariance of samples (B, ...), one an element of a sample, descending.

    ``covariance`` is what its name says; fewer samples than elements leave some of them zero. ``fourier`` needs
    (B, ..., H, W): the mean power of every spatial frequency, which is the spectrum if the statistics are the same all
    over the image, and is good from few samples. ``auto`` takes it for images with fewer than twice as many samples as
    elements.

    Samples are those that the network works on (latents, not pictures). Raises ValueError for fewer than two.
    """
    count = len(samples)
    if samples.ndim < 2 or count < 2:
        raise ValueError(f"a spectrum needs at least two samples (B, ...), got shape {tuple(samples.shape)}")
    x = samples.detach().double().cpu().numpy()
    size = x[0].size
    if kind == "auto":
        image = x.ndim >= 4 and min(x.shape[-2:]) > 1
        kind = "fourier" if image and count < 2 * size else "covariance"
    x = x - x.mean(0)
    if kind == "fourier":
        if x.ndim < 3:
            raise ValueError(f"a Fourier spectrum needs samples (B, ..., H, W), got shape {samples.shape}")
        pixels = x.shape[-1] * x.shape[-2]
        power = np.square(np.abs(np.fft.fft2(x))).sum(0) / (count - 1) / pixels
    elif kind == "covariance":
        power = np.zeros(size)
        values = np.linalg.svd(x.reshape(count, -1), compute_uv=False) ** 2 / (count - 1)
        power[: len(values)] = values[:size]
    else:
        raise ValueError(f"kind must be auto, covariance or fourier, got {kind!r}")
    return np.sort(power.ravel())[::-1].copy()


def power_law(shape: Sequence[int], exponent: float = 2.0, deviation: float = 0.5) -> np.ndarray:
    """The spectrum of natural images of a shape (..., H, W): power ``1 / f^exponent``, descending.

    f is the distance from the origin in cycles an image, the mean has the power of f = 1; scaled to a ``deviation`` per
    element. Exponent 2 is that of photographs; latents have flatter spectra (about 1) and a deviation near 1.

    Raises ValueError for a shape without two spatial dimensions and a deviation that is not positive.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"a power law needs a shape (..., H, W), got {tuple(shape)}")
    if not deviation > 0:
        raise ValueError(f"deviation must be positive, got {deviation:g}")
    height, width = shape[-2:]
    f = np.hypot(np.fft.fftfreq(height, 1.0 / height)[:, None], np.fft.fftfreq(width, 1.0 / width))
    power = np.broadcast_to(np.maximum(f, 1.0) ** -exponent, tuple(shape)).ravel()
    return np.sort(power * (deviation**2 / power.mean()))[::-1].copy()
