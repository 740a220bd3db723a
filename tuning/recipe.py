"""A recipe: the sampler that was fitted to one model at one number of evaluations, as a small JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..samplers import Solver
from ..schedules import NoiseSchedule, TimeGrid
from .table import Table, init_noise_sigma

FORMAT = 1
SCHEMA = Path(__file__).with_name("recipe.schema.json")
"""The JSON schema of a recipe file."""
OPTIONAL = ("guidance", "teacher", "seeds", "errors", "ratios", "fewstep")
"""Fields that a file may leave out."""
Kind = Literal["fitted", "fixed"]


def schedule_digest(noise_schedule: NoiseSchedule) -> str:
    """Identifies a noise schedule by its frame and trained levels, to six digits.

    By the frame alone for flow models: t is sigma itself there, and a shift, which may change with the image's size,
    says only how steps are spaced.
    """
    flow = noise_schedule.frame == "flow"
    levels = [] if flow else np.asarray(noise_schedule.train_levels, dtype=np.float64)
    words = [noise_schedule.frame, *(f"{k:.5e}" for k in levels)]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Recipe:
    """Levels and coefficients, with what they were fitted to.

    Attributes:
        nfe: network evaluations of a sample (each counted once, guided or not).
        levels: noise levels (sigma / alpha; sigma for flow models), of the start state first and of the result last.
        rows: for every step the weight of the state and of the newest predictions, see :class:`Table`.
        kind: ``"fitted"``, or ``"fixed"`` if no fit was better than a method without tuning, which it then is.
        method: what was fitted, or the fixed choice: ``"solver on spacing"``.
        model: name of the model.
        fingerprint: of the model's weights; another model is warned about.
        frame: frame of the noise schedule, ``"vp"``, ``"edm"`` or ``"flow"``.
        noise_schedule: digest of the noise schedule; another one is refused.
        prediction: what the network predicts.
        guidance: the guidance in use, ``""`` for none.
        teacher: solver, spacing and steps of the converged solution.
        seeds: indices of the trajectories.
        errors: RMS distance per element to the converged solution: ``train`` on the trajectories, ``held_out`` by
            cross-validation, ``fixed`` of the best method without tuning on the same trajectories.
        ratios: of dynamic compensation, if that was fitted: ``dc:file=`` takes the recipe's file.
    """

    nfe: int
    levels: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    kind: Kind
    method: str
    model: str
    fingerprint: str
    frame: str
    noise_schedule: str
    prediction: str
    guidance: str = ""
    teacher: str = ""
    seeds: tuple[int, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    ratios: tuple[float, ...] = ()
    fewstep: str = ""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.nfe != self.table.steps:
            raise ValueError(f"a recipe for {self.nfe} evaluations has {self.table.steps} rows")

    @property
    def table(self) -> Table:
        """The levels and coefficients."""
        return Table(tuple(self.levels), tuple(map(tuple, self.rows)))

    @property
    def solver(self) -> Solver:
        """The steps as a solver, for :meth:`grid`."""
        return self.table.solver

    def grid(self, noise_schedule: NoiseSchedule) -> TimeGrid:
        """The nodes on a noise schedule; ValueError if it is not the one of the fit."""
        if schedule_digest(noise_schedule) != self.noise_schedule:
            raise ValueError(
                f"this recipe was fitted to {self.model} on a {self.frame} noise schedule that is not the one of this "
                "model; fit one with fewstep tune --model ..."
            )
        return self.table.grid(noise_schedule)

    def init_noise_sigma(self, noise_schedule: NoiseSchedule) -> float:
        """What unit noise is multiplied with where a run starts: 1, for EDM models the first level."""
        return init_noise_sigma(self.frame, self.grid(noise_schedule)[0])

    def check(self, *, fingerprint: str | None = None, guidance: str | None = None) -> None:
        """Warn where it is used for something else than what it was fitted to; ``None`` is not compared."""
        if fingerprint is not None and fingerprint != self.fingerprint:
            warnings.warn(
                f"this recipe was fitted to other weights ({self.model}); fewstep tune fits one to these",
                stacklevel=3,
            )
        if guidance is not None and guidance != self.guidance:
            mine, other = self.guidance or "no guidance", guidance or "none"
            warnings.warn(
                f"this recipe was fitted with {mine} and is used with {other}; fewstep tune fits one to that",
                stacklevel=3,
            )

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe of a file's content; ValueError naming what is missing, unknown or wrong."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else None
            raise ValueError(f"not a fewstep recipe of format {FORMAT}: its format is {found!r}")
        known = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls)} - set(OPTIONAL)
        if wrong := (set(data) - known) | (required - set(data)):
            raise ValueError(f"not a fewstep recipe: missing or unknown {', '.join(sorted(wrong))}")
        try:
            return cls(
                **{
                    **data,
                    "nfe": int(data["nfe"]),
                    "levels": tuple(map(float, data["levels"])),
                    "rows": tuple(tuple(map(float, row)) for row in data["rows"]),
                    "seeds": tuple(map(int, data.get("seeds", ()))),
                    "ratios": tuple(map(float, data.get("ratios", ()))),
                }
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a fewstep recipe: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the file, at once or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def load(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from a file, its content, or itself; ValueError with the file's name if it is not one."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe)
    try:
        return Recipe.from_dict(json.loads(Path(recipe).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"cannot read the recipe {str(recipe)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{str(recipe)!r}: {error}") from None


def finite(value: float) -> float:
    """For JSON, which has no infinity."""
    return value if math.isfinite(value) else 1e30
