"""Spacings: which noise levels ``n`` steps visit. Each is a function ``(noise_schedule, steps, *, options) -> levels``.

A spacing returns the ``steps`` levels at which the network is evaluated, decreasing; a final 0 (no noise) is
appended by :func:`make_grid`. They are registered by name, and named as in the field:

=======================  ===============================================================
``index_spacings``       count in the training index, 0 (clean) to T - 1 (noise)
``level_spacings``       count in the noise level or a function of it
``published_spacings``   tables that others have found for a model
=======================  ===============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from .grid import TimeGrid
from .noise import Array, NoiseSchedule
from .spec import Option, bind, options_of, render, split, suggestion


@dataclass(frozen=True)
class Spacing:
    """A registered spacing: its name, the function, one line about it, other names and what they mean, source."""

    name: str
    function: Callable[..., Array]
    summary: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""

    @property
    def options(self) -> dict[str, Option]:
        """Keyword options of the function."""
        return options_of(self.function)


_SPACINGS: dict[str, Spacing] = {}
DEFAULT = "arctan"
"""What is used where nothing is said; docs/design.md has the measurements."""


def spacing(
    name: str, *, aliases: Mapping[str, str] | None = None, reference: str = ""
) -> Callable[..., Any]:
    """Register a spacing under ``name``; ``aliases`` are other libraries' names and the spec each of them means."""

    def register(function: Callable[..., Array]) -> Callable[..., Array]:
        summary = (function.__doc__ or "").strip().splitlines()[0]
        _SPACINGS[name] = Spacing(name, function, summary, aliases or {}, reference)
        return function

    return register


def schedules() -> Mapping[str, Spacing]:
    """All named spacings."""
    return MappingProxyType(_SPACINGS)


def schedule(spec: str) -> tuple[Spacing, dict[str, Any]]:
    """The spacing and options that ``"name:key=value,..."`` means; ValueError with the nearest name."""
    name, given = split(spec)
    aliases = {alias: meant for s in _SPACINGS.values() for alias, meant in s.aliases.items()}
    name, implied = split(aliases.get(name, name))
    found = _SPACINGS.get(name)
    if found is None:
        allowed = [*_SPACINGS, *aliases]
        raise ValueError(f"no schedule {name!r}; allowed: {', '.join(_SPACINGS)}{suggestion(name, allowed)}")
    return found, bind(found.options, implied | given, f"schedule {found.name!r}")


def make_grid(
    noise_schedule: NoiseSchedule, steps: int, schedule_spec: str = DEFAULT, *, final_zero: bool = True
) -> TimeGrid:
    """A grid of ``steps`` intervals on a noise schedule, by a named spacing.

    With ``final_zero`` (default) the network is evaluated at the spacing's ``steps`` levels and the last step goes
    to no noise; without, the spacing's ``steps + 1`` levels are the nodes and the result keeps the last level's noise.

    Raises ValueError for fewer than one step, an unknown spacing or option, and levels that are not decreasing.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    key = (noise_schedule.key, int(steps), schedule_spec, final_zero)
    grid = _GRIDS.get(key)
    if grid is None:
        found, options = schedule(schedule_spec)
        levels = found.function(noise_schedule, int(steps) + (not final_zero), **options)
        try:
            grid = TimeGrid.from_levels(noise_schedule, np.append(levels, 0.0) if final_zero else levels)
        except ValueError as error:
            raise ValueError(
                f"schedule {render(found.name, options)!r} with {steps} steps: {error}"
            ) from None
        while len(_GRIDS) >= 256:
            _GRIDS.pop(next(iter(_GRIDS)), None)
        _GRIDS[key] = grid
    return grid


_GRIDS: dict[tuple, TimeGrid] = {}
"""Grids are immutable; a host asks for the same ones again and again."""
