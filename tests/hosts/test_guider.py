"""Guidance in modular pipelines: diffusers' own guider is the reference, calls are made only where they are needed."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from tiny_pipelines import CASES, diffusers, randn

import fewstep as fs

pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_3")
guider_module = importlib.import_module("fewstep.hosts.guide.guider")
FewStepGuider = guider_module.FewStepGuider
attach_guider = importlib.import_module("fewstep.hosts.guide.guider_handle").attach_guider

STEPS, BATCH = 9, 2


def blocks(family: str, name: str) -> Any:
    return getattr(importlib.import_module(f"diffusers.modular_pipelines.{family}.denoise"), name)()


class Modular:
    """The denoising blocks of a modular pipeline around a tiny network, and the network's calls."""

    def __init__(
        self, case: str, family: str, name: str, latents: tuple[int, ...], network: str, **inputs: Any
    ) -> None:
        standard = CASES[case].pipeline()
        self.pipe = blocks(family, name).init_pipeline()
        self.network = copy.deepcopy(
            getattr(standard, network)
        )  # its hooks and calls are this pipeline's alone
        self.pipe.update_components(**{network: self.network}, scheduler=CASES[case].native())
        self.pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0))
        self.latents, self.inputs = latents, inputs
        self.rows: list[int] = []
        ran = self.network.forward

        def counted(*arguments: Any, **named: Any) -> Any:
            hidden = next((named[n] for n in ("sample", "hidden_states", "x") if n in named), *arguments[:1])
            self.rows.append(len(hidden))
            return ran(*arguments, **named)

        self.network.forward = counted

    def __call__(self, steps: int = STEPS) -> torch.Tensor:
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(steps)
        self.rows.clear()
        start = randn(BATCH, *self.latents) * getattr(scheduler, "init_noise_sigma", 1.0)
        given = {
            "timesteps": scheduler.timesteps,
            "num_inference_steps": steps,
            "latents": start,
            **self.inputs,
        }
        self.pipe.set_progress_bar_config(disable=True)
        return self.pipe(**given).get("latents")


def text(length: int, width: int, pooled: int = 0) -> dict[str, Any]:
    names = ["prompt_embeds", "negative_prompt_embeds"]
    given = {n: randn(BATCH, length, width, seed=i) for i, n in enumerate(names)}
    if pooled:
        given |= {
            n.replace("prompt", "pooled_prompt"): randn(BATCH, pooled, seed=5 + i)
            for i, n in enumerate(names)
        }
    return given


def sdxl() -> Modular:
    ids = {n: randn(BATCH, 6, seed=9) for n in ("add_time_ids", "negative_add_time_ids")}
    inputs = {"denoiser_input_fields": {**text(5, 8, 8), **ids}}
    return Modular(
        "sdxl", "stable_diffusion_xl", "StableDiffusionXLDenoiseStep", (4, 16, 16), "unet", **inputs
    )


def sd3() -> Modular:
    inputs = text(5, 8, 8)
    return Modular(
        "sd3", "stable_diffusion_3", "StableDiffusion3DenoiseStep", (16, 8, 8), "transformer", **inputs
    )


def wan() -> Modular:
    inputs = {**text(5, 16), "dtype": torch.float32}
    return Modular("wan", "wan", "WanDenoiseStep", (16, 2, 2, 2), "transformer", **inputs)


def z_image() -> Modular:
    lists = {n: list(y.unbind()) for n, y in text(5, 16).items()}
    inputs = {**lists, "dtype": torch.float32}
    return Modular("z_image", "z_image", "ZImageDenoiseStep", (4, 8, 8), "transformer", **inputs)


FAMILIES = {"sdxl": sdxl, "sd3": sd3, "wan": wan, "z_image": z_image}


@pytest.fixture(scope="module", params=FAMILIES)
def modular(request: pytest.FixtureRequest) -> Modular:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def one() -> Modular:
    return sd3()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# the pipeline's own guider is the reference -----------------------------------------------------------------------


def test_cfg_is_the_pipelines_own_and_removal_restores_it(modular: Modular) -> None:
    own, guider, config = modular(), modular.pipe.guider, dict(modular.pipe.config)
    with attach_guider(modular.pipe, "cfg:5") as handle:
        assert difference(modular(), own) < 1e-5
        assert handle.nfe == sum(modular.rows) == 2 * BATCH * STEPS
    assert modular.pipe.guider is guider and dict(modular.pipe.config) == config
    assert torch.equal(modular(), own)


