"""Where a covariance spectrum comes from: data, the teacher's samples, or the rule of natural images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

Kind = Literal["auto", "covariance", "fourier"]


def spectrum_of(samples: torch.Tensor, kind: Kind = "auto") -> np.ndarray:
    """Eigenvalues of the covariance of samples (B, ...), one an element of a sample, descending.

    ``covariance`` is that of the samples, its eigenvalues drawn towards their mean as far as the samples are too few
    to tell them apart (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices"); of
    a few samples the smallest are far too small otherwise. ``fourier`` needs
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
        power = _shrunk(x.reshape(count, -1))
    else:
        raise ValueError(f"kind must be auto, covariance or fourier, got {kind!r}")
    return np.sort(power.ravel())[::-1].copy()


def _shrunk(x: np.ndarray) -> np.ndarray:
    """Eigenvalues of ``(1 - r) S + r m I``: S the covariance of centred rows (B, D), m the mean of its diagonal.

    ``r = mean |x x^T - S|^2 / (B |S - m I|^2)``, at most 1, is the share of what is seen that is chance.
    """
    count, size = x.shape
    gram = x @ x.T if count < size else x.T @ x
    values = np.zeros(size)
    values[: len(gram)] = np.linalg.eigvalsh(gram)[::-1].clip(min=0.0) / count
    mean, squares = values.mean(), float(np.square(values).sum())
    chance = float(np.square(np.square(x).sum(1)).mean()) - squares  # mean |x x^T - S|^2
    spread = squares - size * mean**2
    share = min(1.0, chance / count / spread) if spread > 0 else 0.0
    return ((1.0 - share) * values + share * mean) * (count / (count - 1))


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
