"""The embedded digits: images, weights, and the two models made of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..guidance import Denoiser
from ..schedules import VP
from .eval_model import REFERENCE_SEED, EvalModel, cycle_labels, generator, matched
from .formulas import KernelDenoiser
from .networks import CLASSES, NULL_CLASS, DigitsFeatures, DigitsUNet

DATA = Path(__file__).resolve().parent / "data"
SHAPE = (1, 8, 8)
LICENCE = "data CC BY 4.0 (UCI Optical Recognition of Handwritten Digits, from scikit-learn)"
_CHUNK = 64
"""Images a U-Net call is cut into; larger batches leave the processor's cache and are slower."""


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
        out = torch.empty((len(indices), *SHAPE))
        for row, index in zip(out, indices):
            random = generator(REFERENCE_SEED + index)
            among = of_class[index % CLASSES] if conditional else everything
            chosen = among[int(torch.randint(len(among), (), generator=random))]
            torch.add(images[chosen], torch.randn(row.shape, generator=random), alpha=bandwidth, out=row)
        return out

    def make(indices: Sequence[int], device: torch.device) -> Denoiser:
        wanted = cycle_labels(indices).to(device)

        def with_label(x: Tensor, t: Tensor) -> Tensor:
            return denoiser(x, t, matched(wanted, x))

        if not conditional:
            return Denoiser(denoiser, noise_schedule, "denoised", SHAPE)
        return Denoiser(with_label, noise_schedule, "denoised", SHAPE, unconditional=denoiser)

    return EvalModel(
        name="digits-exact",
        noise_schedule=noise_schedule,
        shape=SHAPE,
        bind=make,
        description=f"1,400 real 8x8 digits blurred by a Gaussian of width {bandwidth:g}; the denoiser is exact.",
        licence=LICENCE,
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
            return run(x, t, matched(wanted if embedding is None else embedding, x))

        def without_label(x: Tensor, t: Tensor) -> Tensor:
            return run(x, t, torch.full((x.shape[0],), NULL_CLASS, device=x.device))

        with torch.inference_mode(False), torch.no_grad():
            embedding = network.label(wanted)
        return Denoiser(
            with_label,
            noise_schedule,
            "epsilon",
            SHAPE,
            unconditional=without_label,
            condition=embedding,
        )

    return EvalModel(
        name="digits-unet",
        noise_schedule=noise_schedule,
        shape=SHAPE,
        bind=make,
        description="A small class-conditional U-Net trained on 1,400 real 8x8 digits, with classifier-free guidance.",
        licence=f"weights Apache-2.0; {LICENCE}",
        fingerprint=sha256("digits-unet.safetensors"),
        reference=reference,
        reference_size=CLASSES * min(map(len, of_class)),
        labels=cycle_labels,
        guided=True,
        features="digits",
    )