def test_network_calls_are_those_of_the_plan(modular: Modular) -> None:
    own = modular()
    with attach_guider(modular.pipe, "cfg:5+adaptive:-1,min_guided_steps=3") as handle:
        modular()
        assert modular.rows == [BATCH] * (2 * 3 + STEPS - 3)  # sample evaluations, not only calls
        assert handle.nfe == sum(modular.rows)
        assert [len(r.rows) for r in handle.trace()] == [2] * 3 + [1] * (STEPS - 3)
    with attach_guider(modular.pipe, "cfg:5+adaptive:1.1") as handle:
        assert difference(modular(), own) < 1e-5 and handle.nfe == 2 * BATCH * STEPS
    with attach_guider(modular.pipe, "cfg:5,start=0.23,stop=0.56") as handle:
        modular()
        assert sum(modular.rows) == handle.nfe == BATCH * (STEPS + 3)


def test_skipped_steps_run_no_network(modular: Modular) -> None:
    with attach_guider(modular.pipe, "cfg:5", fs.Extrapolate("h2/s3")) as handle:
        first = modular()
        skipped = sum(r.skipped for r in handle.trace())
        assert skipped > 0 and len(modular.rows) == 2 * (STEPS - skipped) and handle.nfe == sum(modular.rows)
        assert torch.equal(modular(), first)
    with attach_guider(modular.pipe, "cfg:5", fs.Extrapolate("h2/s3", branch="unconditional")) as handle:
        modular()
        assert len(modular.rows) == 2 * STEPS - skipped and handle.nfe == sum(modular.rows)
    assert "forward" in vars(modular.network)  # the one that was there, as accelerate puts it


METHODS = [
    "apg:5",
    "apg:5+cads",
    "cfg:5+rescale:0.7",
    "cfg_zero:5,zero_steps=1",
    "cfg:5+mambo",
    "cfg:5+adaptive:0.99",
    "tcfg+cfg:5",
]


@pytest.mark.parametrize("guidance", METHODS)
def test_methods_run_and_a_second_run_is_the_same(one: Modular, guidance: str) -> None:
    own = one()
    with attach_guider(one.pipe, guidance):
        first = one()
        assert torch.isfinite(first).all() and not torch.allclose(first, own)
        one(7)  # a run of another length in between leaves nothing behind
        assert torch.equal(one(), first)


def test_the_state_that_methods_see_is_that_of_the_prediction(modular: Modular) -> None:
    """APG of denoised predictions is CFG without its three parts, if and only if state and level are right."""
    own = modular()
    with attach_guider(modular.pipe, "apg:5,eta=1,norm=0,momentum=0,space=denoised"):
        assert difference(modular(), own) < 1e-4
    seen = []

    class Watch(fs.APG):
        def difference(self, d: Any, c: Any, u: Any, call: Any, state: Any) -> Any:
            seen.append(
                call.to(c, "denoised") * call.node.alpha + call.node.sigma * call.to(c, "epsilon") - call.x
            )
            return super().difference(d, c, u, call, state)

    with attach_guider(modular.pipe, Watch(5.0)):
        modular()
    assert max(float(v.abs().max()) for v in seen) < 1e-4 and len(seen) == STEPS


def test_annealed_condition_reaches_the_conditional_call_only(modular: Modular) -> None:
    given: list[Any] = []
    hook = modular.network.register_forward_pre_hook(lambda m, a, k: given.append(k), with_kwargs=True)
    with attach_guider(modular.pipe, "cfg:5+cads"):
        modular()
    hook.remove()
    name = "cap_feats" if "cap_feats" in given[0] else "encoder_hidden_states"

    def stacked(y: Any) -> torch.Tensor:
        return y if isinstance(y, torch.Tensor) else torch.stack(list(y))

    conditions = [stacked(k[name]) for k in given[::2]]
    unconditional = [stacked(k[name]) for k in given[1::2]]
    assert not torch.equal(conditions[0], conditions[-1])
    assert not torch.allclose(conditions[0][0], conditions[0][1])  # samples have noise of their own
    assert all(torch.equal(y, unconditional[0]) for y in unconditional)


