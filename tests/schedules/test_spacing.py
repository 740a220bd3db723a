"""Spacings against the arrays of diffusers and ComfyUI, and what every one of them must satisfy."""

from __future__ import annotations

import golden_files
import numpy as np
import pytest

from fewstep.schedules import EDM, VP, Flow, TimeGrid, from_diffusers, make_grid, schedule, schedules
from fewstep.schedules.align_your_steps import TABLES
from fewstep.schedules.align_your_steps import family as family_of
from fewstep.schedules.beta_distribution import beta_quantile
from fewstep.schedules.spec import render

GOLDEN = golden_files.load()
COMFY_MODELS = {"sd15": VP.scaled_linear(), "flow1": Flow(1.0), "flow3": Flow(3.0)}


COMFY_SPECS = {"polyexponential2": "polyexponential:rho=2"}
ALONE = {"kvp": ("vp", EDM(0.002, 200.0)), "bong_tangent": ("bong_tangent", Flow())}


def _comfy() -> list[str]:
    keys = [k for k in GOLDEN.case("schedules_comfy").arrays if k.count("__") == 2]
    # In ComfyUI a Laplace schedule of log sigma on a flow repeats sigma = 1; here it is one of log(sigma / alpha).
    return [
        k for k in keys if k.split("__")[0] in COMFY_MODELS and ("laplace" not in k or k.startswith("sd15"))
    ]


@pytest.mark.parametrize("key", _comfy())
def test_matches_comfyui(key):
    model, name, steps = key.split("__")
    expected = GOLDEN.case("schedules_comfy")[key]
    if name == "laplace":  # the node returns no final 0
        expected = np.append(expected, 0.0)
    if len(expected) != int(steps[1:]) + 1:
        pytest.skip("ComfyUI has another number of steps than asked for (repeated levels, ddim_uniform)")
    grid = make_grid(COMFY_MODELS[model], int(steps[1:]), COMFY_SPECS.get(name, name))
    np.testing.assert_allclose(grid.level, expected, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("name", list(ALONE))
@pytest.mark.parametrize("steps", [4, 7, 10, 20, 28, 50])
def test_matches_k_diffusion_and_res4lyf(name, steps):
    spec, noise_schedule = ALONE[name]
    expected = GOLDEN.case("schedules_comfy")[f"{name}__n{steps}"]
    np.testing.assert_allclose(make_grid(noise_schedule, steps, spec).level, expected, rtol=3e-6, atol=1e-7)


def test_published_gits_tables():
    arrays = GOLDEN.case("schedules_gits_sd15").arrays
    for key, expected in arrays.items():
        coefficient, steps = key.removeprefix("coeff").split("__n")
        grid = make_grid(VP.scaled_linear(), int(steps), f"gits:coefficient={coefficient}")
        np.testing.assert_allclose(grid.level[:-1], expected[:-1], rtol=3e-5)
    assert len(arrays) > 280


@pytest.mark.parametrize("model", ["sd15", "sdxl", "svd"])
@pytest.mark.parametrize("steps", [4, 7, 20, 50])
def test_resampled_published_levels(model, steps):
    """ComfyUI's, whose tables hold more digits than the published ones."""
    key = {"sd15": "SD1", "sdxl": "SDXL", "svd": "SVD"}[model]
    grid = make_grid(EDM(0.002, 700.0), steps, f"ays:model={model}")
    np.testing.assert_allclose(grid.level, GOLDEN.case("schedules_comfy")[f"ays_{key}__n{steps}"], rtol=2e-2)


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


PUBLISHED = {"ays": VP.scaled_linear(), "gits": VP.scaled_linear(), "optimal_steps": Flow()}


@pytest.mark.parametrize("name", list(schedules()))
@pytest.mark.parametrize("noise_schedule", [VP.linear(), EDM(), Flow(3.0)], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12, 50])
def test_gives_the_steps_asked_for_and_ends_without_noise(name, noise_schedule, steps):
    noise_schedule = PUBLISHED.get(name, noise_schedule)
    grid = make_grid(noise_schedule, steps, name)
    assert grid.steps == steps and grid.level[-1] == 0.0
    assert np.all(np.diff(grid.level) < 0)
    if name not in ("leading", "vp"):
        np.testing.assert_allclose(grid.level[0], noise_schedule.level_max, rtol=4e-3)


@pytest.mark.parametrize("alias", sorted({a for s in schedules().values() for a in s.aliases}))
def test_an_alias_is_the_spacing_that_it_stands_for(alias):
    found, options = schedule(alias)
    spec = found.aliases[alias]
    again, same = schedule(render(found.name, options))
    assert again is found and same == options == schedule(spec)[1]
    noise_schedule = PUBLISHED.get(found.name, VP.scaled_linear())
    np.testing.assert_array_equal(
        make_grid(noise_schedule, 6, alias).level, make_grid(noise_schedule, 6, spec).level
    )


