"""Spacings against the arrays of diffusers and ComfyUI, and what every one of them must satisfy."""

from __future__ import annotations

import golden_files
import numpy as np
import pytest

from fewstep.schedules import EDM, VP, Flow, TimeGrid, from_diffusers, make_grid, schedule, schedules
from fewstep.schedules.spacing import beta_quantile

GOLDEN = golden_files.load()
COMFY_MODELS = {"sd15": VP.scaled_linear(), "flow1": Flow(1.0), "flow3": Flow(3.0)}


def _comfy() -> list[str]:
    keys = [k for k in GOLDEN.case("schedules_comfy").arrays if k.count("__") == 2]
    return [k for k in keys if k.split("__")[0] in COMFY_MODELS and k.split("__")[1] in schedules()]


@pytest.mark.parametrize("key", _comfy())
def test_matches_comfyui(key):
    model, name, steps = key.split("__")
    expected = GOLDEN.case("schedules_comfy")[key]
    if len(expected) != int(steps[1:]) + 1:
        pytest.skip("ComfyUI drops repeated levels and returns fewer steps than asked for")
    grid = make_grid(COMFY_MODELS[model], int(steps[1:]), name)
    np.testing.assert_allclose(grid.level, expected, rtol=3e-6, atol=1e-9)


def _spec(cls: str, config: dict) -> str | None:
    """The spacing that a diffusers config means."""
    for flag, name in (
        ("use_karras_sigmas", "karras"),
        ("use_exponential_sigmas", "exponential"),
        ("use_lu_lambdas", "log_snr"),
    ):
        if config.get(flag):
            return name
    if (
        config.get("use_beta_sigmas")
        or "sigma_data" in config
        or cls not in KNOWN
        or config.get("rescale_betas_zero_snr")
    ):
        return None
    multistep = cls in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    if config.get("use_flow_sigmas") or "lambda_min_clipped" in config:
        return None
    match config.get("timestep_spacing", "linspace"):
        case "linspace":
            return "linspace" if multistep else "normal"
        case "trailing":
            return "trailing"
        case "leading" if not multistep:
            return f"leading:offset={config.get('steps_offset', 0)}"
    return None


KNOWN = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler")


def _diffusers() -> list[tuple[str, str]]:
    configs = GOLDEN.case("schedules_diffusers_core").meta["configs"]
    keys = []
    for family in ("schedules_diffusers_vp", "schedules_diffusers_flow"):
        for key in GOLDEN.case(family).arrays:
            name, *_, kind = key.split("__")
            if kind == "sigmas" and name in configs and _spec(configs[name]["cls"], configs[name]["config"]):
                keys.append((family, key))
    return keys


@pytest.mark.parametrize(("family", "key"), _diffusers())
def test_matches_diffusers(family, key):
    name, steps, _ = key.split("__")
    entry = GOLDEN.case("schedules_diffusers_core").meta["configs"][name]
    expected = GOLDEN.case(family)[key]
    noise_schedule = from_diffusers({"_class_name": entry["cls"], **entry["config"]})
    if entry["config"].get("final_sigmas_type") == "sigma_min":
        expected = np.append(expected[:-1], 0.0)
    spec = _spec(entry["cls"], entry["config"])
    assert spec is not None
    grid = make_grid(noise_schedule, int(steps[1:]), spec)
    # Their tables are fp32 products and the interpolation between indices is linear in sigma there.
    np.testing.assert_allclose(grid.level, expected, rtol=2e-4, atol=1e-9)


def test_the_golden_arrays_are_really_used():
    assert len(_comfy()) > 60 and len(_diffusers()) > 40


@pytest.mark.parametrize("name", list(schedules()))
@pytest.mark.parametrize("noise_schedule", [VP.linear(), EDM(), Flow(3.0)], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12, 50])
def test_gives_the_steps_asked_for_and_ends_without_noise(name, noise_schedule, steps):
    if name == "ays" and noise_schedule.frame == "flow":
        pytest.skip("published for models with levels above 1")
    grid = make_grid(noise_schedule, steps, name)
    assert grid.steps == steps and grid.level[-1] == 0.0
    assert np.all(np.diff(grid.level) < 0)
    if name not in ("leading", "ays"):
        np.testing.assert_allclose(grid.level[0], noise_schedule.level_max, rtol=2e-3)


