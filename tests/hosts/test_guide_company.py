"""Guided pipelines in company: compiled, offloaded and cached networks, and what is refused, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import guided_pipelines
from guided_pipelines import ALL, KINDS, STEPS, Kind, close, counted
from tiny_pipelines import CASES, diffusers, randn

import fewstep as fs
from fewstep.hosts.guide import GuidanceNotApplied, classes

# -- compiled, offloaded, cached --------------------------------------------------------------------------------------


def _compiled_in_place(pipe: Any, backend: Any) -> None:
    pipe.transformer.compile(fullgraph=True, backend=backend)


def _wrapped(pipe: Any, backend: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)


@pytest.mark.parametrize("compiled", [_compiled_in_place, pytest.param(_wrapped, marks=pytest.mark.full)])
def test_a_compiled_network_stays_one_graph(compiled: Any) -> None:
    """One graph for both branches and one for the conditional alone; the guidance is outside of them."""
    kind, graphs = KINDS["pixart"], []
    pipe = kind.pipeline()
    plain = pipe.transformer
    guidance = fs.CFG(kind.w) + fs.AdaptiveGuidance(-1.0)
    with fs.guide(pipe, guidance):
        eager = kind.call(pipe)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    try:
        compiled(pipe, backend)
        with fs.guide(pipe, guidance) as handle:
            assert close(kind.call(pipe), eager) < 1e-5
            assert handle.nfe == STEPS + 1
        assert len(graphs) == 2
    finally:
        pipe.transformer = plain
        plain._compiled_call_impl = None
        torch._dynamo.reset()


def test_hooks_of_accelerate_before_and_after() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    kind = KINDS["sdxl"]
    pipe = kind.pipeline()
    with fs.guide(pipe, fs.APG(3.0)):
        alone = kind.call(pipe)
    for first in (True, False):
        if first:
            hooks.add_hook_to_module(pipe.unet, hooks.AlignDevicesHook("cpu", io_same_device=True))
        with fs.guide(pipe, fs.APG(3.0)):
            if not first:
                hooks.add_hook_to_module(pipe.unet, hooks.AlignDevicesHook("cpu", io_same_device=True))
            assert torch.equal(kind.call(pipe), alone)
        hooks.remove_hook_from_module(pipe.unet)


@pytest.mark.parametrize("name", ["flux", "ltx"])
def test_caches_of_features(name: str) -> None:
    """As without guidance; where fewer rows run, the cache begins anew; what cannot go with it says so."""
    kind = KINDS[name]
    pipe = kind.pipeline()
    plain = pipe.transformer
    if len(plain.transformer_blocks) == 1 and name == "ltx":  # the cache is about the blocks after the first
        pipe.transformer = type(plain).from_config(plain.config, num_layers=2).eval().requires_grad_(False)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    try:
        own = kind.call(pipe)
        with fs.guide(pipe, kind.own):
            assert close(kind.call(pipe), own) < 1e-5
        with fs.guide(pipe, fs.CFG(kind.w) + fs.AdaptiveGuidance(-1.0)) as handle:
            assert torch.isfinite(kind.call(pipe)).all()
            assert handle.nfe == STEPS + 1
        with fs.guide(pipe, fs.CADS()), pytest.raises(ValueError, match="disable_cache"):
            kind.call(pipe)
    finally:
        pipe.transformer.disable_cache()
        pipe.transformer = plain


def test_a_module_whose_class_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a hook of diffusers instead."""
    kind = KINDS["sdxl"]
    pipe = kind.pipeline()
    with fs.guide(pipe, fs.APG(3.0)):
        expected = kind.call(pipe)
    subclass = classes._subclass

    def refuse(base: type, methods: Any) -> type:
        if issubclass(base, torch.nn.Module):
            raise TypeError("object layout differs")
        return subclass(base, methods)

    monkeypatch.setattr(classes, "_subclass", refuse)
    own = kind.call(pipe)
    with fs.guide(pipe, fs.APG(3.0)):
        assert torch.equal(kind.call(pipe), expected)
    assert torch.equal(kind.call(pipe), own)
    assert not pipe.unet._diffusers_hook.hooks


