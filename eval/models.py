"""The embedded evaluation models: real images, known truth, a CPU is enough.

=========================  ===================================================================================
``builtin:digits-exact``   closed-form denoiser of 1,400 real digits, each blurred by a Gaussian of width h: no
                           network, so everything that differs from the converged solution is the solver's
``builtin:digits-unet``    a network trained on the same digits, with classes and guidance: what is met in practice
``builtin:gmm``            16-dimensional Gaussian mixture in float64, on any noise schedule: orders of convergence
=========================  ===================================================================================

Options follow the name as they do for solvers: ``builtin:digits-exact:bandwidth=0.2``. A sample is known by its index
alone: its label is index mod 10 and its start noise comes from a generator seeded with seed + index, so that results
do not depend on how the indices are cut into batches.

These models compare solvers with each other. They say nothing about image quality on other models.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..guidance import Denoiser
from ..schedules import EDM, VP, Flow, NoiseSchedule
from ..schedules.spec import bind, options_of, render, split, suggestion
from .networks import CLASSES, NULL_CLASS, DigitsFeatures, DigitsUNet

DATA = Path(__file__).resolve().parent / "data"
PREFIX = "builtin:"
DIGITS_SHAPE = (1, 8, 8)
DIGITS_LICENCE = "data CC BY 4.0 (UCI Optical Recognition of Handwritten Digits, from scikit-learn)"

_REFERENCE_SEED = 1 << 40
"""Far from any seed + index of the start noise, so that references and start noise share no random numbers."""
_CHUNK = 64
"""Images a U-Net call is cut into; larger batches leave the processor's cache and are slower."""


@dataclass(frozen=True)
class EvalModel:
    """A model with what an evaluation asks of it.

    Attributes:
        name: canonical spec, ``"builtin:digits-exact"`` or ``"builtin:digits-exact:bandwidth=0.2"``.
        noise_schedule: of the denoiser.
        shape: of one sample, without the batch.
        dtype: in which the model computes; start noise is best given in it.
        bind: see :meth:`denoiser`.
        reference: indices -> (B, *shape), samples of the data distribution itself, one an index and of the class that
            the model's sample has; None if there are none.
        reference_size: how many different references there are; None for fresh samples without end.
        labels: indices -> (B,) int64 class labels; None for a model without classes.
        guided: whether there is an unconditional network, for guidance.
        truth_is_exact: whether ``reference`` draws from exactly the distribution that the converged solution has.
        features: name of the feature network for its samples (see :func:`feature_network`), or None.
        description: one sentence.
        licence: of data and weights.
        fingerprint: changes when data, weights or options do; part of what identifies a result.
    """

    name: str
    noise_schedule: NoiseSchedule
    shape: tuple[int, ...]
    bind: Callable[[Sequence[int], torch.device], Denoiser]
    description: str
    licence: str
    fingerprint: str
    truth_is_exact: bool = False
    reference: Callable[[Sequence[int]], Tensor] | None = None
    reference_size: int | None = None
    labels: Callable[[Sequence[int]], Tensor] | None = None
    guided: bool = False
    features: str | None = None
    dtype: torch.dtype = torch.float32

    def denoiser(self, indices: Sequence[int], device: str | torch.device = "cpu") -> Denoiser:
        """A fresh denoiser, its counter at zero, for the samples with these indices: rows of x in this order."""
        return self.bind(indices, torch.device(device))

    def noise(self, indices: Sequence[int], seed: int = 0) -> Tensor:
        """Unit start noise (B, *shape) in the model's dtype, on the CPU; the start is that times the first sigma."""
        return initial_noise(indices, self.shape, seed).to(self.dtype)


def initial_noise(indices: Sequence[int], shape: Sequence[int], seed: int = 0) -> Tensor:
    """Standard normal noise, float32 (B, *shape) on the CPU: row j is a function of seed + indices[j] alone."""
    noise = torch.empty((len(indices), *shape))
    for row, index in zip(noise, indices):
        torch.randn(row.shape, generator=_generator(seed + index), out=row)
    return noise


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cycle_labels(indices: Sequence[int]) -> Tensor:
    """Label of each sample: index mod 10, int64 (B,)."""
    return torch.as_tensor(list(indices), dtype=torch.int64) % CLASSES


# -- data and weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) float32 in [-1, 1] (17 levels), labels (N,) int64, and the indices of the fixed split."""

    images: Tensor
    labels: Tensor
    train: Tensor
    held_out: Tensor


