"""FewStepScheduler in real pipelines with tiny random weights: it must be taken for one of diffusers' own."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import tiny_pipelines
from tiny_pipelines import CASES, Case, diffusers

import fewstep as fs

FewStepScheduler: Any = fs.FewStepScheduler
# One of every kind; with the marker `full` every registered solver runs in every pipeline.
SOLVERS = ("dpmpp_2m", "unipc:order=3", "heun", "euler_ancestral")
FURTHER = (
    "euler:churn=3,s_max=50",
    "dpm_2:churn=3,s_max=50",
    "ddim:eta=1",
    "dpmpp_2m+restart:t_max=5",
    "heun+restart:t_max=5",
    "unipc+skip",
    "dpmpp_2m+heavy_ball",
)
full = pytest.mark.full
everywhere = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=() if case.fast else full) for name, case in CASES.items()]
)


def combinations() -> Iterator[Any]:
    for case in CASES.values():
        for solver in (*SOLVERS, *FURTHER, *(s for s in fs.solvers() if s not in SOLVERS)):
            usual = case.fast and solver in SOLVERS
            yield pytest.param(case, solver, id=f"{case.name}-{solver}", marks=() if usual else full)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and a fixed global generator: SD3, FLUX and DiT do not pass theirs to the scheduler."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def dressed(case: Case, **options: Any) -> Any:
    """The pipeline of a case with our scheduler."""
    pipe = case.pipeline()
    pipe.scheduler = FewStepScheduler.from_config(pipe.native.config, **options)
    return pipe


def counted(pipe: Any) -> list[torch.Tensor]:
    """Record the timestep of every call of step; pipelines look at its signature, so that is kept."""
    calls: list[torch.Tensor] = []
    step = pipe.scheduler.step

    @functools.wraps(step)
    def recorder(
        model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **more: Any
    ) -> Any:
        calls.append(torch.as_tensor(timestep))
        return step(model_output, timestep, sample, **more)

    pipe.scheduler.step = recorder
    return calls


@functools.cache
def native_shape(name: str) -> tuple[int, ...]:
    case = CASES[name]
    case.pipeline().scheduler = case.native()
    return tuple(case.call(case.pipeline()).shape)


@pytest.mark.parametrize(("case", "solver"), [*combinations()])
def test_runs(case: Case, solver: str) -> None:
    shape = native_shape(case.name)
    pipe = dressed(case, solver=solver)
    calls = counted(pipe)
    for steps in (12,) if "restart" in solver else (1, 2, 5, 12):  # an interval to repeat needs some nodes
        if steps == 1 and case.name == "wan_video2video":
            continue  # at this strength nothing is left, which gives no video at all
        calls.clear()
        seen: list[int] = []
        arguments: dict[str, Any] = {}
        if case.callbacks:
            arguments["callback_on_step_end"] = lambda p, i, t, kw, seen=seen: seen.append(i) or kw
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(between the stages|were replaced).*")
            out = case.call(pipe, steps, **arguments)
        scheduler = pipe.scheduler
        total, begin = len(scheduler.timesteps), scheduler.begin_index or 0
        assert tuple(out.shape) == shape
        assert torch.isfinite(out).all()
        chosen = fs.solver(solver)
        if chosen.evaluations_per_step == 1 and not chosen.startup_evaluations and "+" not in solver:
            assert total == steps
        if solver == "heun" and steps > 1:
            # No second stage in a step to no noise, nor in a first one without any signal.
            ends = bool(scheduler.config.rescale_betas_zero_snr) + (case.name != "cosmos")
            assert total == 2 * steps - ends
        if case.callbacks:
            assert len(calls) == len(seen) == pipe.num_timesteps
        if case.name in ("sdxl_end", "wan_video2video"):  # leave off the end, or say not where they begin
            assert len(calls) <= total
        else:
            assert len(calls) == total - begin
            assert scheduler.step_index == (total if calls else None)  # one step at strength 0.6 is none


@everywhere
def test_the_numbers_of_the_native_scheduler(case: Case) -> None:
    """Where it is Euler or DDIM, whose steps are one method."""
    name = type(case.pipeline().native).__name__
    if "Euler" not in name and "DDIM" not in name:
        pytest.skip(f"{name} is another method")
    if case.name in ("sdxl_end", "sdxl_start"):
        pytest.skip("latents in the middle of a run are x / alpha in that class")
    pipe = case.pipeline()
    pipe.scheduler = case.native()
    expected = case.call(pipe, 4)
    end = {} if pipe.native.config.get("set_alpha_to_one", True) else {"final_sigmas_type": "sigma_min"}
    ours = case.call(dressed(case, solver="euler", **end), 4)
    assert torch.allclose(ours, expected, atol=1e-4, rtol=1e-4)


@everywhere
def test_repeats_bit_for_bit(case: Case) -> None:
    """On one scheduler object, after another run, and on a copy."""
    pipe = dressed(case, solver="euler_ancestral", schedule="karras")
    torch.manual_seed(1)
    first = case.call(pipe, 4)
    case.call(pipe, 3, seed=5)
    torch.manual_seed(1)
    assert torch.equal(case.call(pipe, 4), first)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    torch.manual_seed(1)
    assert torch.equal(case.call(pipe, 4), first)


@everywhere
def test_bfloat16(case: Case) -> None:
    if case.name == "ddpm":
        pytest.skip("the pipeline itself converts to an array, which 16 bits have none of")
    if case.name == "wan_video2video" and diffusers.__version__ < "0.40":
        pytest.skip("the pipeline itself gives fp32 frames to a 16-bit encoder")
    exact = case.call(dressed(case, solver="unipc"), 5)
    pipe = copy.deepcopy(case.pipeline())
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    given = {k: halved(v) for k, v in case.arguments().items() if k not in ("image", "mask_image", "video")}
    out = case.call(pipe, 5, **given)
    assert torch.isfinite(out).all()
    assert (out.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def halved(value: Any) -> Any:
    """Embeddings in 16 bits."""
    if isinstance(value, list):
        return [halved(v) for v in value]
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def takes(case: Case, name: str) -> bool:
    return name in inspect.signature(type(case.pipeline()).__call__).parameters


@everywhere
def test_custom_timesteps(case: Case) -> None:
    if not takes(case, "timesteps") or case.name == "ltx":
        pytest.skip("the pipeline takes none, or sends sigmas with them")
    times = [901, 700, 333, 40]
    pipe = dressed(case, solver="unipc:order=3", schedule="karras")
    strength: dict[str, Any] = {"strength": 1.0} if takes(case, "strength") else {}
    out = case.call(pipe, None, timesteps=times, **strength)
    assert pipe.scheduler.timesteps.tolist() == times
    assert torch.isfinite(out).all()


@everywhere
def test_custom_sigmas(case: Case) -> None:
    if not takes(case, "sigmas"):
        pytest.skip("the pipeline takes none")
    sigmas = [1.0, 0.8, 0.4, 0.2] if case.flow else [14.0, 5.0, 1.0, 0.2]
    plain = {"use_dynamic_shifting": False, "shift": 1.0, "flow_shift": None, "shift_terminal": None}
    pipe = dressed(case, solver="dpmpp_2m", schedule="karras", **plain)
    more: dict[str, Any] = {"strength": 1.0} if takes(case, "strength") else {}
    for given in (sigmas, np.array(sigmas), torch.tensor(sigmas)):
        try:
            out = case.call(pipe, 4 if case.flow else None, sigmas=given, **more)
        except (ValueError, RuntimeError) as error:
            if isinstance(given, list) or "ambiguous" not in str(error):
                raise
            continue  # the pipeline itself asks `sigmas or default`
        assert pipe.scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0.0])
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["sd3", "flux", "flux_img2img"])
def test_named_schedule_replaces_what_flow_pipelines_always_send(name: str) -> None:
    case = CASES[name]
    pipe = dressed(case, solver="unipc", schedule="exponential")
    case.call(pipe, 6)
    ratio = pipe.scheduler.sigmas[1:-1] / pipe.scheduler.sigmas[:-2]
    assert ratio.tolist() == pytest.approx([ratio[0].item()] * 5, rel=1e-4)


def test_mu_moves_the_schedule() -> None:
    """FLUX computes mu from the image size: with any solver and any schedule by index more tokens mean more noise."""
    case = CASES["flux"]
    for schedule in (None, "linspace"):
        pipe = dressed(case, solver="unipc", schedule=schedule, max_shift=8.0)
        case.call(pipe, 4)
        small = pipe.scheduler.sigmas.clone()
        case.call(pipe, 4, height=64, width=64)
        assert (pipe.scheduler.sigmas[1:-1] > small[1:-1]).all()


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_same_as_sampling_without_a_pipeline(name: str) -> None:
    """Same network, noise and grid: the pipeline's loop and ours agree bit for bit."""
    case = CASES[name]
    for solver in ("unipc:order=3", "heun", "deis"):
        pipe = dressed(case, solver=solver, schedule="karras" if case.flow else "trailing")
        start, outputs = [], []
        step = pipe.scheduler.step

        @functools.wraps(step)
        def recorder(
            model_output: torch.Tensor,
            timestep: Any,
            sample: torch.Tensor,
            step=step,
            start=start,
            outputs=outputs,
            **kw: Any,
        ) -> Any:
            start.append(sample)
            outputs.append(model_output)
            return step(model_output, timestep, sample, **kw)

        pipe.scheduler.step = recorder
        out = case.call(pipe, 5)
        replay = iter(outputs)
        times: list[float] = []

        def network(x: torch.Tensor, t: torch.Tensor, replay=replay, times=times) -> torch.Tensor:
            times.append(float(t[0]))
            return next(replay)

        noise_schedule = pipe.scheduler._run.plan.source.noise_schedule
        denoiser = fs.Denoiser(network, noise_schedule, "flow" if case.flow else "epsilon")
        ours = fs.sample(denoiser, start[0], solver, 5, pipe.scheduler.config.schedule)
        assert torch.equal(ours, out)
        scale = 1000 if case.flow else 1
        assert pipe.scheduler.timesteps.tolist() == pytest.approx([t * scale for t in times], rel=1e-6)


