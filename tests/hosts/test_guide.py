"""fs.guide in pipelines with tiny random weights: their own guidance reproduced, and only what is needed run."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import guided_pipelines
from guided_pipelines import ALL, KINDS, STEPS, Kind, close, counted
from tiny_pipelines import diffusers

import fewstep as fs
from fewstep.schedules.skipping import patterned_steps

FAST = ("sd", "flux", "dit")
full = pytest.mark.full


def kinds(fast: tuple[str, ...], among: dict[str, Kind] = ALL) -> Any:
    params = [pytest.param(k, id=n, marks=() if n in fast else full) for n, k in among.items()]
    return pytest.mark.parametrize("kind", params)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def network(kind: Kind, pipe: Any) -> Any:
    return getattr(pipe, kind.network)


@kinds((*KINDS, "instruct", "cosmos", "ltx2"))
def test_plain_guidance_is_the_pipelines_own(kind: Kind) -> None:
    pipe = kind.pipeline()
    with counted(network(kind, pipe)) as counter:
        own = kind.call(pipe)
        native = counter.rows
        handle = fs.guide(pipe, kind.own)
        guided = kind.call(pipe)
    ways = 3 if kind.case == "instruct" else 2
    evaluations = len(handle.trace())
    assert close(guided, own) < 1e-5
    assert counter.rows == 2 * native and handle.nfe == native == ways * evaluations
    handle.remove()
    assert torch.equal(kind.call(pipe), own)


@kinds(FAST)
def test_the_pipelines_own_scale_is_not_used(kind: Kind) -> None:
    if kind.case == "cosmos":
        pytest.skip("its formula is solved for the prediction, which rounds")
    pipe = kind.pipeline()
    name = "true_cfg_scale" if kind.case in ("flux", "qwen", "hunyuan_video") else "guidance_scale"
    with fs.guide(pipe, kind.own):
        assert torch.equal(kind.call(pipe), kind.call(pipe, **{name: 11.0}))


@kinds(FAST)
def test_two_samples_and_two_runs(kind: Kind) -> None:
    """A batch of two; and nothing of one run is left in the next, neither momentum nor noise."""
    pipe = kind.pipeline()
    own = kind.call(pipe, **kind.two)
    with fs.guide(pipe, kind.own) as handle:
        assert close(kind.call(pipe, **kind.two), own) < 1e-5
        assert handle.nfe == (6 if kind.case == "instruct" else 4) * len(handle.trace())
    with fs.guide(pipe, fs.APG(kind.w) + fs.CADS(tau1=0.2, tau2=0.7)):
        first = kind.call(pipe)
        assert torch.equal(kind.call(pipe), first)


@kinds(("sd", "flux"))
def test_only_what_is_needed_runs(kind: Kind) -> None:
    pipe = kind.pipeline()
    cfg = fs.CFG(kind.w)
    ways = 3 if kind.case == "instruct" else 2
    with counted(network(kind, pipe)) as counter:

        def evaluations(guidance: Any, steps: int = STEPS, **options: Any) -> list[int]:
            counter.calls.clear()
            with fs.guide(pipe, guidance, **options) as handle:
                kind.call(pipe, steps)
            assert handle.nfe == counter.rows
            assert counter.rows == sum(sum(r.rows.values()) for r in handle.trace())
            return [sum(r.rows.values()) for r in handle.trace()]

        everything = evaluations(cfg + fs.AdaptiveGuidance(2.0))
        n = len(everything)
        assert everything == [ways] * n
        assert evaluations(cfg + fs.AdaptiveGuidance(-1.0)) == [ways] + [1] * (n - 1)
        assert evaluations(fs.CFG(kind.w, start=0.0, stop=0.5)) == [ways] * int(0.5 * n) + [1] * (
            n - int(0.5 * n)
        )
        assert evaluations(fs.CFG(1.0)) == [1] * n
        skip = fs.Extrapolate("h2/s2", protect_first=0, protect_last=0)
        without = patterned_steps(n, 2, 2, 0, 0)
        assert evaluations(cfg, skip=skip) == [0 if i in without else ways for i in range(n)]
        unconditional = evaluations(cfg, 16, skip=fs.Extrapolate("h2/s2", branch="unconditional"))
        assert 1 in unconditional and 0 not in unconditional


@kinds(("sd", "wan"))
def test_every_sample_has_its_own_latch(kind: Kind) -> None:
    """The network runs on fewer rows, and a sample gets what it would have got alone."""
    pipe = kind.pipeline()
    with counted(network(kind, pipe)) as counter:
        handle = fs.guide(pipe, fs.CFG(kind.w) + fs.AdaptiveGuidance(2.0))
        kind.call(pipe, **kind.two)
        cosines = torch.stack([r.cosine for r in handle.trace() if r.cosine is not None])
        handle.remove()
        threshold = float(cosines[:-1].amax(0).double().mean())  # one of the samples reaches it
        for policy in ("per_sample", "all", "any"):
            counter.calls.clear()
            with fs.guide(pipe, fs.CFG(kind.w) + fs.AdaptiveGuidance(threshold, policy=policy)) as handle:
                kind.call(pipe, **kind.two)
            rows = [r.rows.get("unconditional", 0) for r in handle.trace()]
            assert handle.nfe == counter.rows
            ran = sum(sum(r.rows.values()) for r in handle.trace())
            assert ran == counter.rows or kind.case == "ltx2"  # where the sound asked for more than the video
            assert rows == sorted(rows, reverse=True)
            assert policy != "per_sample" or 1 in rows or kind.case == "pixart"  # its samples agree to 1e-7
            assert policy == "per_sample" or set(rows) <= {0, 2}


def test_a_controlnet_runs_with_its_network() -> None:
    kind = ALL["controlnet"]
    pipe = kind.pipeline()
    with counted(pipe.controlnet) as control, counted(pipe.unet) as unet:
        for guidance, skip in (
            (fs.CFG(3.0) + fs.AdaptiveGuidance(-1.0), None),
            (fs.CFG(3.0), fs.Extrapolate("h2/s2", protect_first=0, protect_last=0)),
        ):
            control.calls.clear()
            unet.calls.clear()
            with fs.guide(pipe, guidance, skip=skip):
                kind.call(pipe)
            assert control.calls == unet.calls
        own = kind.call(pipe, guess_mode=True)
        with fs.guide(pipe, 3.0):
            assert close(kind.call(pipe, guess_mode=True), own) < 1e-5


def test_without_guidance_of_its_own_the_pipelines_applies() -> None:
    for name, changes in (("sd", {"guidance_rescale": 0.5}), ("qwen", {}), ("z_image", {})):
        kind = KINDS[name]
        pipe = kind.pipeline()
        own = kind.call(pipe, **changes)
        with fs.guide(pipe):
            assert close(kind.call(pipe, **changes), own) < 1e-5
        with fs.guide(pipe, fs.CFG(start=0.5)):  # the scale is the pipeline's, too
            assert close(kind.call(pipe, **changes), own) > 1e-5
        with fs.guide(pipe, skip="h2/s2") as handle:
            kind.call(pipe, steps=12, **changes)
            assert any(r.skipped for r in handle.trace())


def test_a_pipeline_with_embedded_guidance_needs_no_negative_prompt() -> None:
    kind = KINDS["flux"]
    pipe, off = kind.pipeline(), {"true_cfg_scale": 1.0}
    own = kind.call(pipe, **off)
    with fs.guide(pipe, 1.0) as handle:
        assert torch.equal(kind.call(pipe, **off), own)
        assert handle.nfe == STEPS
    with fs.guide(pipe, skip="h2/s2") as handle:
        kind.call(pipe, steps=12, **off)
        assert handle.nfe < 12


def test_bfloat16_of_two_calls_is_exact() -> None:
    """Whatever the pipeline's own scale: its formula gives the guided prediction to the bit."""
    kind = KINDS["flux"]
    pipe = kind.pipeline()
    pipe.transformer.to(torch.bfloat16)
    try:
        half = {k: v.bfloat16() for k, v in kind_arguments(kind).items() if k.endswith("embeds")}
        with fs.guide(pipe, 3.0):
            first = kind.call(pipe, **half, true_cfg_scale=1.7)
            assert torch.equal(kind.call(pipe, **half, true_cfg_scale=13.0), first)
    finally:
        pipe.transformer.to(torch.float32)