# -- further inputs and branches of pipelines -------------------------------------------------------------------------


def test_an_image_prompt() -> None:
    """The embeddings of an IP-adapter lie in lists and are divided with the batch."""
    kind = KINDS["sd"]
    pipe = guided_pipelines.with_image_prompt(kind)
    given = {"ip_adapter_image_embeds": [randn(2, 1, 1, 8, seed=5)]}
    own = kind.call(pipe, **given)
    with fs.guide(pipe, 3.0):
        assert close(kind.call(pipe, **given), own) < 1e-5
    with fs.guide(pipe, fs.CFG(3.0) + fs.AdaptiveGuidance(-1.0)) as handle, counted(pipe.unet) as counter:
        kind.call(pipe, **given)
        assert counter.calls == [2, *[1] * STEPS] and handle.nfe == STEPS + 2


def test_weak_branches_of_a_pipelines_own() -> None:
    """Stable Diffusion 3 and LTX 2 add ``s (c - weak)``: with our guidance it stays what it was."""
    uses = (
        ("sd3", {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.8}),
        ("ltx2", {"stg_scale": 1.0, "audio_stg_scale": 1.0, "modality_scale": 2.0}),
    )
    for name, changes in uses:
        kind = ALL[name]
        pipe = kind.pipeline()
        own = kind.call(pipe, **changes)
        assert close(own, kind.call(pipe)) > 1e-4
        with fs.guide(pipe, kind.own), counted(pipe.transformer) as counter:
            guided = kind.call(pipe, **changes)
        assert close(guided, own) < 1e-5
        with fs.guide(pipe, kind.own) as handle:
            kind.call(pipe, **changes)
        assert handle.nfe == counter.rows > 2 * STEPS


def test_the_sound_of_a_video_may_have_its_own_guidance() -> None:
    kind = ALL["ltx2"]
    pipe = kind.pipeline()
    own = pipe(**_full(kind, audio_guidance_scale=7.0))
    with fs.guide(pipe, 3.0, audio=7.0):
        guided = pipe(**_full(kind, audio_guidance_scale=2.0))
    assert close(guided.frames, own.frames) < 1e-5 and close(guided.audio, own.audio) < 1e-5