# What is kept between calls is made outside inference mode, wherever the first call comes from: tensors made inside it
# could not be used for gradients later.


@cache
@torch.inference_mode(False)
def digits() -> Digits:
    """The 1,797 embedded digits: 1,400 to train on, 397 held out."""
    with np.load(DATA / "digits.npz") as data:
        images = torch.from_numpy(data["images"]).float()[:, None] / 8 - 1
        labels, train, held_out = (
            torch.from_numpy(data[k].astype(np.int64)) for k in ("labels", "train", "held_out")
        )
    return Digits(images, labels, train, held_out)


@cache
def sha256(file: str) -> str:
    """Of a file of the package data, hexadecimal."""
    return hashlib.sha256((DATA / file).read_bytes()).hexdigest()


def metadata(file: str) -> dict[str, Any]:
    """What ``examples/train_digits.py`` wrote into a weights file: recipe, seed, losses, hash of the data."""
    from safetensors import safe_open

    with safe_open(DATA / file, framework="pt") as weights:
        return json.loads(weights.metadata()["fewstep"])


def _load(network: torch.nn.Module, file: str, device: torch.device) -> None:
    from safetensors.torch import load_file

    network.load_state_dict(load_file(DATA / file))
    network.to(device).eval().requires_grad_(False)


@cache
@torch.inference_mode(False)
def digits_network(device: torch.device = torch.device("cpu")) -> DigitsUNet:  # noqa: B008
    """The trained U-Net in fp32, for inference; gradients with respect to x work."""
    network = DigitsUNet()
    _load(network, "digits-unet.safetensors", device)
    return network


@dataclass(frozen=True)
class FeatureNetwork:
    """A classifier whose last hidden layer is the space of the Frechet distance.

    Images are (B, 1, 8, 8) in [-1, 1]; values outside, as samplers give them, are taken as they are.
    """

    name: str
    network: DigitsFeatures
    sha256: str
    dimension: int = 64

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """(B, 64) float32."""
        return torch.cat([self.network.features(part) for part in images.float().split(1024)])

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """(B, 10) float32; the label is the largest."""
        return torch.cat([self.network.logits(part) for part in images.float().split(1024)])


@cache
@torch.inference_mode(False)
def feature_network(name: str = "digits", device: str = "cpu") -> FeatureNetwork:
    """The embedded classifier; ``name`` as in :attr:`EvalModel.features`. ValueError for another name."""
    if name != "digits":
        raise ValueError(f"no feature network {name!r}; there is 'digits'")
    network = DigitsFeatures()
    _load(network, "digits-features.safetensors", torch.device(device))
    return FeatureNetwork(name, network, sha256("digits-features.safetensors"))


# -- closed-form denoisers -------------------------------------------------------------------------------------------


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


# -- the models ------------------------------------------------------------------------------------------------------


def digits_exact(*, bandwidth: float = 0.15, conditional: bool = False) -> EvalModel:
    """Closed-form denoiser of the kernel-smoothed digits.

    Options: ``bandwidth`` h > 0, the width of the Gaussian around each image, where images span [-1, 1];
    ``conditional``: samples are restricted to the images of their label, and there is guidance; otherwise there is
    one field for all classes, which is harder (few evaluations decide between classes) and so tells solvers apart
    better.
    """
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"the bandwidth of digits-exact must be positive, got {bandwidth:g} (default 0.15)")
    data = digits()
    noise_schedule = VP.linear()
    images, labels = data.images[data.train], data.labels[data.train]
    denoiser = KernelDenoiser(images, labels, bandwidth, noise_schedule)
    of_class = [torch.nonzero(labels == c).flatten() for c in range(CLASSES)]
    everything = torch.arange(len(labels))

    def reference(indices: Sequence[int]) -> Tensor:
        out = torch.empty((len(indices), *DIGITS_SHAPE))
        for row, index in zip(out, indices):
            generator = _generator(_REFERENCE_SEED + index)
            among = of_class[index % CLASSES] if conditional else everything
            chosen = among[int(torch.randint(len(among), (), generator=generator))]
            torch.add(images[chosen], torch.randn(row.shape, generator=generator), alpha=bandwidth, out=row)
        return out

    def make(indices: Sequence[int], device: torch.device) -> Denoiser:
        wanted = cycle_labels(indices).to(device)

        def with_label(x: Tensor, t: Tensor) -> Tensor:
            return denoiser(x, t, _matched(wanted, x))

        if not conditional:
            return Denoiser(denoiser, noise_schedule, "denoised", DIGITS_SHAPE)
        return Denoiser(with_label, noise_schedule, "denoised", DIGITS_SHAPE, unconditional=denoiser)

    return EvalModel(
        name="digits-exact",
        noise_schedule=noise_schedule,
        shape=DIGITS_SHAPE,
        bind=make,
        description=f"1,400 real 8x8 digits blurred by a Gaussian of width {bandwidth:g}; the denoiser is exact.",
        licence=DIGITS_LICENCE,
        fingerprint=sha256("digits.npz"),
        truth_is_exact=True,
        reference=reference,
        labels=cycle_labels if conditional else None,
        guided=conditional,
        features="digits",
    )