def test_options_go_before_those_that_a_name_implies():
    assert schedule("beta57")[1] == {"a": 0.5, "b": 0.7}
    assert schedule("beta57:b=0.8")[1] == {"a": 0.5, "b": 0.8}


@pytest.mark.parametrize("steps", [2, 3, 6, 11])
def test_linear_quadratic_is_smooth_where_its_halves_meet(steps):
    level = make_grid(Flow(), steps, "linear_quadratic:threshold=0.02").level
    half = steps // 2
    np.testing.assert_allclose(level[: half + 1], 1 - 0.02 * np.arange(half + 1) / half)
    second = np.diff(level[half:], 2)
    np.testing.assert_allclose(second, second[:1].repeat(len(second)))


def test_beta_sigmas_are_quantiles_of_the_level():
    from scipy.stats import beta

    level = make_grid(EDM(0.01, 10.0), 9, "use_beta_sigmas").level[:-1]
    expected = 0.01 + beta.ppf(1.0 - np.linspace(0.0, 1.0, 9), 0.6, 0.6) * 9.99
    np.testing.assert_allclose(level, expected, rtol=1e-9)


def test_laplace_quantiles_on_every_model():
    """At quantile u of a Laplace distribution of log(sigma / alpha), whatever the frame; to the published 1e-5."""
    from scipy.stats import laplace

    u = np.linspace(0.0, 1.0, 9)[1:-1]
    for noise_schedule in (VP.linear(), EDM(), Flow()):
        grid = make_grid(noise_schedule, 9, "laplace:mu=0.3,beta=0.4")
        np.testing.assert_allclose(-grid.lam[1:-2], laplace.ppf(1.0 - u, 0.3, 0.4), atol=1e-4)


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
        (
            5,
            "ays",
            "no published levels for levels up to 80; known: sd15, sdxl, svd, deepfloyd; ays:model=NAME",
        ),
        (5, "gits", "Stable Diffusion 1.5 only"),
        (5, "optimal_steps", r"flow models \(flux, wan, chroma\) only"),
        (5, "gits:coefficient=2", ">= 0.8 and <= 1.5"),
        (5, "linear_quadratic:linear_steps=5", "from 1 to steps - 1 = 4"),
        (5, "linear_quadratic:threshold=0.9", "too much for 2 of 5 steps; at most 0.4"),
        (5, "bong_tangent:pivot=1", "leaves no steps"),
        (5, "polyexponential:rho=0", "> 0"),
        (2000, "simple", "strictly decreasing"),
    ],
)
def test_bad_input_is_named(steps, spec, words):
    with pytest.raises(ValueError, match=words):
        make_grid(EDM(), steps, spec)


def test_a_published_schedule_of_another_model_kind_is_refused():
    with pytest.raises(
        ValueError, match="no published levels for a flow model; known: sd15, sdxl, svd, deepfloyd"
    ):
        make_grid(Flow(), 8, "ays:model=sdxl")


def test_the_family_of_a_published_schedule_is_that_of_the_model():
    svd = {
        "timestep_type": "continuous",
        "prediction_type": "v_prediction",
        "sigma_min": 0.002,
        "sigma_max": 700.0,
    }
    stable = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    shipped = {**stable, "timestep_spacing": "leading", "interpolation_type": "linear"}
    for config, model in (
        (svd, "svd"),
        (stable, "sd15"),
        (shipped, "sdxl"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "deepfloyd"),
        ({"beta_schedule": "linear"}, None),
    ):
        assert family_of(from_diffusers(config), config) == model
    assert make_grid(VP.scaled_linear(), 10, "ays").level[1] == pytest.approx(TABLES["sd15"][1])
    assert make_grid(VP.cosine(), 10, "ays").level[1] == pytest.approx(TABLES["deepfloyd"][1])


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


@pytest.mark.parametrize("noise_schedule", [VP.scaled_linear(), VP.cosine(), EDM(), Flow(3.0)])
@pytest.mark.parametrize("steps", [1, 8, 100, 1000])
def test_the_default_calls_the_network_where_it_was_trained(noise_schedule, steps):
    """Two nodes below the cleanest trained level would have one time, between which no polynomial goes."""
    grid = make_grid(noise_schedule, steps)
    assert grid.level[:-1].min() >= noise_schedule.level_min * (1 - 1e-12)
    assert len(set(grid.t[:-1])) == steps