def kind_arguments(kind: Kind) -> dict[str, Any]:
    return {**guided_pipelines.CASES[kind.case].arguments(), **kind.changes()}


def test_zero_velocity_under_a_pipeline_that_divides_by_its_norm() -> None:
    for name, changes in (("qwen", {}), ("ltx", {"guidance_rescale": 0.7})):
        kind = KINDS[name]
        pipe = kind.pipeline()
        with fs.guide(pipe, fs.CFGZeroStar(kind.w, zero_steps=1)) as handle:
            assert torch.isfinite(kind.call(pipe, **changes)).all()
            assert handle.trace()[0].skipped and handle.nfe == 2 * (STEPS - 1)


def test_removal_leaves_nothing() -> None:
    kind = KINDS["sd"]
    pipe = kind.pipeline()
    parts = (pipe, pipe.unet, pipe.scheduler)
    before = [(type(part), set(part.__dict__)) for part in parts]
    handle = fs.guide(pipe, fs.APG(3.0))
    for part, (cls, _) in zip(parts, before):
        assert isinstance(part, cls) and type(part).__name__ == cls.__name__
        assert type(part).__module__ == cls.__module__
    assert type(copy.deepcopy(pipe.scheduler)) is before[2][0]
    assert type(pickle.loads(pickle.dumps(pipe.unet))) is before[1][0]
    handle.remove()
    assert [(type(part), set(part.__dict__)) for part in parts] == before
    handle.remove()  # once more does no harm


