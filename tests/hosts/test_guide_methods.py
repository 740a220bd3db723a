"""Every method of guidance in every kind of pipeline: it runs at the promised cost, or is refused with the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from guided_pipelines import KINDS, STEPS, Kind, counted

import fewstep as fs
from fewstep.schedules.skipping import patterned_steps

FAST_KINDS = ("sd", "flux", "z_image")


@dataclass(frozen=True)
class Use:
    """A method as it is used at scale w, and what it costs: evaluations of one sample in N steps.

    ``flow_cost`` is that where the first state holds no signal. ``one_step``: for schedulers that keep nothing but the
    state. ``inert``: it changes nothing as it is used here.
    """

    make: Callable[[Any, Kind], Any]
    cost: Callable[[int], int] = lambda n: 2 * n
    flow_cost: Callable[[int], int] | None = None
    one_step: bool = False
    inert: bool = False
    steps: int = STEPS


def network_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def seen(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)[:, :8]


MEASURED = torch.zeros(1, 8)
INVERSE = {"operator": seen, "measurement": MEASURED}
# A layer of the tiny networks, which have one or two.
USES: dict[str, Use] = {
    "cfg": Use(lambda p, k: fs.CFG(k.w, stop=0.5), lambda n: n + n // 2),
    "apg": Use(lambda p, k: fs.APG(k.w)),
    "cads": Use(lambda p, k: fs.CADS()),
    "adaptive": Use(lambda p, k: fs.AdaptiveGuidance(-1.0), lambda n: n + 1),
    "cfg_zero": Use(lambda p, k: fs.CFGZeroStar(k.w, zero_steps=1), lambda n: 2 * n - 2),
    "tcfg": Use(lambda p, k: fs.TCFG()),
    "fdg": Use(lambda p, k: fs.FDG((4.0, 2.0))),
    "rescale": Use(lambda p, k: fs.Rescale()),
    "cfg_norm": Use(lambda p, k: fs.CFGNorm()),
    "renorm": Use(lambda p, k: fs.Renorm()),
    "mahiro": Use(lambda p, k: fs.MaHiRo()),
    "mambo": Use(lambda p, k: fs.MAMBO(k.w)),
    "extrapolate": Use(
        lambda p, k: fs.Extrapolate("h2/s2", protect_first=0, protect_last=0),
        lambda n: 2 * (n - len(patterned_steps(n, 2, 2, 0, 0))),
        steps=6,
    ),
    "adaptive_skips": Use(
        lambda p, k: fs.Extrapolate(
            "adaptive", tolerance=math.inf, protect_first=0, protect_last=0, anchor=0
        ),
        lambda n: 2 * (n - 2),
        steps=6,
    ),
    "autoguidance": Use(lambda p, k: fs.AutoGuidance(weak=network_of(p)), lambda n: 3 * n, inert=True),
    "pag": Use(lambda p, k: fs.PAG(1.5), lambda n: 3 * n),
    "seg": Use(lambda p, k: fs.SEG(1.5), lambda n: 3 * n),
    "slg": Use(lambda p, k: fs.SLG(start=0.0, stop=1.0, layers=(0,)), lambda n: 3 * n - 1),
    "stg": Use(lambda p, k: fs.STG(layers=(0,)), lambda n: 3 * n),
    "perp_neg": Use(lambda p, k: fs.PerpNeg(k.w, negative=lambda x, t: 0.1 * x), lambda n: 3 * n),
    "pcg": Use(lambda p, k: fs.PCG(k.w), lambda n: 3 * n - 2, one_step=True),
    "cfgpp": Use(lambda p, k: fs.CFGPlusPlus(), one_step=True),
    "minority": Use(
        lambda p, k: fs.SelfGuidedMinority(every=2),
        lambda n: 2 * n + n // 2,
        lambda n: 2 * n + n // 2 - 1,
        one_step=True,
    ),
    "classifier": Use(
        lambda p, k: fs.ClassifierGuidance(log_prob=lambda x, t: -x.flatten(1).square().sum(1))
    ),
    "energy": Use(lambda p, k: fs.EnergyGuidance(energy=lambda x, t: x.flatten(1).square().mean(1))),
    "reward": Use(lambda p, k: fs.RewardGuidance(reward=lambda x: -x.flatten(1).square().mean(1))),
    "dps": Use(lambda p, k: fs.DPS(**INVERSE), one_step=True),
    "mmps": Use(lambda p, k: fs.MMPS(1, noise=0.1, **INVERSE)),
    "tmpd": Use(lambda p, k: fs.TMPD(noise=0.1, **INVERSE)),
}


def one_step(pipe: Any) -> Any:
    """A scheduler for the pipeline's model that keeps nothing but the state."""
    config = pipe.scheduler.config
    if (
        type(pipe.scheduler).__name__.startswith("FlowMatch")
        or config.get("prediction_type") == "flow_prediction"
    ):
        return fs.FewStepScheduler.from_config(config, solver="euler")
    return fs.FewStepScheduler.from_config(config, solver="ddim")


def refusal(name: str, kind: Kind) -> str | None:
    """A word of the message with which a pipeline that cannot have the method refuses it."""
    packed = kind.case in ("flux", "qwen", "ltx")
    small = kind.case in ("wan", "cogvideox", "hunyuan_video")  # 2 x 2
    if name == "fdg" and (packed or small):
        return "latents"
    if name in ("cfg_norm", "mahiro") and (packed or kind.case == "cogvideox"):
        return "Renorm"
    if name in ("slg", "stg") and kind.network == "unet":
        return "no list of transformer blocks"
    if name in ("pag", "seg") and kind.case == "sana":  # linear attention
        return "no self-attention"
    return None


FAST_METHODS = (
    "cads",
    "pag",
    "slg",
    "pcg",
    "cfgpp",
    "minority",
    "dps",
    "perp_neg",
    "adaptive_skips",
    "mahiro",
)


def matrix() -> list[Any]:
    return [
        pytest.param(
            use,
            kind,
            id=f"{name}-{n}",
            marks=() if n in FAST_KINDS and name in FAST_METHODS else pytest.mark.full,
        )
        for name, use in USES.items()
        for n, kind in KINDS.items()
    ]


@pytest.mark.parametrize(("use", "kind"), matrix())
def test_every_method(use: Use, kind: Kind, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id.rpartition("-")[0]
    pipe = kind.pipeline()
    if use.one_step or kind.case == "sd":  # PNDM calls its network once more than there are steps
        pipe.scheduler = one_step(pipe)
    network = network_of(pipe)
    word = refusal(name, kind)
    guidance = use.make(pipe, kind)
    if word:
        with pytest.raises(ValueError, match=word), counted(network) as counter, fs.guide(pipe, guidance):
            kind.call(pipe, STEPS)
        assert not counter.calls or kind.case == "sana"  # what kind of attention it has is seen in a call
        return
    plain = kind.call(pipe, use.steps)
    with fs.guide(pipe, guidance) as handle, counted(network) as counter:
        out = kind.call(pipe, use.steps)
    assert torch.isfinite(out).all()
    others = use.steps if name == "perp_neg" else 0  # a function in place of the network
    no_signal = handle.trace()[0].t == 1.0 or kind.case == "cogvideox"  # zero terminal signal
    cost = use.flow_cost if no_signal and use.flow_cost else use.cost
    assert handle.nfe == cost(use.steps) == counter.rows + others
    assert use.inert or not torch.equal(out, plain)
    assert torch.equal(kind.call(pipe, use.steps), plain)
