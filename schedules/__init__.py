"""Where to evaluate: noise schedules, parametrisations, time grids and spacings (numpy only)."""

from . import index_spacings, level_spacings, published_spacings  # noqa: F401  (they register themselves)
from .diffusers_config import from_diffusers, prediction_of
from .grid import Node, TimeGrid
from .noise import EDM, VP, Flow, NoiseSchedule, Table, VPContinuous
from .parametrization import PREDICTIONS, conversion
from .spacing import Spacing, make_grid, schedule, schedules

__all__ = [
    "EDM",
    "PREDICTIONS",
    "VP",
    "Flow",
    "Node",
    "NoiseSchedule",
    "Spacing",
    "Table",
    "TimeGrid",
    "VPContinuous",
    "conversion",
    "from_diffusers",
    "make_grid",
    "prediction_of",
    "schedule",
    "schedules",
]
