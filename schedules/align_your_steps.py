"""Align Your Steps: optimised noise levels, published for four model families.

Sabour, Fidler, Kreis, "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models",
https://arxiv.org/abs/2404.14507. The tables hold the 11 levels of 10 steps; the last is where the authors stop and
is replaced by 0 in use. Other counts are interpolated linearly in the logarithm of the level over the index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from .noise import NoiseSchedule

Model = Literal["sd15", "sdxl", "svd", "deepfloyd"]

TABLES: dict[Model, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
}
TRAINED: dict[Model, float] = {"sd15": 14.6146, "svd": 700.0, "deepfloyd": 20291.2}
"""The noisiest trained level of a family; DeepFloyd's cosine schedule ends far above the authors' start."""


def table(noise_schedule: NoiseSchedule, model: Model | None = None) -> tuple[float, ...]:
    """The table of a model family; without a name, of the one that was trained on this range of levels.

    Raises ValueError, naming the families, if there is none.
    """
    found = model or family(noise_schedule)
    if found is None or noise_schedule.frame == "flow":
        kind = (
            "a flow model"
            if noise_schedule.frame == "flow"
            else f"levels up to {noise_schedule.level_max:.5g}"
        )
        known = ", ".join(TABLES)
        hint = "" if noise_schedule.frame == "flow" else "; ays:model=NAME takes one of them anyway"
        raise ValueError(f"Align Your Steps has no published levels for {kind}; known: {known}{hint}")
    return TABLES[found]


def family(noise_schedule: NoiseSchedule, config: Mapping[str, Any] | None = None) -> Model | None:
    """The family that a noise schedule belongs to, or None.

    Stable Diffusion 1.x, 2.x and SDXL have one noise schedule. What tells SDXL apart in a diffusers ``config`` is how
    its repositories ship it, for Euler's scheduler with leading timesteps; without a config it is ``sd15``.
    """
    if noise_schedule.frame == "flow":
        return None
    for name, top in TRAINED.items():
        if math.isclose(noise_schedule.level_max, top, rel_tol=1e-3):
            return "sdxl" if name == "sd15" and _is_sdxl(config or {}) else name
    return None


def _is_sdxl(config: Mapping[str, Any]) -> bool:
    return config.get("timestep_spacing") == "leading" and "interpolation_type" in config
