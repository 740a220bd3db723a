"""How to sample one model best: fits levels and coefficients to its converged trajectories, and writes recipes."""

from .fit import Family, error, gauss_newton, ridge
from .recipe import Recipe, load, schedule_digest
from .searches import SEARCHES, search
from .spectra import power_law, spectrum_of
from .spectrum import from_spectrum, spectrum_error
from .table import Table, table_of
from .teacher import Source, Trajectories, solve
from .tune import Outcome, tune

__all__ = [
    "SEARCHES",
    "Family",
    "Outcome",
    "Recipe",
    "Source",
    "Table",
    "Trajectories",
    "error",
    "from_spectrum",
    "gauss_newton",
    "load",
    "power_law",
    "ridge",
    "schedule_digest",
    "search",
    "solve",
    "spectrum_error",
    "spectrum_of",
    "table_of",
    "tune",
]