@pytest.mark.parametrize("name", ["sd_img2img", "sdxl_img2img", "sd3_img2img", "flux_img2img"])
def test_image_to_image_keeps_more_of_the_image_at_less_strength(name: str) -> None:
    case = CASES[name]
    for solver in ("dpmpp_2m", "unipc", "euler_ancestral"):
        pipe = dressed(case, solver=solver)
        changes = []
        for strength in (0.1, 0.4, 0.9):
            out = case.call(pipe, 20, strength=strength)
            assert torch.isfinite(out).all()
            changes.append((out - case.call(pipe, 20, strength=0.06)).abs().mean().item())
        assert changes == sorted(changes)


@pytest.mark.parametrize("name", ["sd_img2img", "sd3_img2img"])
def test_starting_between_the_stages_of_a_step_costs_one_evaluation_and_no_more(name: str) -> None:
    """Heun's second stage stands where the next step begins: an odd start waits for it, and says so."""
    case = CASES[name]
    pipe = dressed(case, solver="heun")
    with pytest.warns(UserWarning, match="between the stages"):
        odd = case.call(pipe, 8, strength=0.375)  # starts at evaluation 5
    assert pipe.scheduler.begin_index == 5
    assert torch.isfinite(odd).all()
    with pytest.warns(UserWarning, match="between the stages"):
        dressed(case, solver="heun")
        again = case.call(case.pipeline(), 8, strength=0.375)
    assert torch.equal(odd, again)


