"""Truths about the numbers of a report: closed forms, other implementations, coverage of the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fewstep.eval import metrics
from fewstep.eval.metrics import Moments


def moments(mean: np.ndarray, covariance: np.ndarray, count: int = 1000) -> Moments:
    return Moments(count, np.asarray(mean, float), np.asarray(covariance, float))


def test_rms_distance_is_per_element_and_per_sample() -> None:
    x = np.zeros((2, 1, 4, 4))
    y = np.stack([np.full((1, 4, 4), 0.5), np.full((1, 4, 4), -2.0)])
    assert metrics.rms_distance(x, y) == pytest.approx([0.5, 2.0])
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        metrics.rms_distance(np.zeros((2, 3)), np.zeros((2, 4)))


def test_distance_of_diagonal_gaussians_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    m1, m2 = rng.normal(size=(2, 6))
    v1, v2 = rng.uniform(0.2, 3.0, size=(2, 6))
    expected = np.sum((m1 - m2) ** 2) + np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2)
    assert metrics.frechet(moments(m1, np.diag(v1)), moments(m2, np.diag(v2))) == pytest.approx(
        expected, rel=1e-12
    )


def test_distance_of_general_gaussians_agrees_with_a_matrix_root() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(8, 8)) for _ in range(2))
    s1, s2 = a @ a.T + np.eye(8), b @ b.T + np.eye(8)
    m = rng.normal(size=8)
    expected = m @ m + np.trace(s1 + s2 - 2.0 * np.real(sqrtm(s1 @ s2)))
    assert metrics.frechet(moments(m, s1), moments(np.zeros(8), s2)) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(moments(m, s1), moments(m, s1)) == pytest.approx(0.0, abs=1e-9)


def test_singular_covariances_stay_finite() -> None:
    """Fewer samples than features: the covariance has zero eigenvalues, where a general matrix root goes complex."""
    f = np.random.default_rng(2).normal(size=(10, 64))
    value = metrics.frechet(Moments.of(f), Moments.of(f + 1.0))
    assert value == pytest.approx(64.0, rel=1e-6)
    assert metrics.rank_deficient(10, 64) is not None and "10 samples" in str(metrics.rank_deficient(10, 64))
    assert metrics.rank_deficient(65, 64) is None


def test_moments_refuse_what_is_no_table_of_features() -> None:
    with pytest.raises(ValueError, match="features have shape"):
        Moments.of(np.zeros(64))
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(np.full((3, 2), math.nan))


def test_agrees_with_torchmetrics() -> None:
    """FrechetInceptionDistance with our own features computes the same number (it returns float32 of features)."""
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("torchmetrics.image.fid")

    class Flat(torch.nn.Module):
        num_features = 16

        def forward(self, x: object) -> object:
            return x.flatten(1).double()  # type: ignore[attr-defined]

    generator = torch.Generator().manual_seed(3)
    real = torch.randn(200, 1, 4, 4, generator=generator, dtype=torch.float64)
    fake = 1.3 * torch.randn(150, 1, 4, 4, generator=generator, dtype=torch.float64) + 0.2
    fid = image.FrechetInceptionDistance(feature=Flat())
    fid.set_dtype(torch.float64)
    fid.update(real, real=True)
    fid.update(fake, real=False)
    ours = metrics.frechet(Moments.of(fake.flatten(1).numpy()), Moments.of(real.flatten(1).numpy()))
    assert ours == pytest.approx(float(fid.compute()), rel=1e-6)


def test_jackknife_is_leaving_groups_out() -> None:
    """The fast update of the sums gives what recomputing without the group gives."""
    rng = np.random.default_rng(4)
    f, reference = rng.normal(size=(60, 5)), Moments.of(rng.normal(size=(500, 5)))
    groups = 10
    estimate = metrics.frechet_interval(metrics.jackknife(f, reference, groups))
    parts = np.array(
        [
            metrics.frechet(Moments.of(np.delete(f, np.s_[6 * j : 6 * j + 6], axis=0)), reference)
            for j in range(groups)
        ]
    )
    s = math.sqrt((groups - 1) / groups * np.sum((parts - np.mean(parts)) ** 2))
    assert math.isnan(metrics.frechet_interval(metrics.jackknife(f[:19], reference, groups)).low)  # too few
    assert estimate.value == pytest.approx(metrics.frechet(Moments.of(f), reference))
    assert estimate.high - estimate.value == pytest.approx(2.2621572 * s, rel=1e-6)  # t(9) at 97.5 %


def test_excess_over_itself_is_exactly_zero() -> None:
    rng = np.random.default_rng(5)
    f, reference = rng.normal(size=(100, 4)), Moments.of(rng.normal(size=(300, 4)))
    sampled = metrics.jackknife(f, reference)
    assert metrics.frechet_interval(sampled, sampled) == (0.0, 0.0, 0.0)


def coverage(interval, truth: float, draws: int) -> float:
    return float(np.mean([low <= truth <= high for _, low, high in (interval(i) for i in range(draws))]))


def test_mean_interval_covers_the_mean() -> None:
    rng = np.random.default_rng(6)
    data = rng.exponential(size=(2000, 40)) ** 0.5
    truth = math.gamma(1.5)
    assert 0.93 < coverage(lambda i: metrics.mean_interval(data[i]), truth, 2000) < 0.97


def test_median_interval_covers_the_median() -> None:
    data = np.random.default_rng(7).exponential(size=(1500, 40))
    assert 0.94 < coverage(lambda i: metrics.median_interval(data[i]), math.log(2.0), 1500) <= 1.0
    assert metrics.median_interval([1.0, 2.0, 4.0]).value == 2.0
    assert math.isnan(metrics.median_interval([1.0, 2.0, 4.0]).low)  # too few for 95 %


def test_share_interval_covers_the_share() -> None:
    hits = np.random.default_rng(8).binomial(60, 0.95, size=2000)
    assert 0.92 < coverage(lambda i: metrics.share_interval(int(hits[i]), 60), 0.95, 2000) < 1.0
    assert metrics.share_interval(60, 60).high == pytest.approx(1.0)


def interval(features: np.ndarray, reference: Moments) -> metrics.Estimate:
    return metrics.frechet_interval(metrics.jackknife(features, reference))


def test_frechet_interval_covers_its_expectation() -> None:
    """The expectation at this number of samples, bias included: that is what two solvers are compared at."""
    rng = np.random.default_rng(9)
    reference = moments(np.zeros(6), np.eye(6))
    draws = [interval(1.2 * rng.normal(size=(150, 6)) + 0.3, reference) for _ in range(300)]
    expectation = float(np.mean([d.value for d in draws]))
    assert 0.90 < np.mean([d.low <= expectation <= d.high for d in draws]) <= 0.99


def test_frechet_interval_is_not_misled_by_classes_in_turn() -> None:
    """Indices cycle through the classes; groups that each held one class would look like an enormous spread."""
    rng = np.random.default_rng(10)
    classes = 4.0 * rng.normal(size=(10, 6))
    reference = Moments.of(classes[np.arange(4000) % 10] + rng.normal(size=(4000, 6)))
    draws = [interval(classes[np.arange(200) % 10] + rng.normal(size=(200, 6)), reference) for _ in range(60)]
    spread = np.std([d.value for d in draws])
    half = np.median([(d.high - d.low) / 2 for d in draws])
    assert half < 5.0 * spread


def test_images_are_quantised_as_stored() -> None:
    x = np.array([-3.0, -1.0, 0.0, 0.999, 1.0, 2.0])
    assert metrics.to_uint8(x).tolist() == [0, 0, 128, 255, 255, 255]
    assert metrics.to_uint8(x).dtype == np.uint8


def test_estimates_become_json_without_nan() -> None:
    assert metrics.Estimate(1.0, math.nan, 2.0).to_json() == {"value": 1.0, "low": None, "high": 2.0}
    assert metrics.mean_interval([]).to_json()["value"] is None