def digits_unet() -> EvalModel:
    """The trained class-conditional U-Net; see docs/model-card-digits.md."""
    data = digits()
    noise_schedule = VP.linear()
    # by class, held-out images first: a small evaluation compares with images the network has not seen
    order = torch.cat([data.held_out, data.train])
    of_class = [order[data.labels[order] == c] for c in range(CLASSES)]

    def reference(indices: Sequence[int]) -> Tensor:
        chosen = [of_class[i % CLASSES][(i // CLASSES) % len(of_class[i % CLASSES])] for i in indices]
        return data.images[torch.as_tensor(chosen, dtype=torch.int64)]

    def make(indices: Sequence[int], device: torch.device) -> Denoiser:
        network = digits_network(device)
        wanted = cycle_labels(indices).to(device)

        def run(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            x, t = x.to(network.stem.weight.dtype), t.to(network.stem.weight.dtype)
            parts = zip(x.split(_CHUNK), t.split(_CHUNK), labels.split(_CHUNK))
            return torch.cat([network(*part) for part in parts])

        def with_label(x: Tensor, t: Tensor, embedding: Tensor | None = None) -> Tensor:
            return run(x, t, _matched(wanted if embedding is None else embedding, x))

        def without_label(x: Tensor, t: Tensor) -> Tensor:
            return run(x, t, torch.full((x.shape[0],), NULL_CLASS, device=x.device))

        with torch.inference_mode(False), torch.no_grad():
            embedding = network.label(wanted)
        return Denoiser(
            with_label,
            noise_schedule,
            "epsilon",
            DIGITS_SHAPE,
            unconditional=without_label,
            condition=embedding,
        )

    return EvalModel(
        name="digits-unet",
        noise_schedule=noise_schedule,
        shape=DIGITS_SHAPE,
        bind=make,
        description="A small class-conditional U-Net trained on 1,400 real 8x8 digits, with classifier-free guidance.",
        licence=f"weights Apache-2.0; {DIGITS_LICENCE}",
        fingerprint=sha256("digits-unet.safetensors"),
        reference=reference,
        reference_size=CLASSES * min(map(len, of_class)),
        labels=cycle_labels,
        guided=True,
        features="digits",
    )


GMM_DIMENSIONS, GMM_MODES = 16, 4
NOISE_SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {"vp": VP.linear, "edm": EDM, "flow": Flow}


def gmm(*, noise: Literal["vp", "edm", "flow"] = "vp") -> EvalModel:
    """Gaussian mixture with 4 modes of unequal weight in 16 dimensions, exact and in float64.

    Option ``noise``: the noise schedule, ``vp`` (linear betas), ``edm`` or ``flow``. Means and variances are cosines
    of the indices, so that they are the same numbers everywhere: means in [-0.6, 0.6], deviations in [0.2, 0.6].
    """
    k = torch.arange(1, GMM_MODES + 1, dtype=torch.float64)[:, None]
    d = torch.arange(GMM_DIMENSIONS, dtype=torch.float64) + 0.5
    weights = k[:, 0] / k.sum()
    means = 0.6 * torch.cos(2.4 * k * d)
    deviations = 0.4 + 0.2 * torch.cos(1.7 * k + d)
    noise_schedule = NOISE_SCHEDULES[noise]()
    denoiser = MixtureDenoiser(weights, means, deviations.square(), noise_schedule)

    def reference(indices: Sequence[int]) -> Tensor:
        out = torch.empty((len(indices), GMM_DIMENSIONS), dtype=torch.float64)
        for row, index in zip(out, indices):
            generator = _generator(_REFERENCE_SEED + index)
            mode = int(torch.multinomial(weights, 1, generator=generator))
            eps = torch.randn(GMM_DIMENSIONS, generator=generator, dtype=torch.float64)
            torch.addcmul(means[mode], deviations[mode], eps, out=row)
        return out

    def make(indices: Sequence[int], device: torch.device) -> Denoiser:
        return Denoiser(denoiser, noise_schedule, "denoised", (GMM_DIMENSIONS,))

    return EvalModel(
        name="gmm",
        noise_schedule=noise_schedule,
        shape=(GMM_DIMENSIONS,),
        bind=make,
        description=f"Gaussian mixture, {GMM_MODES} modes in {GMM_DIMENSIONS} dimensions; denoiser exact in float64.",
        licence="none needed: a formula",
        fingerprint="gmm-1",
        truth_is_exact=True,
        reference=reference,
        dtype=torch.float64,
    )


MODELS: dict[str, Callable[..., EvalModel]] = {
    "digits-exact": digits_exact,
    "digits-unet": digits_unet,
    "gmm": gmm,
}
"""The registry: what may follow ``builtin:``. Options are the keyword-only parameters."""


def _matched(labels: Tensor, x: Tensor) -> Tensor:
    if len(labels) != x.shape[0]:
        raise ValueError(
            f"this denoiser is bound to {len(labels)} sample indices, x has {x.shape[0]} samples"
        )
    return labels


# -- names -----------------------------------------------------------------------------------------------------------


def load_model(name: str) -> EvalModel:
    """The model that a name means.

    ``builtin:NAME[:option=value,...]`` is one of :data:`MODELS`. ``module:callable`` imports the dotted module (the
    current folder is searched as well) and calls ``callable()``, which returns an :class:`EvalModel` or a
    :class:`fewstep.Denoiser` with its ``shape``. Pipelines (folder or Hub id) are not loaded here.

    Raises ValueError for anything else, naming what is allowed and the nearest embedded model.
    """
    if name.startswith(PREFIX):
        return _builtin(name)
    module, colon, attribute = name.partition(":")
    if colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return _from_callable(name, module, attribute)
    names = [PREFIX + n for n in MODELS]
    near = suggestion(name if ":" in name else PREFIX + name, names)
    raise ValueError(f"no model {name!r}: allowed are {', '.join(names)} and module:callable{near}")


@torch.inference_mode(False)
def _builtin(name: str) -> EvalModel:
    key, given = split(name.removeprefix(PREFIX))
    if key not in MODELS:
        allowed = ", ".join(PREFIX + n for n in MODELS)
        raise ValueError(f"no embedded model {key!r}; allowed: {allowed}{suggestion(key, MODELS)}")
    options = bind(options_of(MODELS[key]), given, f"model {key}")
    model = MODELS[key](**options)
    spec = PREFIX + render(key, options)
    return replace(model, name=spec, fingerprint=f"{spec}@{model.fingerprint[:16]}")


def _from_callable(name: str, module: str, attribute: str) -> EvalModel:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # the module is there and misses something itself: its traceback says what
        near = suggestion(PREFIX + module, [PREFIX + n for n in MODELS])
        raise ValueError(
            f"model {name!r}: no module {error.name!r} on the Python path or in {os.getcwd()}{near}"
        ) from None
    factory = getattr(loaded, attribute, None)
    if not callable(factory):
        names = [n for n, value in vars(loaded).items() if callable(value) and not n.startswith("_")]
        raise ValueError(
            f"model {name!r}: {module} has no callable {attribute!r}{suggestion(attribute, names)}"
        )
    made = factory()
    if isinstance(made, EvalModel):
        return made
    if not isinstance(made, Denoiser):
        raise ValueError(
            f"model {name!r}: {attribute}() must return a Denoiser or an EvalModel, got {type(made).__name__}"
        )
    if made.shape is None:
        raise ValueError(f"model {name!r}: its Denoiser needs shape=..., the shape of one sample")

    def make(indices: Sequence[int], device: torch.device) -> Denoiser:
        fresh = copy.copy(made)
        fresh.nfe = 0
        return fresh

    source = Path(str(getattr(loaded, "__file__", "")))
    code = source.read_bytes() if source.is_file() else b""
    return EvalModel(
        name=name,
        noise_schedule=made.noise_schedule,
        shape=made.shape,
        bind=make,
        description="Your own model.",
        licence="yours",
        fingerprint=f"{name}@{hashlib.sha256(code).hexdigest()[:16]}",
        guided=made.unconditional is not None,
    )
