"""Numbers that judge a sampler, each with its interval, in float64.

Every function takes per-sample arrays (first axis: the sample) and is free of any model, file or network, so the
same numbers come out of a fresh run, of a resumed one and of ``fewstep report``.

====================  =============================================================================================
``rms_distance``      d_i = sqrt(mean over elements of (x_i - y_i)^2): distance of one sample to the converged
                      solution from the same start noise, in the unit of the data
``mean_interval``     mean of d_i with the interval of Student's t
``median_interval``   median of d_i with the exact interval from order statistics
``frechet``           |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) between two Gaussians
``jackknife``         the same from features, with its delete-a-group replicates
``frechet_interval``  distance, or excess over a floor, with the interval of the jackknife
``share_interval``    share of successes with Wilson's interval
====================  =============================================================================================

All intervals are two-sided at 95 % unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
"""Confidence level of every interval in the reports."""


class Estimate(NamedTuple):
    """A value and the ends of its confidence interval. An end is NaN where the interval cannot be computed."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Plain dictionary; NaN becomes null, as JSON has no NaN."""
        return {k: (float(v) if math.isfinite(v) else None) for k, v in self._asdict().items()}


@dataclass(frozen=True)
class Metric:
    """What one number is: shown by ``fewstep list metrics`` and written into the report's notes."""

    name: str
    label: str
    unit: str
    better: str
    meaning: str


METRICS: tuple[Metric, ...] = (
    Metric(
        "rms",
        "RMS distance",
        "data units (images span -1 to 1)",
        "lower",
        "Root mean square difference per element between a sample and the converged solution of the same "
        "model from the same start noise; mean over the samples, 95 % t interval. Measures the solver alone: "
        "no feature network, no reference data.",
    ),
    Metric(
        "rms_median",
        "median RMS distance",
        "data units",
        "lower",
        "Median over the samples of the same distance; interval from order statistics. Differs from the mean "
        "where a few samples ended in another mode of the data.",
    ),
    Metric(
        "frechet",
        "Fréchet distance",
        "squared feature units",
        "lower",
        "Fréchet distance between Gaussians fitted to the features of samples and of reference images, in the "
        "64 features of the bundled classifier. Not comparable with any published FID. Read it against its floor: the "
        "same distance for the converged samples. 95 % delete-a-group jackknife interval.",
    ),
    Metric(
        "frechet_excess",
        "Fréchet above floor",
        "squared feature units",
        "lower",
        "Fréchet distance minus its floor on the same indices, so that most of the sampling noise cancels. Below "
        "zero is possible: a solver's error can move the samples towards the reference.",
    ),
    Metric(
        "agreement",
        "label agreement",
        "share of samples",
        "higher",
        "Share of samples that the bundled classifier assigns to the label they were drawn for (conditional "
        "models only); Wilson's 95 % interval.",
    ),
    Metric(
        "precision",
        "precision",
        "share of samples",
        "higher",
        "Share of samples that lie among the reference images: within the third-nearest-neighbour distance of one of "
        "them, in the features of the classifier. Wilson's 95 % interval with the reference held fixed.",
    ),
    Metric(
        "recall",
        "recall",
        "share of reference images",
        "higher",
        "Share of reference images that lie among the samples, likewise: how much of the data the samples reach. "
        "Depends on the number of samples. Wilson's 95 % interval with the samples held fixed.",
    ),
    Metric(
        "diversity",
        "diversity",
        "spread within a class, data = 1",
        "higher",
        "Root mean square distance of a sample's features to the mean of its class (of all, without classes), divided "
        "by the same of the reference images. Guidance lowers it; errors of a solver can raise it above 1. 95 % "
        "delete-a-group jackknife interval.",
    ),
    Metric(
        "ms_per_sample",
        "time per sample",
        "milliseconds",
        "lower",
        "Wall time of sampling divided by the samples, on one process and the threads named in run.json, without "
        "warm-up; median over the chunks.",
    ),
    Metric(
        "nfe",
        "NFE",
        "network evaluations per sample",
        "lower",
        "One sample through one network once, counted at the network. A guided evaluation is two. Where the samples "
        "decide (adaptive guidance) the mean over them.",
    ),
)


