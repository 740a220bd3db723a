"""A model as the evaluation uses it: an ``EvalModel`` on a device, with its defaults and features."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..guidance import Denoiser
from ..schedules import NoiseSchedule
from .digits import feature_network
from .eval_model import EvalModel
from .models import MODELS, PREFIX, load_model

SAMPLES = {"digits-exact": 1000, "digits-unet": 200}
"""Default number of samples a cell, chosen so that the whole default run takes well below two minutes on two cores."""
GUIDANCE = {"digits-unet": (1.0, 2.0)}
"""Scales that are evaluated by default."""
FRESH_REFERENCES = 20_000


@dataclass(frozen=True)
class Features:
    """The feature network of a model together with the images it is measured against."""

    model: EvalModel

    @property
    def dimension(self) -> int:
        return feature_network(str(self.model.features)).dimension

    @property
    def fingerprint(self) -> str:
        """Names weights and reference images: distances are comparable only where it is equal."""
        from .store import digest

        return digest([feature_network(str(self.model.features)).sha256, self.model.fingerprint, self.count])

    @property
    def count(self) -> int:
        """Number of reference images."""
        return self.model.reference_size or FRESH_REFERENCES

    def reference_images(self) -> np.ndarray:
        """uint8 reference images (count, ...)."""
        from .metrics import to_uint8

        assert self.model.reference is not None
        return to_uint8(self.model.reference(range(self.count)).numpy())

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images (n, ...) -> float32 features (n, dimension) and int64 labels (n,)."""
        network = feature_network(str(self.model.features))
        x = (torch.from_numpy(images).float() - 128.0) / 127.5  # inverse of to_uint8 up to its truncation
        return network.features(x).numpy(), network.logits(x).argmax(1).numpy()


@dataclass(frozen=True)
class Target:
    """A model on a device."""

    model: EvalModel
    device: str = "cpu"

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    @property
    def noise_schedule(self) -> NoiseSchedule:
        return self.model.noise_schedule

    @property
    def guidable(self) -> bool:
        """Whether there is an unconditional network."""
        return self.model.guided

    @property
    def conditional(self) -> bool:
        return self.model.labels is not None

    @property
    def shows_images(self) -> bool:
        """Whether a sample is a picture: (h, w), or one or three channels of it."""
        shape = self.model.shape
        return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))

    @property
    def samples(self) -> int:
        """Default number of samples a cell."""
        return SAMPLES.get(self._key, 200)

    @property
    def guidance(self) -> tuple[float, ...]:
        """Scales that are evaluated by default; empty: without guidance."""
        return GUIDANCE.get(self._key, ())

    @property
    def note(self) -> str:
        """What the model is and what it can tell."""
        if self.model.truth_is_exact:
            return f"{self.model.description} It compares solvers and says nothing about image quality."
        return self.model.description

    @property
    def _key(self) -> str:
        return self.model.name.removeprefix(PREFIX).partition(":")[0]

    @cached_property
    def features(self) -> Features | None:
        """The feature network, None where there is none for such data or nothing to measure against."""
        return Features(self.model) if self.model.features and self.model.reference else None

    def to(self, device: str) -> Target:
        """The same model on another device."""
        return replace(self, device=device)

    def denoiser(self, indices: Sequence[int]) -> Denoiser:
        """A fresh denoiser, its counter at zero, for the samples with these indices."""
        return self.model.denoiser(indices, self.device)

    def labels(self, indices: Sequence[int]) -> np.ndarray | None:
        """Class labels of samples, None for a model without classes."""
        return None if self.model.labels is None else self.model.labels(indices).numpy()

    def noise(self, indices: Sequence[int], seed: int) -> torch.Tensor:
        """Unit start noise, drawn on the CPU and moved."""
        return self.model.noise(indices, seed).to(self.device)

    def probe(self, batch: int) -> float:
        """Call the network a few times and time it: milliseconds per sample.

        Raises ValueError where the network cannot be called as a Denoiser's, or answers in another shape, so
        that such a mistake shows before the work and not in each of its cells.
        """
        indices = list(range(batch))
        denoiser = self.denoiser(indices)
        t = float(self.noise_schedule.time(self.noise_schedule.level_max))
        x = self.noise(indices, 0)
        times = torch.full((batch,), t, dtype=torch.float32, device=x.device)
        best, output = float("inf"), x
        for _ in range(3):
            began = time.perf_counter()
            try:
                with torch.inference_mode():
                    output = denoiser.fn(x, times)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                shapes = f"x {tuple(x.shape)} and t {tuple(times.shape)}"
                raise ValueError(
                    f"model {self.name}: its network failed on a first call with {shapes}: {why}"
                ) from error
            best = min(best, time.perf_counter() - began)
        if not isinstance(output, torch.Tensor) or output.shape != x.shape:
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(
                f"model {self.name}: its network must answer in the shape of x, {tuple(x.shape)}, got {got}"
            )
        return 1000.0 * best / batch


def load_target(name: str) -> Target:
    """The model that a name means: ``builtin:NAME``, ``module:callable``, or a diffusers pipeline (folder or Hub id).

    ValueError saying what is allowed.
    """
    if (":" not in name and name not in MODELS) or Path(name).is_dir():
        from .pipelines import load_model as load_pipeline

        return Target(load_pipeline(name))
    return Target(load_model(name))


def builtin_names() -> list[str]:
    """The embedded models, as on the command line."""
    return [PREFIX + name for name in MODELS]
