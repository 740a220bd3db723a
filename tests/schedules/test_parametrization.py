from __future__ import annotations

import itertools

import numpy as np
import pytest

from fewstep.schedules import PREDICTIONS, VP, Node, conversion, from_diffusers, prediction_of

NODES = [Node(0.5, 0.8, 0.6), Node(0.3, 0.7, 0.3), Node(5.0, 1.0, 5.0), Node(1.0, 0.0, 1.0)]


def values(node: Node, x0: float = 0.7, eps: float = -1.3) -> dict[str, float]:
    """Every prediction from its definition."""
    a, s = node.alpha, node.sigma
    return {"x": a * x0 + s * eps, "epsilon": eps, "denoised": x0, "v": a * eps - s * x0, "flow": eps - x0}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
@pytest.mark.parametrize("node", NODES)
def test_converts_by_definition(source, target, node):
    if node.alpha == 0.0 and source == "epsilon" and target != "epsilon":
        with pytest.raises(ValueError, match="says nothing about the data"):
            conversion(source, target, node)
        return
    v = values(node)
    c_x, c_m = conversion(source, target, node)
    np.testing.assert_allclose(c_x * v["x"] + c_m * v[source], v[target], rtol=1e-12)


def test_a_denoised_prediction_without_noise_is_refused():
    with pytest.raises(ValueError, match="says nothing about the noise"):
        conversion("denoised", "epsilon", Node(0.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("config", "frame", "prediction"),
    [
        ({"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012}, "vp", "epsilon"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "vp", "v"),
        ({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}, "vp", "denoised"),
        ({"trained_betas": [1e-4, 0.01, 0.02]}, "vp", "epsilon"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow", "flow"),
        ({"shift": 3.0, "num_train_timesteps": 1000}, "flow", "flow"),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}, "flow", "flow"),
        ({"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}, "edm", "denoised"),
    ],
)
def test_reads_a_diffusers_config(config, frame, prediction):
    assert from_diffusers(config).frame == frame
    assert prediction_of(config) == prediction


def test_reads_shifts_and_zero_snr():
    assert from_diffusers({"shift": 3.0}).shift == 3.0  # type: ignore[attr-defined]
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True}
    np.testing.assert_allclose(from_diffusers(dynamic, mu=0.8).shift, np.exp(0.8))  # type: ignore[attr-defined]
    zero = from_diffusers({"beta_schedule": "linear", "rescale_betas_zero_snr": True})
    assert isinstance(zero, VP) and np.isinf(zero.level_max)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"beta_schedule": "linaer"}, "did you mean 'linear'"),
        ({"prediction_type": "epsilom"}, "did you mean 'epsilon'"),
    ],
)
def test_names_what_a_config_may_say(config, words):
    with pytest.raises(ValueError, match=words):
        from_diffusers(config)
