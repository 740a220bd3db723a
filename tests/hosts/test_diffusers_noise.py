"""Noise that the diffusers scheduler adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers_runs import SD, FewStepScheduler, X, diffusers, make, network


def test_add_noise_by_value() -> None:
    native = diffusers.DDPMScheduler(**SD)
    noise = X.flip(0)
    for scheduler in (make(steps=None), make(steps=7)):
        for times in (torch.tensor([503]), torch.tensor([10, 999]), torch.tensor([0])):
            expected = native.add_noise(X, noise, times)
            assert torch.allclose(scheduler.add_noise(X, noise, times), expected, atol=1e-5)
            assert torch.allclose(scheduler.add_noise(X, noise, times.float()), expected, atol=1e-5)
            assert torch.allclose(scheduler.scale_noise(X, times, noise), expected, atol=1e-5)
            assert torch.allclose(
                scheduler.get_velocity(X, noise, times), native.get_velocity(X, noise, times), atol=1e-5
            )
        low = scheduler.add_noise(X, noise, torch.tensor([502]))
        high = scheduler.add_noise(X, noise, torch.tensor([503]))
        between = scheduler.add_noise(X, noise, torch.tensor([502.5]))
        assert torch.allclose(between, (low + high) / 2, atol=1e-4)
        assert scheduler.add_noise(X.bfloat16(), noise.bfloat16(), torch.tensor([5])).dtype == torch.bfloat16


def test_add_noise_by_position() -> None:
    for solver in ("dpmpp_2m", "heun"):
        scheduler = make(solver)
        scheduler.set_begin_index(4)
        noise, anything = X.flip(0), torch.tensor([3, 3])

        def at(i: int, scheduler: Any = scheduler, noise: torch.Tensor = noise) -> torch.Tensor:
            sigma = scheduler.sigmas[i]
            return (X + sigma * noise) / (1 + sigma**2).sqrt()

        assert torch.allclose(scheduler.add_noise(X, noise, anything), at(4), atol=1e-5)
        t = scheduler.timesteps[4]
        scheduler.step(network(X, t), t, X)
        assert torch.allclose(scheduler.add_noise(X, noise, anything), at(5), atol=1e-5)


def test_add_noise_with_a_network_of_integers_only() -> None:
    scheduler = make("dpmpp_2m", schedule="karras", integer_timesteps=True)
    t = scheduler.timesteps[5]
    assert scheduler.index_for_timestep(t.clone()) == 5


def test_variance_of_the_reverse_step() -> None:
    """As DDPM's class has it, on the schedule and between training indices."""
    native, ours = diffusers.DDPMScheduler(**SD, timestep_spacing="trailing"), make("ddpm", None)
    for scheduler in (native, ours):
        scheduler.set_timesteps(8)
    for t in native.timesteps:
        assert int(ours.previous_timestep(t)) == int(native.previous_timestep(t))
        assert float(ours._get_variance(t)) == pytest.approx(float(native._get_variance(t)), abs=1e-5)
    ddim = diffusers.DDIMScheduler(**SD)
    assert float(ours._get_variance(420, 400)) == pytest.approx(float(ddim._get_variance(420, 400)), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "beta_schedule"),
    [("DDPMScheduler", "sigmoid"), ("DDPMScheduler", "laplace"), ("HeunDiscreteScheduler", "exp")],
)
def test_rare_beta_schedules(name: str, beta_schedule: str) -> None:
    try:
        native = getattr(diffusers, name)(beta_schedule=beta_schedule)
    except NotImplementedError:
        pytest.skip(f"this version of diffusers has no {beta_schedule!r}")
    ours = FewStepScheduler.from_config(native.config)
    assert torch.allclose(ours.betas, native.betas, atol=1e-6)
