"""Spacings that others have found for one model family and published as tables."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from . import align_your_steps
from .noise import VP, Array, NoiseSchedule
from .spacing import spacing
from .spec import Range

DATA = Path(__file__).parent / "data"

OptimalStepsModel = Literal["flux", "wan", "chroma"]

# fmt: off
OPTIMAL_STEPS: dict[OptimalStepsModel, tuple[float, ...]] = {
    "flux": (0.9968, 0.9886, 0.9819, 0.975, 0.966, 0.9471, 0.9158, 0.8287, 0.5512, 0.2808, 0.001),
    "wan": (
        1.0, 0.997, 0.995, 0.993, 0.991, 0.989, 0.987, 0.985, 0.98, 0.975, 0.973, 0.968, 0.96, 0.946, 0.927, 0.902,
        0.864, 0.776, 0.539, 0.208, 0.001,
    ),
    "chroma": (
        0.992, 0.99, 0.988, 0.985, 0.982, 0.978, 0.973, 0.968, 0.961, 0.953, 0.943, 0.931, 0.917, 0.9, 0.881, 0.858,
        0.832, 0.802, 0.769, 0.731, 0.69, 0.646, 0.599, 0.55, 0.501, 0.451, 0.402, 0.355, 0.311, 0.27, 0.232, 0.199,
        0.169, 0.143, 0.12, 0.101, 0.084, 0.07, 0.058, 0.048, 0.001,
    ),
}
# fmt: on


def resampled(table: Array, steps: int) -> Array:
    """The first ``steps`` of ``steps + 1`` levels, linear in the logarithm of the level over the index of a table."""
    u = np.linspace(0.0, 1.0, steps + 1)
    levels = np.exp(np.interp(u, np.linspace(0.0, 1.0, len(table)), np.log(table)))
    return np.append(table[0], levels[1:-1])


@spacing(
    "ays",
    aliases={"align_your_steps": "ays", "AlignYourStepsScheduler": "ays"},
    reference="https://arxiv.org/abs/2404.14507",
)
def ays(noise_schedule: NoiseSchedule, steps: int, *, model: align_your_steps.Model | None = None) -> Array:
    """Align Your Steps: published optimised levels for a model family, resampled log-linearly.

    Without a ``model`` the family is that of the noise schedule: Stable Diffusion 1.5 and SDXL share theirs, and are
    told apart by name only (``ays:model=sdxl``). ``fewstep.tuning`` finds levels for other models.
    """
    return resampled(np.array(align_your_steps.table(noise_schedule, model)), steps)


@spacing("gits", aliases={"GITSScheduler": "gits"}, reference="https://arxiv.org/abs/2405.11326")
def gits(
    noise_schedule: NoiseSchedule, steps: int, *, coefficient: Annotated[float, Range(0.8, 1.5)] = 1.2
) -> Array:
    """GITS: published levels for Stable Diffusion 1.5, one table for every number of steps up to 20.

    ``coefficient`` is the growth of their dynamic programming, 0.80 to 1.50 in steps of 0.05; ComfyUI's default is
    1.20. More than 20 steps are resampled log-linearly from 20. Other models: ``fewstep.tuning.SEARCHES["gits"]``.
    """
    if align_your_steps.family(noise_schedule) != "sd15":
        raise ValueError(
            f"schedule 'gits' is published for Stable Diffusion 1.5 only, whose noisiest level is 14.61, "
            f"not {noise_schedule.level_max:.5g}"
        )
    paths = _gits_paths()
    key = f"{coefficient:.2f}"
    if key not in paths or abs(float(key) - coefficient) > 1e-9:
        raise ValueError(
            f"option 'coefficient' of schedule 'gits' must be 0.80, 0.85, ... 1.50, got {coefficient:g}"
        )
    rows = paths[key]
    row = rows[str(min(steps, 20))] if steps > 1 else [100, 0]
    levels = VP.scaled_linear().level(
        9.99 * np.array(row)
    )  # the authors' teacher has 100 steps over 999 indices
    return levels[:-1] if steps <= 20 else resampled(levels, steps)


@lru_cache(maxsize=1)
def _gits_paths() -> dict[str, dict[str, list[int]]]:
    return json.loads((DATA / "gits-sd15.json").read_text())["paths"]


@spacing(
    "optimal_steps",
    aliases={"OptimalStepsScheduler": "optimal_steps", "oss": "optimal_steps"},
    reference="https://arxiv.org/abs/2503.21774",
)
def optimal_steps(noise_schedule: NoiseSchedule, steps: int, *, model: OptimalStepsModel = "flux") -> Array:
    """Optimal steps: published levels for flow models (FLUX, Wan, Chroma), resampled log-linearly.

    The tables are those that ComfyUI ships, for 10, 20 and 40 steps; the last level is replaced by 0 in use. Other
    models: ``fewstep.tuning.SEARCHES["optimal_steps"]``.
    """
    if noise_schedule.frame != "flow":
        raise ValueError(
            f"schedule 'optimal_steps' is published for flow models ({', '.join(OPTIMAL_STEPS)}) only"
        )
    return resampled(np.array(OPTIMAL_STEPS[model]), steps)