def hunyuan_video() -> Any:
    """A standard pipeline that owns a guider, with its latents beside two condition maps in the network's input."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(4, 4, 4, 4, 4), layers_per_block=1
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
        **parts,
    )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_standard_pipeline_with_a_guider() -> None:
    if not hasattr(diffusers, "HunyuanVideo15Pipeline"):
        pytest.skip("this diffusers has no HunyuanVideo 1.5")
    torch.manual_seed(0)
    pipe = hunyuan_video()
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
    for i, name in enumerate(("", "negative_")):
        given |= {
            f"{name}prompt_embeds": randn(1, 5, 16, seed=i),
            f"{name}prompt_embeds_mask": torch.ones(1, 5),
        }
        given |= {
            f"{name}prompt_embeds_2": randn(1, 4, 8, seed=i),
            f"{name}prompt_embeds_mask_2": torch.ones(1, 4),
        }

    def call() -> torch.Tensor:
        return pipe(**given, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).frames

    own, guider = call(), pipe.guider
    with attach_guider(pipe, "cfg:5") as handle:
        assert difference(call(), own) < 1e-5 and handle.nfe == 8
    with attach_guider(pipe, "apg:5+adaptive:-1") as handle:
        assert difference(call(), own) > 1e-4 and handle.nfe == 5
        call()  # asked before the first step whether to encode a negative prompt: the last run's end does not count
        assert handle.nfe == 5
    assert pipe.guider is guider and torch.equal(call(), own)


# a guider of its own ----------------------------------------------------------------------------------------------


def test_the_config_holds_the_guidance_as_text(one: Modular, tmp_path: Any) -> None:
    guider = FewStepGuider(fs.APG(5.0, momentum=-0.7) + fs.AdaptiveGuidance(0.98), seed=3)
    guider.save_pretrained(tmp_path)
    for again in (FewStepGuider.from_pretrained(tmp_path), guider.new(), copy.deepcopy(guider)):
        assert again.guidance == guider.guidance and again.config["seed"] == 3
    changed = guider.new(guidance="cfg:3")
    assert changed.guidance.spec == "cfg:scale=3.0"


def test_a_guider_needs_its_scheduler_and_a_disabled_one_is_conditional(one: Modular) -> None:
    before = one.pipe.guider
    guider = FewStepGuider("cfg:5")
    one.pipe.update_components(guider=guider)
    with pytest.raises(ValueError, match=r"fs\.guide"):
        one()
    guider.scheduler = one.pipe.scheduler
    guided = one()
    one.pipe.update_components(guider=before)
    assert difference(guided, one()) < 1e-5


def test_several_samples_keep_their_results(one: Modular) -> None:
    """Adaptive guidance a sample: each has the evaluations that it would have alone."""
    with attach_guider(one.pipe, "cfg:5+adaptive:0.999,policy=per_sample") as handle:
        one()
        assert [r.rows["conditional"] for r in handle.trace()] == [BATCH] * STEPS


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ("pcg:3", "evaluations of its own"),
        ("extrapolate:adaptive+cfg:5", "fixed pattern"),
        ("apg:5+cfg:3", "both give a scale"),
    ],
)
def test_what_a_guider_cannot_have_is_refused(one: Modular, guidance: str, message: str) -> None:
    before = one.pipe.guider
    with pytest.raises(ValueError, match=message):
        attach_guider(one.pipe, guidance)
    assert one.pipe.guider is before


def test_the_pipelines_own_scale_applies_where_none_is_given(one: Modular) -> None:
    own, before = one(), one.pipe.guider
    with fs.guide(one.pipe) as handle:
        assert difference(one(), own) < 1e-5 and handle.nfe == 2 * BATCH * STEPS
    with fs.guide(one.pipe, skip="h2/s3") as handle:
        one()
        assert handle.trace()[0].scale == 5.0 and 0 < handle.nfe < 2 * BATCH * STEPS
    changed = diffusers.ClassifierFreeGuidance(
        guidance_scale=4.0, use_original_formulation=True, guidance_rescale=0.3, stop=0.5
    )
    one.pipe.update_components(guider=changed)
    own = one()
    with fs.guide(one.pipe, "adaptive:1.1") as handle:
        guided = one()
    assert handle.trace()[0].scale == 5.0 and difference(guided, own) < 1e-4
    one.pipe.update_components(guider=diffusers.TangentialClassifierFreeGuidance())
    with pytest.raises(ValueError, match="give a scale"):
        fs.guide(one.pipe, "adaptive")
    one.pipe.update_components(guider=before)


def test_missing_inputs_and_a_second_guidance_are_refused() -> None:
    modular = sd3()
    with attach_guider(modular.pipe, "cfg:5"):
        with pytest.raises(ValueError, match="guided already"):
            attach_guider(modular.pipe, "cfg:5")
        for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
            del modular.inputs[name]
        with pytest.raises(ValueError, match="negative_prompt"):
            modular()
        assert not modular.rows
    with pytest.raises(ValueError, match="has no guider"):
        attach_guider(CASES["sd"].pipeline(), "cfg:5")


def test_another_scheduler_during_the_guidance(one: Modular) -> None:
    before = one.pipe.scheduler
    other = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    try:
        with attach_guider(one.pipe, "cfg:5") as handle:
            one()
            one.pipe.update_components(scheduler=other)
            guided = one()
            assert handle.guider.session.run.solver == "dpmpp_2m"
        assert difference(guided, one()) < 1e-4
    finally:
        one.pipe.update_components(scheduler=before)
