"""Which steps go without the network, and with which weights earlier predictions are continued (FSampler).

Numbers only: the transform ``skip`` of samplers makes a linear program of them, the guidance ``extrapolate`` uses them
while a run goes on. FSampler, https://github.com/obisin/ComfyUI-FSampler.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

UNIFORM = {2: (2.0, -1.0), 3: (3.0, -3.0, 1.0), 4: (4.0, -6.0, 4.0, -1.0)}
"""Weights of the newest predictions, newest first, that continue a polynomial in the number of the step."""


def parse_pattern(pattern: str, owner: str) -> tuple[int, int]:
    """``(order, interval)`` of ``hN/sK``; ``hN`` alone is ``hN/sN``. ValueError names the owner and what is allowed."""
    match = re.fullmatch(r"h([234])(?:/s([2-6]))?", pattern)
    order, interval = (int(g or match[1]) for g in match.groups()) if match else (1, 0)
    if interval < order:
        raise ValueError(
            f"option 'pattern' of {owner} must be h2/s2 to h2/s6, h3/s3 to h3/s6 or h4/s4 to h4/s6, got {pattern!r}"
        )
    return order, interval


def patterned_steps(steps: int, order: int, interval: int, protect_first: int, protect_last: int) -> set[int]:
    """One step after every ``interval`` others, none of the protected ones."""
    first, last = max(protect_first, order), steps - protect_last
    return {i for i in range(first, last) if (i - first) % (interval + 1) == interval}


def explicit_steps(steps: int, indices: Collection[int]) -> set[int]:
    """The named steps that may be skipped: not the first two, and only after two real steps since the start or a skip
    that did not follow another.
    """
    skipped: set[int] = set()
    real, needed = 0, 2  # real steps in a row, and how many a skip waits for
    for i in range(steps):
        if i in indices and i > 1 and (real >= needed or i - 1 in skipped):
            skipped.add(i)
            real = 0
        else:
            real += 1
    return skipped


def continuation(ratios: Sequence[float], ratio: float, sigma_aware: bool) -> tuple[float, ...]:
    """Weights of predictions at ``ratios`` (sigma / alpha, newest first) for the one at ``ratio``.

    ``sigma_aware`` is the polynomial in the ratio, otherwise that in the number of the step.
    """
    if not sigma_aware:
        return UNIFORM[len(ratios)]
    return tuple(
        math.prod((ratio - b) / (a - b) for k, b in enumerate(ratios) if k != j) for j, a in enumerate(ratios)
    )