def _full(kind: Kind, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    given = {**CASES[kind.case].arguments(), **kind.changes(), **changes}
    return {**given, "generator": generator, "num_inference_steps": STEPS}


def test_two_networks_one_after_the_other() -> None:
    """Wan 2.2 changes its network on the way: both are guided, the momentum begins anew, the latch stays."""
    kind = KINDS["wan"]
    single = kind.pipeline()
    parts = {
        **single.components,
        "transformer_2": single.transformer.__class__.from_config(single.transformer.config),
    }
    pipe = diffusers.WanPipeline(**{**parts, "boundary_ratio": 0.8})
    pipe.set_progress_bar_config(disable=True)
    own = kind.call(pipe)
    with fs.guide(pipe, kind.own) as handle, counted(pipe.transformer, pipe.transformer_2) as counter:
        assert close(kind.call(pipe), own) < 1e-5
        assert handle.nfe == counter.rows == 2 * STEPS
    with fs.guide(pipe, fs.APG(kind.w) + fs.AdaptiveGuidance(-1.0)) as handle:
        kind.call(pipe)
        assert handle.nfe == STEPS + 1


def test_linear_guidance_is_fitted_and_used_in_a_pipeline(tmp_path: Path) -> None:
    kind = KINDS["sdxl"]
    pipe = kind.pipeline()
    recorder = fs.guidance.Recorder()
    with fs.guide(pipe, fs.CFG(kind.w) + recorder):
        own = kind.call(pipe)
        kind.call(pipe, seed=1)
    recorder.fit(ridge=1e-9).save(tmp_path / "linear.json")
    linear = fs.LinearAG(str(tmp_path / "linear.json"), evaluate=(0, 1, 3))
    with fs.guide(pipe, fs.CFG(kind.w) + linear) as handle:
        assert close(kind.call(pipe), own) < 1e-2  # it has seen this sample
        assert handle.nfe == STEPS + 3
        with pytest.raises(ValueError, match="fit them again"):
            kind.call(pipe, steps=8)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_that_copies_predictions_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would sample from something else than the guided prediction: the first step says so."""
    kind = KINDS["flux"]
    pipe = kind.pipeline()
    with fs.guide(pipe, 3.0):
        guided = type(pipe.transformer)
        inner = guided.__call__
        monkeypatch.setattr(guided, "__call__", lambda m, *a, **k: (inner(m, *a, **k)[0].clone(),))
        with pytest.raises(GuidanceNotApplied, match="FluxPipeline gave its scheduler something else"):
            kind.call(pipe)
        monkeypatch.undo()
        assert torch.isfinite(kind.call(pipe)).all()


def test_misuse_is_refused_before_any_work() -> None:
    kind = KINDS["sdxl"]
    pipe = kind.pipeline()
    with counted(pipe.unet) as counter:
        for guidance, changes, word in (
            (fs.CFG(3.0), {"guidance_scale": 1.0}, "pass guidance_scale > 1"),
            (fs.CADS() + fs.APG(), {"guidance_scale": 1.0}, "needs a scale"),
            (fs.PerpNeg(3.0), {}, "give it as an option"),
            (fs.AutoGuidance(2.0), {}, "give it as an option"),
            (fs.CFG(3.0) + fs.SLG(), {}, "no list of transformer blocks"),
            (fs.CFG(3.0) + fs.LinearAG(), {}, "Recorder"),
            (fs.FDG() + fs.CFG(2.0), {}, "leave the other out"),
        ):
            with pytest.raises(ValueError, match=word), fs.guide(pipe, guidance):
                kind.call(pipe, **changes)
        with fs.guide(pipe, 3.0), pytest.raises(ValueError, match="remove\\(\\) of its handle first"):
            fs.guide(pipe, 4.0)
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        for guidance in (fs.PCG(3.0), fs.CFGPlusPlus(0.5)):
            with pytest.raises(ValueError, match="solver='ddim'"), fs.guide(pipe, guidance):
                kind.call(pipe)
    assert not counter.calls
    for guidance, word in ((-1.0, ">= 0"), ("cfgg:3", "cfg"), ("cfg:2+apg:3", "both give a scale")):
        with pytest.raises(ValueError, match=word):
            fs.guide(pipe, guidance)
    with pytest.raises(TypeError, match="skip is"):
        fs.guide(pipe, 3.0, skip=fs.CFG(2.0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pipeline of diffusers"):
        fs.guide(pipe.unet, 3.0)


def test_a_flow_pipeline_without_a_negative_prompt() -> None:
    kind = KINDS["flux"]
    pipe = kind.pipeline()
    with fs.guide(pipe, 3.0), pytest.raises(ValueError, match="true_cfg_scale > 1 and negative_prompt"):
        kind.call(pipe, negative_prompt_embeds=None, negative_pooled_prompt_embeds=None)


def test_what_belongs_to_three_branches_or_a_controlnet() -> None:
    for name in ("controlnet", "instruct"):
        kind = ALL[name]
        pipe = kind.pipeline()
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        with fs.guide(pipe, fs.PCG(3.0)), pytest.raises(ValueError, match="fs.sample"):
            kind.call(pipe)


def test_guidance_that_ends_early_in_the_pipeline() -> None:
    """Z-Image can leave its unconditional branch out from some time on."""
    kind = KINDS["z_image"]
    pipe = kind.pipeline()
    with fs.guide(pipe, 4.0), pytest.raises(GuidanceNotApplied, match="end its guidance early"):
        kind.call(pipe, cfg_truncation=0.1)
    with fs.guide(pipe, fs.CFG(4.0, stop=0.1)):
        assert torch.isfinite(kind.call(pipe, cfg_truncation=0.9)).all()


def test_pipelines_that_cannot_be_guided() -> None:
    kind = KINDS["sd"]
    pipe = kind.pipeline()
    perturbed = diffusers.StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="fs.PAG"):
        fs.guide(perturbed, 3.0)
