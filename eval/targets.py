"""What is evaluated: turns a name on the command line into a :class:`Target`.

==========================  ============================================================================================
``builtin:NAME``            a model embedded in the package, see ``fewstep list models``
``module:callable``         ``callable()`` returns a :class:`fewstep.Denoiser` with its ``shape``; the module is looked for
                            in the current folder as well
a folder or Hub id          a diffusers pipeline, through ``fewstep.hosts.pipelines``
==========================  ============================================================================================
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..guidance import Denoiser
from ..schedules import NoiseSchedule
from ..schedules.spec import suggestion

BUILTIN = "builtin:"


@dataclass(frozen=True)
class Features:
    """A network that maps stored images to features and to a label.

    ``fingerprint`` names weights, layer and reference images: distances are comparable only where it is equal.
    """

    fingerprint: str
    dimension: int
    extract: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    reference_images: Callable[[], np.ndarray]

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images (n, ...) -> (float32 features (n, dimension), int64 labels (n,))."""
        return self.extract(images)


@dataclass(frozen=True)
class Target:
    """A model with what the evaluation needs to know of it.

    Attributes:
        name: as on the command line.
        fingerprint: changes when the model does; part of the key of every result.
        shape: of one sample.
        make: indices -> Denoiser for those samples (their labels), on ``device``.
        labels_of: indices -> class labels, None for an unconditional model.
        noise_of: (indices, seed) -> unit noise (n, *shape), a function of seed + index alone.
        guidable: whether there is an unconditional network.
        guidance: scales that are evaluated by default; empty for a model without guidance.
        samples: default number of samples a cell.
        features: feature network, None where there is none for such data.
    """

    name: str
    fingerprint: str
    shape: tuple[int, ...]
    noise_schedule: NoiseSchedule
    make: Callable[[Sequence[int], str], Denoiser]
    noise_of: Callable[[Sequence[int], int], torch.Tensor]
    labels_of: Callable[[Sequence[int]], np.ndarray] | None = None
    guidable: bool = False
    guidance: tuple[float, ...] = ()
    samples: int = 200
    features: Features | None = None
    note: str = ""
    device: str = "cpu"

    @property
    def conditional(self) -> bool:
        return self.labels_of is not None

    def to(self, device: str) -> Target:
        """The same model on another device."""
        return replace(self, device=device)

    def denoiser(self, indices: Sequence[int]) -> Denoiser:
        """A fresh denoiser, its counter at zero, for the samples with these indices."""
        return self.make(indices, self.device)

    def labels(self, indices: Sequence[int]) -> np.ndarray | None:
        """Class labels of samples, None for an unconditional model."""
        return None if self.labels_of is None else self.labels_of(indices)

    def noise(self, indices: Sequence[int], seed: int) -> torch.Tensor:
        """Unit start noise, drawn on the CPU and moved."""
        return self.noise_of(indices, seed).to(self.device)

    def probe(self, batch: int) -> float:
        """Call the network once and time it: milliseconds per sample.

        Raises ValueError where the network cannot be called as a Denoiser's or answers in another shape, so that such a
        mistake shows before the work and not in each of its cells.
        """
        indices = list(range(batch))
        denoiser = self.denoiser(indices)
        t = float(self.noise_schedule.time(self.noise_schedule.level_max))
        x = self.noise(indices, 0)
        times = torch.full((batch,), t, dtype=torch.float32, device=x.device)
        best = float("inf")
        for _ in range(2):
            began = time.perf_counter()
            try:
                with torch.inference_mode():
                    output = denoiser.fn(x, times)
            except Exception as error:
                raise ValueError(f"model {self.name}: its network failed on a first call with x {tuple(x.shape)} "
                                 f"and t {tuple(times.shape)}: {type(error).__name__}: {error}") from error  # fmt: skip
            best = min(best, time.perf_counter() - began)
        if not isinstance(output, torch.Tensor) or output.shape != x.shape:
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(f"model {self.name}: its network must answer in the shape of x, {tuple(x.shape)}, got {got}")
        return 1000.0 * best / batch


def load_target(name: str) -> Target:
    """The model that a name means; ValueError saying what is allowed."""
    if name.startswith(BUILTIN):
        return _builtin(name)
    module, colon, attribute = name.partition(":")
    if colon and module.replace(".", "").replace("_", "").isalnum() and attribute.isidentifier():
        return _from_callable(name, module, attribute)
    return _pipeline(name)


def _builtin(name: str) -> Target:
    from . import models

    raise NotImplementedError


def _from_callable(name: str, module: str, attribute: str) -> Target:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"model {name}: cannot import {module!r} ({error}); it is looked for in {folder} and on the "
                         "Python path") from None  # fmt: skip
    factory = getattr(loaded, attribute, None)
    if not callable(factory):
        names = [n for n, v in vars(loaded).items() if callable(v) and not n.startswith("_")]
        raise ValueError(f"model {name}: {module} has no callable {attribute!r}{suggestion(attribute, names)}")
    denoiser = factory()
    if not isinstance(denoiser, Denoiser):
        raise ValueError(f"model {name}: {attribute}() must return a fewstep.Denoiser, got {type(denoiser).__name__}")
    if denoiser.shape is None:
        raise ValueError(f"model {name}: its Denoiser needs shape=..., the shape of one sample, to draw start noise")
    shape = denoiser.shape

    def make(indices: Sequence[int], device: str) -> Denoiser:
        return Denoiser(denoiser.fn, denoiser.noise_schedule, denoiser.prediction, shape, denoiser.unconditional)

    return Target(
        name=name,
        fingerprint=_source_fingerprint(name, loaded),
        shape=shape,
        noise_schedule=denoiser.noise_schedule,
        make=make,
        noise_of=lambda indices, seed: unit_noise(indices, shape, seed),
        guidable=denoiser.unconditional is not None,
        note="Your own model: there are no reference images, so only the distance to its converged solution is measured.",
    )


def _source_fingerprint(name: str, module: Any) -> str:
    """Of the module's source; weights that it reads from elsewhere are not seen."""
    try:
        source = Path(inspect.getfile(module)).read_bytes()
    except (OSError, TypeError):
        source = b""
    return f"{name}@{hashlib.sha256(source).hexdigest()[:16]}"


def _pipeline(name: str) -> Target:
    try:
        pipelines = importlib.import_module("..hosts.pipelines", __package__)
    except ModuleNotFoundError:
        raise ValueError(
            f"no model {name!r}: a model is builtin:NAME ({', '.join(builtin_names())}) or module:callable; diffusers pipelines "
            f"need fewstep.hosts.pipelines, which this version does not have{suggestion(name, builtin_names())}"
        ) from None
    return pipelines.load_target(name)


def builtin_names() -> list[str]:
    """The embedded models, as on the command line."""
    from . import models

    return [BUILTIN + n for n in models.MODELS]


def unit_noise(indices: Sequence[int], shape: Sequence[int], seed: int) -> torch.Tensor:
    """Standard normal start noise, one generator an index: row j depends on seed + indices[j] alone."""
    from . import models

    return models.initial_noise(indices, shape, seed)
