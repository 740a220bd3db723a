"""Denoisers in closed form: a Gaussian around every image, and a mixture of Gaussians."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedules import NoiseSchedule


def _signal_and_noise(noise_schedule: NoiseSchedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at t (B,), shape (B, 1), in the dtype and on the device of x; computed in float64."""
    alpha, sigma = noise_schedule.alpha_sigma(t.detach().double().cpu().numpy())
    return torch.from_numpy(alpha).to(x)[:, None], torch.from_numpy(sigma).to(x)[:, None]


class KernelDenoiser:
    r"""Posterior mean E[x0 | x] for data p(x0) = mean over i of N(c_i, h^2 I) and x = alpha x0 + sigma eps.

        s^2 = alpha^2 h^2 + sigma^2
        w   = softmax_i((alpha <x, c_i> - alpha^2 |c_i|^2 / 2) / s^2)
        E   = (alpha h^2 x + sigma^2 sum_i w_i c_i) / s^2

    The logits are -|x - alpha c_i|^2 / (2 s^2) less what does not depend on i; centres and x are taken relative to the
    mean centre, which changes nothing but keeps the logits small. Limits sigma = 0 (E = x / alpha) and alpha = 0
    (E = mean centre) need no special case.

    Args:
        centres: c_i, (K, ...).
        labels: (K,) classes of the centres.
        h: bandwidth, in the unit of the centres.
        noise_schedule: gives alpha and sigma at t.

    ``denoiser(x, t, labels)``: x (B, ...) and t (B,); labels (B,) restrict sample j to the centres of class labels[j],
    None allows all. Computed in the dtype of x, which is the dtype of the result.
    """

    def __init__(self, centres: Tensor, labels: Tensor, h: float, noise_schedule: NoiseSchedule) -> None:
        c = centres.flatten(1).double()
        self.mean = c.mean(0)
        self.centres, self.labels, self.h, self.noise_schedule = c - self.mean, labels, h, noise_schedule
        self._ready: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    @torch.inference_mode(False)
    def _tensors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Centres, half their squared norms, mean (all in x's dtype) and labels, on x's device."""
        key = (x.dtype, x.device)
        if key not in self._ready:
            numbers = (self.centres, 0.5 * self.centres.square().sum(1), self.mean)
            self._ready[key] = (*(a.to(x) for a in numbers), self.labels.to(x.device))
        return self._ready[key]

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        alpha, sigma = _signal_and_noise(self.noise_schedule, t, x)
        centres, half_norms, mean, classes = self._tensors(x)
        y = x.flatten(1) - alpha * mean
        variance = (alpha * self.h).square() + sigma.square()
        logits = torch.addcmul(
            alpha / variance * y @ centres.T, alpha.square() / variance, half_norms, value=-1
        )
        if labels is not None:
            logits = logits.masked_fill(labels[:, None] != classes, -math.inf)
        nearest = torch.softmax(logits, 1) @ centres
        return (mean + (alpha * self.h**2 * y + sigma.square() * nearest) / variance).view_as(x)


@dataclass(frozen=True)
class MixtureDenoiser:
    r"""Posterior mean for p(x0) = sum_k weight_k N(mean_k, diag(variance_k)) and x = alpha x0 + sigma eps, in float64.

        s_k^2 = alpha^2 variance_k + sigma^2                       (per element)
        w     = softmax_k(log weight_k - sum((x - alpha mean_k)^2 / (2 s_k^2) + log(s_k^2) / 2))
        E     = sum_k w_k (mean_k + alpha variance_k (x - alpha mean_k) / s_k^2)

    Attributes: weights (K,), means (K, D), variances (K, D).
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    noise_schedule: NoiseSchedule

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        y = x.double()
        alpha, sigma = (a[:, :, None] for a in _signal_and_noise(self.noise_schedule, t, y))
        means, variances = self.means.to(x.device), self.variances.to(x.device)
        difference = y[:, None] - alpha * means
        spread = alpha.square() * variances + sigma.square()
        log_density = -0.5 * (difference.square() / spread + spread.log()).sum(2)
        weight = torch.softmax(self.weights.log().to(x.device) + log_density, 1)
        each = means + alpha * variances * difference / spread
        return (weight[:, :, None] * each).sum(1).to(x.dtype)