def test_pipelines_with_the_same_parts() -> None:
    """One guided and one plain pipeline share network and scheduler; two guided ones share a network."""
    kind, other = KINDS["sd"], ALL["img2img"]
    pipe = kind.pipeline()
    plain = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    own = kind.call(plain)
    image = other.pipeline()
    assert image.unet is pipe.unet
    own_image = other.call(image)
    with fs.guide(pipe, fs.APG(9.0)) as handle, fs.guide(image, 3.0) as second:
        guided = kind.call(pipe)
        assert torch.equal(kind.call(plain), own)
        assert close(other.call(image), own_image) < 1e-5
        assert handle.nfe == 2 * len(handle.trace()) > second.nfe == 2 * len(second.trace())
        second.remove()
        assert torch.equal(kind.call(pipe), guided)
        assert torch.equal(other.call(image), own_image)


def test_threads_share_a_guided_pipeline() -> None:
    kind = KINDS["sdxl"]
    pipe = kind.pipeline()
    pipe.scheduler = fs.FewStepScheduler.from_config(pipe.scheduler.config, solver="dpmpp_2m")
    with fs.guide(pipe, fs.APG(5.0) + fs.AdaptiveGuidance(-1.0)) as handle:

        def request(steps: int) -> tuple[torch.Tensor, int]:
            return guided_pipelines.CASES["sdxl"].call(pipe, steps, steps), handle.nfe

        alone = [request(steps) for steps in (3, 4, 5, 6)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(request, (3, 4, 5, 6)))
    assert [n for _, n in alone] == [n for _, n in together] == [4, 5, 6, 7]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(alone, together))


def test_a_scheduler_that_was_replaced() -> None:
    kind = KINDS["sdxl"]
    pipe = kind.pipeline()
    with fs.guide(pipe, 3.0) as handle:
        kind.call(pipe)
        before = pipe.scheduler
        pipe.scheduler = diffusers.DDIMScheduler.from_config(before.config)
        guided = kind.call(pipe)
        assert handle.nfe == 2 * STEPS and [r.step for r in handle.trace()] == list(range(STEPS))
        assert type(before) is diffusers.EulerDiscreteScheduler
    assert close(guided, kind.call(pipe)) < 1e-4  # DDIM divides by alpha, 0.07 at first


def test_a_run_that_was_interrupted() -> None:
    kind = KINDS["flux"]
    pipe = kind.pipeline()

    def stop(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            raise KeyboardInterrupt
        return values

    with fs.guide(pipe, fs.APG(3.0)) as handle:
        whole = kind.call(pipe)
        with pytest.raises(KeyboardInterrupt):
            kind.call(pipe, callback_on_step_end=stop)
        assert handle.nfe == 6
        assert torch.equal(kind.call(pipe), whole)