def test_sdxl_in_two_parts_equals_one() -> None:
    """denoising_end hands over to denoising_start at the same level; a one-step method does not notice."""
    text, image = CASES["sdxl"], CASES["sdxl_img2img"]
    whole = text.call(dressed(text, solver="euler"), 10)
    first = text.call(dressed(text, solver="euler"), 10, denoising_end=0.5)
    pipe = dressed(image, solver="euler")
    second = image.call(pipe, 10, denoising_start=0.5, image=first, strength=0.3)
    assert torch.allclose(second, whole, atol=1e-5)


def test_the_pipeline_folder_comes_back(tmp_path: Path) -> None:
    case = CASES["ddpm"]
    pipe = dressed(case, solver="unipc:order=3", schedule="karras:rho=5", clip_sample=False)
    out = case.call(pipe, 4)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == [FewStepScheduler.__module__, "FewStepScheduler"]
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is FewStepScheduler
    assert again.scheduler.config.solver == "unipc:order=3"
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(case.call(again, 4), out, atol=1e-3)  # weights in mapped memory round differently
    native = diffusers.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, scheduler=native)
    assert type(again.scheduler) is diffusers.DDPMScheduler


@everywhere
def test_round_trip_to_the_native_class(case: Case) -> None:
    pipe = dressed(case)
    back = type(pipe.native).from_config(pipe.scheduler.config)
    keys = [k for k in pipe.native.config if not k.startswith("_")]
    assert {k: back.config[k] for k in keys} == {k: pipe.native.config[k] for k in keys}
    torch.manual_seed(0)
    pipe.scheduler = case.native()
    expected = case.call(pipe, 2)
    pipe.scheduler = back
    torch.manual_seed(0)
    assert torch.equal(case.call(pipe, 2), expected)
    assert FewStepScheduler.from_config(back.config, solver="heun").config.solver == "heun"