def test_without_final_zero_the_grid_ends_at_the_last_level():
    grid = make_grid(EDM(), 4, "exponential", final_zero=False)
    assert grid.steps == 4
    np.testing.assert_allclose(grid.level[[0, -1]], [80.0, 0.002])
    np.testing.assert_allclose(np.diff(np.log(grid.level)), np.log(0.002 / 80) / 4)


def test_options():
    a = make_grid(EDM(), 5, "karras:rho=3,sigma_min=0.1,sigma_max=10")
    np.testing.assert_allclose(a.level[[0, -2]], [10, 0.1])
    np.testing.assert_allclose(np.diff(a.level[:-1] ** (1 / 3)), np.diff(a.level[:-1] ** (1 / 3))[0])


def test_published_tables_at_ten_steps(golden):
    for model, key in (
        ("sd15", "StableDiffusion"),
        ("sdxl", "StableDiffusionXL"),
        ("svd", "StableDiffusionVideo"),
    ):
        published = golden.case("schedules_diffusers_core")[f"ays__{key}Sigmas"]
        grid = make_grid(EDM(0.002, 700.0), 10, f"ays:model={model}")
        np.testing.assert_allclose(grid.level, published, rtol=1e-6)


def test_beta_quantiles_against_scipy():
    from scipy.stats import beta

    p = np.linspace(0.001, 0.999, 40)
    for a, b in ((0.6, 0.6), (0.5, 0.7), (2.0, 5.0)):
        np.testing.assert_allclose([beta_quantile(float(q), a, b) for q in p], beta.ppf(p, a, b), rtol=1e-9)


@pytest.mark.parametrize(
    ("steps", "spec", "words"),
    [
        (0, "karras", "steps must be an integer >= 1, got 0"),
        (2.5, "karras", "got 2.5"),
        (True, "karras", "got True"),
        (5, "kras", "did you mean 'karras'"),
        (5, "karras:roh=7", "did you mean 'rho'"),
        (5, "karras:rho=seven", "must be a number, got 'seven'"),
        (5, "karras:rho", "not of the form key=value"),
        (5, "karras:sigma_min=90", "sigma_min < sigma_max"),
        (5, "karras:rho=-1", "rho must be positive"),
        (5, "ays:model=sd14", "one of sd15"),
        (2000, "simple", "strictly decreasing"),
    ],
)
def test_bad_input_is_named(steps, spec, words):
    with pytest.raises(ValueError, match=words):
        make_grid(EDM(), steps, spec)


def test_a_published_schedule_of_another_model_kind_is_refused():
    with pytest.raises(ValueError, match=r"flow model's noise levels lie in \[0, 1\]"):
        make_grid(Flow(), 8, "ays")


def test_aliases_and_canonical_names():
    assert schedule("lu_lambdas")[0].name == "log_snr"
    assert all(s.summary for s in schedules().values())


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([1.0], "at least two nodes"),
        ([1.0, 2.0], "strictly decreasing"),
        ([1.0, 1.0, 0.0], "from 1 to 1 at step 0"),
        ([1.0, float("nan")], "numbers >= 0"),
        ([1.0, -1.0], "numbers >= 0"),
    ],
)
def test_grids_are_validated(levels, words):
    with pytest.raises(ValueError, match=words):
        TimeGrid.from_levels(EDM(), levels)


def test_grids_are_cached_and_cannot_be_changed():
    grid = make_grid(EDM(), 5, "karras")
    assert make_grid(EDM(), 5, "karras") is grid
    assert make_grid(EDM(0.01), 5, "karras") is not grid
    with pytest.raises(ValueError, match="read-only"):
        grid.sigma[0] = 1.0
    levels = np.array([1.0, 0.5, 0.0])
    TimeGrid.from_levels(Flow(), levels)
    levels[0] = 0.9  # the caller's array stays the caller's