def rms_distance(samples: ArrayLike, reference: ArrayLike) -> Array:
    """Distance of every sample to its reference, sqrt(mean((x - y)^2)) over all axes but the first.

    Args:
        samples: shape (n, ...).
        reference: the same shape; row i belongs to row i.

    Returns:
        float64 array of shape (n,).
    """
    x, y = np.asarray(samples, np.float64), np.asarray(reference, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"samples have shape {x.shape}, the reference has {y.shape}")
    return np.sqrt(np.mean(np.square(x - y).reshape(len(x), -1), axis=1))


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Estimate:
    """Mean with the interval of Student's t, mean +- t_(n-1) s / sqrt(n).

    Of differences between two runs on the same indices this is the paired interval.
    """
    v = np.asarray(values, np.float64).ravel()
    if v.size == 0:
        return Estimate(math.nan, math.nan, math.nan)
    mean = float(v.mean())
    if v.size == 1:
        return Estimate(mean, math.nan, math.nan)
    half = _student(v.size - 1, level) * float(v.std(ddof=1)) / math.sqrt(v.size)
    return Estimate(mean, mean - half, mean + half)


def median_interval(values: ArrayLike, level: float = LEVEL) -> Estimate:
    """Median with the distribution-free interval between two order statistics (binomial, coverage >= level)."""
    from scipy.special import bdtr

    v = np.sort(np.asarray(values, np.float64).ravel())
    if v.size == 0:
        return Estimate(math.nan, math.nan, math.nan)
    rank = int(np.sum(bdtr(np.arange(v.size // 2 + 1), v.size, 0.5) <= (1 - level) / 2))
    if rank == 0:  # fewer than 6 samples: no pair of order statistics reaches the level
        return Estimate(float(np.median(v)), math.nan, math.nan)
    return Estimate(float(np.median(v)), float(v[rank - 1]), float(v[v.size - rank]))


def share_interval(successes: int, total: int, level: float = LEVEL) -> Estimate:
    """Share successes / total with Wilson's score interval, which behaves at shares near 0 and 1."""
    if total == 0:
        return Estimate(math.nan, math.nan, math.nan)
    from scipy.special import ndtri

    z = float(ndtri(0.5 + level / 2))
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True)
class Moments:
    """Count, mean (d,) and covariance (d, d) with denominator count - 1 of a set of features, in float64."""

    count: int
    mean: Array
    covariance: Array

    @classmethod
    def of(cls, features: ArrayLike) -> Moments:
        """Moments of features of shape (n, d), n >= 2. A shape that is not 2-D is refused: a flattened feature
        tensor has a covariance too, only not the one meant.
        """
        f = np.asarray(features, np.float64)
        if f.ndim != 2 or len(f) < 2:
            raise ValueError(f"features have shape {f.shape}; needed: (samples >= 2, features)")
        if not np.isfinite(f).all():
            raise ValueError("features contain NaN or infinity")
        mean = f.mean(axis=0)
        centred = f - mean
        return cls(len(f), mean, centred.T @ centred / (len(f) - 1))

    @cached_property
    def root(self) -> Array:
        """Symmetric root of the covariance; negative eigenvalues are rounding and set to 0."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def frechet(a: Moments, b: Moments) -> float:
    """Fréchet (2-Wasserstein) distance squared between the Gaussians with these moments.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 sum sqrt(max(0, eig(S2^1/2 S1 S2^1/2))). The product is symmetric, so its
    eigenvalues come from ``eigvalsh``; a general matrix root of S1 S2 would return complex rubbish where a
    covariance is nearly singular. Dowson and Landau, "The Frechet distance between multivariate normal
    distributions", 1982.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features have dimensions {a.mean.shape[0]} and {b.mean.shape[0]}; they must agree")
    eig = np.linalg.eigvalsh(b.root @ a.covariance @ b.root)
    cross = float(np.sqrt(np.clip(eig, 0.0, None)).sum())
    value = float(np.sum((a.mean - b.mean) ** 2)) + float(np.trace(a.covariance) + np.trace(b.covariance))
    return max(0.0, value - 2.0 * cross)


class Jackknife(NamedTuple):
    """A number, and the same without each group of samples in turn (None for too few samples)."""

    value: float
    parts: Array | None


def jackknife(features: ArrayLike, reference: Moments, groups: int = 20) -> Jackknife:
    """The Fréchet distance of features (n, d) to a reference, with its delete-a-group replicates.

    A group is a run of neighbouring indices, so that it holds all classes where labels cycle with the index.
    n < 2 ``groups`` gives no replicates. Sums are taken once and a group's are subtracted.
    """
    f = np.asarray(features, np.float64)
    whole = Moments.of(f)
    value = frechet(whole, reference)
    n = len(f)
    if n < 2 * groups:
        return Jackknife(value, None)
    centred = f - whole.mean
    square = whole.covariance * (n - 1)
    parts = np.empty(groups)
    for j, group in enumerate(np.array_split(centred, groups)):
        left = n - len(group)
        shift = -group.sum(axis=0) / left  # mean of the rows left, relative to the mean of all
        covariance = (square - group.T @ group - left * np.outer(shift, shift)) / (left - 1)
        parts[j] = frechet(Moments(left, whole.mean + shift, covariance), reference)
    return Jackknife(value, parts)


def without_groups(statistic: Callable[[NDArray[np.intp]], float], count: int, groups: int = 20) -> Jackknife:
    """A statistic of the rows with given indices, with its delete-a-group replicates; groups as for ``jackknife``."""
    rows = np.arange(count)
    value = statistic(rows)
    if count < 2 * groups:
        return Jackknife(value, None)
    parts = np.array_split(rows, groups)
    return Jackknife(value, np.array([statistic(np.setdiff1d(rows, p, assume_unique=True)) for p in parts]))


def frechet_interval(sampled: Jackknife, floor: Jackknife | None = None, level: float = LEVEL) -> Estimate:
    """A Fréchet distance with the interval of the delete-a-group jackknife; with a ``floor``, its excess over it.

    s^2 = (g-1)/g sum (f_(j) - mean f_(.))^2, value +- t_(g-1) s. The excess is paired: both must be of the same
    indices. The usual bootstrap is not used, because a resample repeats samples and its covariance is that of a smaller
    set: the distance is biased upwards by as much again as its floor, and the percentile interval does not even
    contain the value.
    """
    value, parts = sampled
    if floor is not None:
        value -= floor.value
        parts = None if parts is None or floor.parts is None else parts - floor.parts
    if parts is None:
        return Estimate(value, math.nan, math.nan)
    g = len(parts)
    half = _student(g - 1, level) * math.sqrt((g - 1) / g * float(np.sum((parts - parts.mean()) ** 2)))
    return Estimate(value, value - half, value + half)


def _student(freedom: int, level: float) -> float:
    from scipy.special import stdtrit  # scipy.stats costs half a second to import

    return float(stdtrit(freedom, 0.5 + level / 2))


def to_uint8(samples: ArrayLike) -> NDArray[np.uint8]:
    """Images as they would be stored: clip(x * 127.5 + 128, 0, 255), truncated. Features are taken of these, so a score
    from tensors and one from saved PNG files agree exactly.

    Args:
        samples: any shape, values of the data range [-1, 1].
    """
    return np.clip(np.asarray(samples, np.float64) * 127.5 + 128.0, 0.0, 255.0).astype(np.uint8)


def rank_deficient(samples: int, dimension: int) -> str | None:
    """A warning where ``samples`` are too few for the covariance of ``dimension`` features, else None."""
    if samples > dimension:
        return None
    return (
        f"{samples} samples are too few for the covariance of {dimension} features (rank {max(samples - 1, 0)}): the "
        f"Fréchet distance is dominated by its bias; use more than {dimension}, better {8 * dimension}"
    )