def test_latents_edited_by_a_callback_are_taken() -> None:
    case = CASES["sd"]

    def edit(pipe: Any, i: int, t: Any, kw: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kw["latents"] * 0.5} if i == 1 else kw

    pipe = dressed(case, solver="dpmpp_2m")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not torch.equal(case.call(pipe, 4), case.call(pipe, 4, callback_on_step_end=edit))
    pipe = dressed(case, solver="heun")
    with pytest.warns(UserWarning, match="were replaced between two steps") as record:
        case.call(pipe, 4, callback_on_step_end=edit)
        case.call(pipe, 4, callback_on_step_end=edit)
    assert len([w for w in record if "were replaced" in str(w.message)]) == 1


def test_inpainting_keeps_what_is_not_masked() -> None:
    case = CASES["sd_inpaint"]
    pipe = dressed(case, solver="dpmpp_2m", schedule="karras")
    keep = (tiny_pipelines.randn(1, 1, tiny_pipelines.IMAGE, tiny_pipelines.IMAGE, seed=3) > 0).float() * 0
    out = case.call(pipe, 5, mask_image=keep)  # nothing is masked: the image comes back
    pipe.scheduler = FewStepScheduler.from_config(pipe.native.config, solver="unipc")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*were replaced.*")
        other = case.call(pipe, 3, mask_image=keep)
    assert torch.allclose(out, other, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "flux", "ddpm"])
def test_eight_threads_share_a_pipeline(name: str) -> None:
    """Every request has its own number of steps and gets the numbers that it would have got alone."""
    case = CASES[name]
    for solver in ("unipc:order=3", "heun", "ddim:eta=1" if name == "sd" else "dpmpp_2m"):
        pipe = dressed(case, solver=solver)
        requests = [(3 + i % 4, i) for i in range(8)]
        alone = [case.call(pipe, *request) for request in requests]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(2):
                together = list(pool.map(lambda request, pipe=pipe: case.call(pipe, *request), requests))
                assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_a_pipeline_is_told_what_cannot_be_run() -> None:
    case = CASES["sd"]
    with pytest.raises(ValueError, match="take more steps"):
        case.call(dressed(case, solver="dpmpp_2m+restart", timestep_spacing="trailing"), 6)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "plms", "dpmpp_2m+restart:t_max=3", "unipc+skip"])
def test_progress(solver: str, counted: bool) -> None:
    """The bar is full at the end, whatever a step costs; where evaluations are left out it stops as much earlier.

    Counted in evaluations it is exact.
    """
    case = CASES["sd"]
    steps = 19 if counted else 8
    pipe = dressed(case, solver=solver, count_evaluations=counted)
    bars: list[Any] = []
    make_bar = type(pipe).progress_bar
    pipe.progress_bar = lambda *a, **kw: bars.append(make_bar(pipe, *a, **kw)) or bars[-1]
    pipe.set_progress_bar_config(disable=False, file=io.StringIO())
    try:
        case.call(pipe, steps)
    finally:
        pipe.set_progress_bar_config(disable=True)
        del pipe.progress_bar
    evaluations = len(pipe.scheduler.timesteps)
    assert pipe.num_timesteps == evaluations
    assert pipe.scheduler.num_inference_steps == bars[0].total == steps
    assert bars[0].n == min(steps, evaluations)
    assert not counted or evaluations == steps


def test_evaluations_are_counted_where_pipelines_send_levels() -> None:
    case = CASES["flux"]
    for solver, steps in (("heun", 5), ("unipc+skip", 9)):
        pipe = dressed(case, solver=solver, count_evaluations=True)
        case.call(pipe, steps)
        assert len(pipe.scheduler.timesteps) == steps
    with pytest.raises(ValueError, match="nearest budgets: 5 and 7"):
        case.call(dressed(case, solver="heun", count_evaluations=True), 6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_modular_pipelines(solver: str) -> None:
    """The blocks of SDXL with the components of the ordinary pipeline, and the latents of that one."""
    if diffusers.__version__ < "0.37":
        pytest.skip("modular pipelines were put together in another way")
    case = CASES["sdxl"]
    # The guiders stop after as many evaluations as there are steps.
    pipe = dressed(case, solver=solver, schedule="karras", count_evaluations=True)
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    for name in ("text_encoder", "ip_adapter", "decode"):
        blocks.sub_blocks.pop(name)
    modular = blocks.init_pipeline()
    scheduler = copy.deepcopy(pipe.scheduler)
    modular.update_components(unet=pipe.unet, vae=pipe.vae, scheduler=scheduler)
    given = {k: v for k, v in case.arguments().items() if k not in ("guidance_scale", "output_type")}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        out = modular(**given, num_inference_steps=5, generator=generator, output="latents")
    assert torch.isfinite(out).all()
    assert torch.allclose(out, case.call(pipe, 5, guidance_scale=7.5), atol=1e-4, rtol=1e-4)
    assert scheduler.step_index == len(scheduler.timesteps)
