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
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..guidance import Denoiser
from ..schedules import EDM, VP, Flow, NoiseSchedule
from ..schedules.spec import bind, options_of, render, split, suggestion
from .digits import digits_exact, digits_unet
from .eval_model import REFERENCE_SEED, EvalModel, generator
from .formulas import MixtureDenoiser

PREFIX = "builtin:"
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
            random = generator(REFERENCE_SEED + index)
            mode = int(torch.multinomial(weights, 1, generator=random))
            eps = torch.randn(GMM_DIMENSIONS, generator=random, dtype=torch.float64)
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
