from __future__ import annotations

import numpy as np
import pytest

from fewstep.schedules import EDM, VP, Flow, Table, Trigonometric, VPContinuous

ALL = [
    VP.linear(),
    VP.scaled_linear(),
    VP.cosine(),
    VP.trained(np.linspace(1e-4, 0.05, 200)),
    VP.scaled_linear(zero_terminal_snr=True),
    VPContinuous(),
    Trigonometric(),
    EDM(),
    Flow(),
    Flow(3.0),
    Table((0.0, 1.0, 2.0), (0.01, 1.0, 50.0)),
    Table((0.0, 5.0), (0.1, 0.9), "flow"),
]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_time_and_level_are_inverse(schedule):
    levels = schedule.train_levels[np.isfinite(schedule.train_levels)]
    inner = np.geomspace(levels[0] * 1.001, levels[-1] * 0.999, 50)
    np.testing.assert_allclose(schedule.level(schedule.time(inner)), inner, rtol=1e-9)
    assert np.all(np.diff(schedule.time(inner)) > 0)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_the_frame_says_how_the_state_is_scaled(schedule):
    alpha, sigma = schedule.alpha_sigma_at(np.array([0.0, *schedule.train_levels[[0, -1]]]))
    total = {"vp": alpha**2 + sigma**2, "edm": alpha, "flow": alpha + sigma}[schedule.frame]
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)
    assert sigma[0] == 0.0 and alpha[0] == 1.0


@pytest.mark.parametrize("name", ["sd15", "linear", "cosine", "sd15_zsnr"])
def test_alphas_cumprod_are_those_of_diffusers(golden, name):
    ours = {
        "sd15": VP.scaled_linear(),
        "linear": VP.linear(),
        "cosine": VP.cosine(),
        "sd15_zsnr": VP.scaled_linear(zero_terminal_snr=True),
    }[name].alphas_cumprod
    # fp32 products of a thousand factors there, fp64 here
    np.testing.assert_allclose(
        ours, golden.case("schedules_diffusers_core")[f"acp__{name}"], rtol=3e-4, atol=2e-7
    )


def test_zero_terminal_snr_has_no_signal_at_the_end_and_is_continuous():
    schedule = VP.scaled_linear(zero_terminal_snr=True)
    alpha, sigma = schedule.alpha_sigma(999)
    assert (float(alpha), float(sigma)) == (0.0, 1.0)
    near, _ = schedule.alpha_sigma(np.array([998.0, 998.5, 998.999]))
    assert np.all(np.diff(near) < 0) and near[-1] < 1e-5
    np.testing.assert_allclose(schedule.time(schedule.level(np.array([998.5, 999.0]))), [998.5, 999.0])


def test_between_indices_the_log_level_is_linear():
    schedule = VP.linear()
    a, b = schedule.level(np.array([500.0, 501.0]))
    np.testing.assert_allclose(schedule.level(500.25), a**0.75 * b**0.25, rtol=1e-12)


def test_flow_shift_and_dynamic_shift():
    np.testing.assert_allclose(Flow(3.0).shifted(0.5), 0.75)
    np.testing.assert_allclose(Flow.dynamic(256).shift, np.exp(0.5))
    np.testing.assert_allclose(Flow.dynamic(4096).shift, np.exp(1.15))
    assert Flow(3.0).level(0.3) == 0.3  # the shift moves spacings, not the meaning of t


def test_level_at_ratio():
    np.testing.assert_allclose(Flow().level_at_ratio(np.array([0.0, 1.0, np.inf])), [0.0, 0.5, 1.0])
    np.testing.assert_allclose(VP.linear().level_at_ratio(np.array([0.0, 3.0])), [0.0, 3.0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VP.trained([0.1]), "at least 2"),
        (lambda: VP.trained([0.1, 1.2]), r"\[0, 1\)"),
        (lambda: EDM(1.0, 0.5), "sigma_min"),
        (lambda: Flow(0.0), "shift"),
        (lambda: Table((0.0, 1.0), (1.0, 0.5)), "ascending"),
        (lambda: Table((0.0, 1.0, 2.0), (0.5, 1.0)), "same length"),
        (lambda: Table((0.0, 1.0), (0.5, 1.0), "ve"), "'edm'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_parameters_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
