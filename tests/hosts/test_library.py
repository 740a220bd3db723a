"""``fs.sample``: what it computes, and every mistake refused before the network is called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep.schedules import EDM, VP, Flow, VPContinuous, make_grid


def gaussian(schedule, prediction: Any = "denoised", variance=0.25, **kwargs) -> fs.Denoiser:
    """The exact denoiser of N(0, variance): everything about it is known in closed form."""

    def network(x, t):
        a, s = (
            torch.from_numpy(np.asarray(c)).to(x.dtype)[:, None]
            for c in schedule.alpha_sigma(t.double().numpy())
        )
        d = a * variance * x / (a**2 * variance + s**2)
        if prediction == "denoised":
            return d
        eps = (x - a * d) / s
        return {"epsilon": eps, "v": a * eps - s * d, "flow": eps - d}[prediction]

    return fs.Denoiser(network, schedule, prediction, **kwargs)


def start(schedule, n=64) -> torch.Tensor:
    sigma = float(schedule.alpha_sigma_at(schedule.level_max)[1])
    return sigma * torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (VPContinuous(), "epsilon"),
        (VPContinuous(), "v"),
        (EDM(), "denoised"),
        (Flow(), "flow"),
        (VP.linear(zero_terminal_snr=True), "v"),
    ],
    ids=["vp", "vp-v", "edm", "flow", "zero-snr"],
)
@pytest.mark.parametrize("solver", ["unipc:order=3", "dpmpp_2m", "deis", "heun"])
def test_reaches_the_exact_solution_of_a_gaussian(schedule, prediction, solver):
    if schedule.level_max == float("inf"):
        levels = make_grid(schedule, 120, "trailing").level[:-1]  # starts where there is no signal at all
    else:
        levels = (
            np.geomspace(schedule.level_max, 0.02, 120)
            if schedule.frame != "flow"
            else np.linspace(1, 0.02, 120)
        )
    (a, b), (s, r) = schedule.alpha_sigma_at(np.array([levels[0], levels[-1]]))
    x = s * torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # the flow of the ODE scales a Gaussian by the ratio of its standard deviations
    exact = x * ((b**2 * 0.25 + r**2) / (a**2 * 0.25 + s**2)) ** 0.5
    result = fs.sample(gaussian(schedule, prediction), x, solver, sigmas=levels)
    assert float((result - exact).abs().max()) < 1e-2


@pytest.mark.parametrize("solver", ["ddim:eta=1", "euler_ancestral", "euler:churn=10"])
@pytest.mark.parametrize("schedule", [VPContinuous(), EDM(0.01, 20.0)], ids=["vp", "edm"])
def test_a_stochastic_solver_keeps_mean_and_variance_of_a_gaussian(schedule, solver):
    sigma = float(schedule.alpha_sigma_at(schedule.level_max)[1])
    x = sigma * torch.randn(1, 60_000, generator=torch.Generator().manual_seed(1))
    result = fs.sample(gaussian(schedule), x, solver, steps=250, schedule="exponential", seed=5)
    assert abs(float(result.mean())) < 0.01
    assert abs(float(result.std()) - 0.5) < 0.015


def test_guidance_costs_two_and_interpolates():
    schedule = VPContinuous()
    conditional, other = gaussian(schedule, variance=0.1), gaussian(schedule, variance=1.0)
    both = fs.Denoiser(conditional.fn, schedule, "denoised", unconditional=other.fn)
    x = start(schedule, 4)
    plain = fs.sample(conditional, x, steps=5)
    assert torch.equal(fs.sample(both, x, steps=5, guidance=1.0), plain) and both.nfe == 5 * 4
    assert torch.equal(fs.sample(both, x, steps=5, guidance=0.0), fs.sample(other, x, steps=5))
    both.nfe = 0
    guided = fs.sample(both, x, steps=5, guidance=fs.CFG(2.0))
    assert both.nfe == 2 * 5 * 4
    direct = fs.Denoiser(lambda x, t: 2 * conditional.fn(x, t) - other.fn(x, t), schedule, "denoised")
    torch.testing.assert_close(guided, fs.sample(direct, x, steps=5))


def test_seeds():
    schedule = VPContinuous()
    x = start(schedule, 3)
    a = fs.sample(gaussian(schedule), x, "ddim:eta=1", seed=4)
    assert torch.equal(a, fs.sample(gaussian(schedule), x, "ddim:eta=1", seed=[4, 5, 6]))
    assert not torch.equal(a, fs.sample(gaussian(schedule), x, "ddim:eta=1", seed=5))


def test_sigmas_end_where_they_end():
    denoiser, x = gaussian(EDM()), start(EDM(), 2)
    levels = [80.0, 10.0, 1.0]
    result = fs.sample(denoiser, x, "euler", sigmas=levels)
    assert denoiser.nfe == 2 * 2
    assert torch.equal(result, fs.sample(denoiser, x, "euler", sigmas=torch.tensor(levels)))
    assert torch.equal(result, fs.sample(denoiser, x, "euler", sigmas=np.array(levels)))


def test_progress_goes_to_stderr_and_only_on_request(capsys):
    fs.sample(gaussian(EDM()), start(EDM(), 1), steps=3)
    assert capsys.readouterr() == ("", "")
    fs.sample(gaussian(EDM()), start(EDM(), 1), steps=3, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "3/3" in err and "unipc" in err


def never(x, t):
    raise AssertionError("the network was called")


CALLS = {
    "solver": ({"solver": "unipcc"}, ValueError, "did you mean 'unipc'"),
    "option": ({"solver": "unipc:oder=3"}, ValueError, "did you mean 'order'"),
    "steps 0": ({"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
    "steps text": ({"steps": "8"}, ValueError, "got '8'"),
    "schedule": ({"schedule": "karas"}, ValueError, "did you mean 'karras'"),
    "rising": (
        {"sigmas": [1.0, 2.0, 0.0]},
        ValueError,
        "strictly decreasing: sigma/alpha goes from 1 to 2 at step 0",
    ),
    "one sigma": ({"sigmas": [1.0]}, ValueError, "at least two nodes"),
    "negative": ({"sigmas": [1.0, -0.1]}, ValueError, "numbers >= 0"),
    "nan": ({"sigmas": [float("nan"), 0.0]}, ValueError, "numbers >= 0"),
    "shape": ({"x": torch.zeros(2, 5)}, ValueError, r"samples of shape \(5,\), the denoiser takes \(3,\)"),
    "integers": ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "floating-point"),
    "not a tensor": ({"x": [[0.0]]}, TypeError, "tensor"),
    "guidance without network": ({"guidance": 3.0}, ValueError, "unconditional=fn"),
    "negative guidance": ({"guidance": -1.0}, ValueError, "must be >= 0"),
    "guidance nan": ({"guidance": float("nan")}, ValueError, "finite number"),
    "seeds": ({"solver": "ddim:eta=1", "seed": [1, 2, 3]}, ValueError, "3 seeds for a batch of 2"),
    "noise": ({"solver": "ddim:eta=1", "noise": "withe"}, ValueError, "did you mean 'white'"),
}


@pytest.mark.parametrize(("change", "error", "words"), CALLS.values(), ids=CALLS.keys())
def test_mistakes_are_refused_before_the_network_is_called(change, error, words):
    denoiser = fs.Denoiser(never, EDM(), "denoised", shape=(3,))
    with pytest.raises(error, match=words):
        fs.sample(**({"denoiser": denoiser, "x": torch.zeros(2, 3)} | change))


def test_a_denoiser_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="did you mean 'epsilon'"):
        fs.Denoiser(never, EDM(), "epsilo")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fn must be callable"):
        fs.Denoiser(3, EDM(), "epsilon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="noise_schedule"):
        fs.Denoiser(never, "edm", "epsilon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"fewstep\.Denoiser, got function"):
        fs.sample(never, torch.zeros(1, 3))  # type: ignore[arg-type]


def test_zero_terminal_snr_with_epsilon_is_refused():
    schedule = VP.linear(zero_terminal_snr=True)
    denoiser = fs.Denoiser(never, schedule, "epsilon")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        fs.sample(denoiser, torch.zeros(1, 3), steps=4, schedule="trailing")


def test_a_network_with_nan_is_a_numerical_error():
    denoiser = fs.Denoiser(lambda x, t: x * float("nan") if t[0] < 10 else x, EDM(), "denoised")
    with pytest.raises(fs.NumericalError, match=r"evaluation \d of 8, t = [\d.]+ .*solver 'unipc'"):
        fs.sample(denoiser, torch.randn(2, 3), steps=8)
