"""Every registered method: text, documentation, order, copies, and the cost of plain guidance."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re

import pytest
import torch
from guidance_runs import EDM_NODE, noise, run_of, two_gaussians

import fewstep as fs
from fewstep.guidance import Guidance, Method, methods, options_of, parse
from fewstep.guidance.method import HOOKS

ALL = list(methods().items())
IDS = [name for name, _ in ALL]


@pytest.mark.parametrize(("name", "method"), ALL, ids=IDS)
def test_documentation_names_every_option_and_the_source(name, method):
    text = inspect.getdoc(method) or ""
    for option in dataclasses.fields(method):
        assert re.search(rf"``[^`]*\b{option.name}\b", text), (
            f"{option.name} of {name} is not in its documentation"
        )
    assert len(re.findall(r"https?://\S+", method.reference)) == 1 and method.reference.count(", http") == 1
    assert method.experimental == ("xperimental" in text)


@pytest.mark.parametrize(("name", "method"), ALL, ids=IDS)
def test_text(name, method):
    made = method()
    assert parse(name) == Guidance((made,)) or not made.__dataclass_params__.eq
    assert parse(parse(name).spec).spec == parse(name).spec == name
    for option in options_of(method).values():
        if option.annotation is not str:
            with pytest.raises(ValueError, match=rf"option {option.name!r} of guidance|guidance scale"):
                method(**{option.name: object()})
    with pytest.raises(ValueError, match="has no option 'nonsense'"):
        parse(f"{name}:nonsense=1")
    assert getattr(fs, method.__name__) is method


@pytest.mark.parametrize(("name", "method"), ALL, ids=IDS)
def test_it_can_be_copied_and_is_frozen(name, method):
    made = method()
    assert copy.deepcopy(made) is made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.scale = 3.0


def test_ranks_are_different_where_the_order_matters():
    for hook in HOOKS:
        ranks = [m.rank for _, m in ALL if getattr(m, hook) is not getattr(Method, hook) and m.rank != 75]
        assert len(ranks) == len(set(ranks)), hook


def test_the_order_of_addition_does_not_matter():
    parts = [fs.APG(10.0), fs.CADS(), fs.AdaptiveGuidance(0.99), fs.Rescale(0.5)]
    forward, backward = parts[0] + parts[1], parts[3] + parts[2]
    one, other = forward + backward, backward + forward
    assert one == other and [m.name for m in one.methods] == ["adaptive", "cads", "apg", "rescale"]
    assert one.spec == "adaptive:threshold=0.99+cads+apg:scale=10.0+rescale:phi=0.5" == str(one)
    assert parse(one.spec) == one
    assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cfg:3+apg:4", "both give a scale, 3 and 4"),
        ("cfg:3+cfg:3", "is there twice"),
        ("fdg+perp_neg", "both decide the combination"),
        ("apg:3,form=diffusers+mambo", "both decide the combination"),
        ("adaptive+linear", "both decide when the unconditional branch runs"),
        ("dps+mmps", "both decide the agreement with a measurement"),
        ("cfg:-1", "must be >= 0"),
        ("cfg:1e999", "finite number"),
        ("apg:eta=x", "must be a number"),
        ("apgg", "did you mean 'apg'"),
        ("cads:tau=0.5", "did you mean 'tau"),
        ("cfg:start=1.5", ">= 0 and <= 1"),
        ("", "no guidance ''"),
    ],
)
def test_contradictions_and_mistakes(text, words):
    with pytest.raises(ValueError, match=words):
        fs.sample(two_gaussians(), noise(1, 2), guidance=text)


def test_wrong_types():
    for guidance in ([3.0], object()):
        with pytest.raises(TypeError, match=r"such as fs\.CFG\(5\.0\)"):
            fs.sample(two_gaussians(), noise(1, 2), guidance=guidance)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite number"):
        parse(True)
    with pytest.raises(TypeError):
        _ = fs.CFG(3.0) + 4.0  # type: ignore[operator]


def test_plain_guidance_has_no_session_and_others_have_one():
    denoiser = two_gaussians()
    assert parse(3.0).bind(denoiser).session is None
    assert parse("cfg:3,high=2").bind(denoiser).session is not None
    node = fs.schedules.TimeGrid.from_levels(denoiser.noise_schedule, [2.0, 1.0])[0]
    x = noise(2, 3)
    assert torch.equal(parse(3.0).bind(denoiser)(x, node), parse("cfg:3,high=9").bind(denoiser)(x, node))


def test_one_reads_as_no_guidance_and_needs_no_network():
    alone = two_gaussians()
    alone.unconditional = None
    x = noise(2, 3)
    assert torch.equal(fs.sample(alone, x, guidance="cfg:1"), fs.sample(two_gaussians(), x))
    for text in ("apg:4", "cfg:4", "cfgpp"):
        with pytest.raises(ValueError, match="unconditional=fn"):
            fs.sample(alone, x, "ddim", guidance=text)


def test_a_host_without_what_is_needed_is_told():
    run = run_of([EDM_NODE] * 4, noise=None)
    cases = {
        "pcg": "draws noise",
        "cads": "changes the condition",
        "minority": "draws noise",
    }
    for text, words in cases.items():
        with pytest.raises(ValueError, match=words):
            parse(text).session(run)
    with pytest.raises(ValueError, match="evaluations of its own|state between steps"):
        parse("pcg").session(run_of([EDM_NODE] * 4, noise=lambda like, *key: like, moves=False))
    with pytest.raises(ValueError, match="know the steps"):
        parse("apg:3+adaptive").session(run_of([]))


def test_guidance_in_adaptive_steps():
    x = noise(2, 3)
    result = fs.sample_adaptive(two_gaussians(), x, guidance="tcfg:3+rescale:0.3")
    assert torch.isfinite(result.x).all()
    plain = fs.sample_adaptive(two_gaussians(), x, guidance=3.0)
    assert torch.equal(plain.x, fs.sample_adaptive(two_gaussians(), x, guidance="cfg:3,high=1e9").x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "text",
    [
        "apg:5",
        "cfg:5+rescale",
        "tcfg:5",
        "cfg_zero:5",
        "mambo:5",
        "cfg:5+mahiro",
        "cfgpp",
        "cfg:3+extrapolate",
    ],
)
def test_half_precision_keeps_its_type_and_is_close(text, dtype):
    x = noise(2, 8)
    single = fs.sample(two_gaussians(), x.float(), "ddim", steps=8, guidance=text)
    half_network = two_gaussians()
    networks = half_network.fn, half_network.unconditional
    half_network.fn = lambda x, t: networks[0](x.float(), t).to(dtype)
    half_network.unconditional = lambda x, t: networks[1](x.float(), t).to(dtype)  # type: ignore[misc]
    half = fs.sample(half_network, x.to(dtype), "ddim", steps=8, guidance=text)
    assert half.dtype == dtype
    assert float((half.float() - single).abs().max()) < 0.35 * float(single.abs().max())
