"""The converged solution: where each start noise leads when the probability-flow ODE is solved to the end.

It is the same network, the same guidance and the same noise, run by a high-order solver with many steps down to the
cleanest level that the model was trained at, and by one step (DDIM) from there to no noise. Below that level a model is
given a time it does not mean, so going further would not be nearer to anything.

A second run with half as many steps on part of the samples gives the distance between the two resolutions: no number
of the table is meaningful below it. For a converging method it is an upper bound of the reference's own error (about
2^p - 1 times it at order p).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..samplers import compile
from ..schedules import make_grid
from .guiding import converged
from .store import digest
from .targets import Target

SOLVER = "unipc:order=3"
SCHEDULE = "karras"
STEPS = 200
CHECKED = 100
"""Samples on which the second resolution is run."""


@dataclass(frozen=True)
class Reference:
    """How the converged solution is computed, and the keys of its chunks and of those of the second resolution."""

    solver: str
    schedule: str
    steps: int
    key: str
    check_key: str
    guidance: float | str | None = None

    @property
    def check_steps(self) -> int:
        return self.steps // 2


def plan(target: Target, base: Mapping[str, Any], steps: int = STEPS) -> Reference:
    """The reference of a model; ``base`` is what else decides the samples (guidance, seed, device).

    Its guidance is without methods that leave evaluations out or draw noise, so that several may have one reference.
    """
    guidance = converged(base["guidance"])
    base, keys = {**base, "guidance": guidance}, []
    for count in (steps, steps // 2):
        program = compile(SOLVER, make_grid(target.noise_schedule, count, SCHEDULE))
        content = hashlib.sha256(program.to_json().encode()).hexdigest()
        keys.append(digest({**base, "reference": content}))
    return Reference(SOLVER, SCHEDULE, steps, keys[0], keys[1], guidance)
