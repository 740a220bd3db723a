"""How to sample one model best: fits levels and coefficients to its converged trajectories, and writes recipes."""

from .fit import Family, error, gauss_newton, ridge
from .recipe import Recipe, load, schedule_digest
from .table import Table, table_of
from .teacher import Source, Trajectories, solve
from .tune import Outcome, tune

__all__ = [
    "Family",
    "Outcome",
    "Recipe",
    "Source",
    "Table",
    "Trajectories",
    "error",
    "gauss_newton",
    "load",
    "ridge",
    "schedule_digest",
    "solve",
    "table_of",
    "tune",
]
