"""Fidelity and variety of samples, apart: precision, recall and spread in a feature space.

Features are arrays (n, d), one row a sample. Precision and recall are those of Kynkaanniemi et al., "Improved
Precision and Recall Metric for Assessing Generative Models", https://arxiv.org/abs/1904.06991: a set's manifold is the
union of the balls around its members that reach to their k-th nearest neighbour in the set. Both depend on the number
of samples, so only equal numbers can be compared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

NEIGHBOURS = 3
"""k of the published figures."""


def squared_distances(a: ArrayLike, b: ArrayLike) -> Array:
    """|a_i - b_j|^2, shape (len(a), len(b)), float64."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.maximum((x * x).sum(1)[:, None] + (y * y).sum(1) - 2.0 * x @ y.T, 0.0)


def radii(features: ArrayLike, k: int = NEIGHBOURS) -> Array:
    """Squared distance of every member to its k-th nearest other one, shape (n,); needs n > k."""
    own = squared_distances(features, features)
    np.fill_diagonal(own, 0.0)
    return np.partition(own, k, axis=1)[:, k]  # the nearest is the member itself


def precision_recall(
    samples: ArrayLike, reference: ArrayLike, k: int = NEIGHBOURS, reach: Array | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each sample whether it lies in the manifold of the reference, for each reference whether it lies in that of
    the samples; the means are precision and recall. ``reach``: the radii of the reference, if they are known.
    """
    distances = squared_distances(samples, reference)
    inside = distances <= (radii(reference, k) if reach is None else reach)
    reached = distances <= radii(samples, k)[:, None]
    return np.any(inside, axis=1), np.any(reached, axis=0)


def spread(features: ArrayLike, labels: ArrayLike | None = None) -> float:
    """Root of the mean squared distance of a row to the mean of its class (of all without labels), n - 1 weighted.

    That is 1 / sqrt(2) of the rms distance of two samples of one class.
    """
    f = np.asarray(features, np.float64)
    f = f - f.mean(0)
    _, group = np.unique(np.zeros(len(f)) if labels is None else np.asarray(labels), return_inverse=True)
    member = (group == np.arange(group.max() + 1)[:, None]).astype(np.float64)  # (classes, n)
    sums, counts = member @ f, member.sum(1)
    freedom = len(f) - len(counts)
    total = float((f * f).sum() - ((sums * sums).sum(1) / counts).sum())
    return (max(total, 0.0) / freedom) ** 0.5 if freedom else float("nan")
