"""Align Your Steps: optimised noise levels, published for five model families.

Sabour, Fidler, Kreis, "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models",
https://arxiv.org/abs/2404.14507. The tables hold the 11 levels of 10 steps; the last is where the authors stop and
is replaced by 0 in use. Other counts are interpolated linearly in the logarithm of the level over the index.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .noise import Array

Model = Literal["sd15", "sdxl", "svd", "deepfloyd"]

TABLES: dict[Model, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
}


def levels(model: Model, steps: int) -> Array:
    """The ``steps`` evaluation levels of a model family, decreasing; shape (steps,)."""
    table = np.log(TABLES[model])
    return np.exp(np.interp(np.linspace(0.0, 1.0, steps + 1), np.linspace(0.0, 1.0, len(table)), table))[:-1]
