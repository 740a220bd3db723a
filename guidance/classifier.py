"""Guidance by a classifier: of noisy states by its gradient, of clean estimates without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch

from .gradient import gradient_at, towards
from .method import Method, method
from .predictor import Network
from .run import Call, Run
from .tensors import like, wide

if TYPE_CHECKING:
    from .composition import Guidance


def times(call: Call) -> torch.Tensor:
    """What a network is given as t: fp32, one for each sample."""
    return torch.full((call.x.shape[0],), call.node.t, dtype=torch.float32, device=call.x.device)


@method(
    "classifier",
    rank=75,
    reference="Diffusion Models Beat GANs on Image Synthesis, https://arxiv.org/abs/2105.05233",
)
@dataclass(frozen=True)
class ClassifierGuidance(Method):
    """Classifier guidance, ``eps - sigma scale grad_x log p(y | x_t)``: that gradient times scale in the score.

    ``log_prob(x, t) -> (B,)`` is log p of the wanted classes at noisy states; the classifier must know noise.
    ``scale`` is the inverse of a temperature. No evaluation of the network is added; the classifier runs forward and
    backward once in each. Without signal (alpha = 0) nothing is added.
    """

    scale: float = 1.0
    _: KW_ONLY
    log_prob: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    needs_autograd = True
    several = True

    def check(self, run: Run, guidance: Guidance) -> None:
        if self.log_prob is None:
            raise ValueError(
                "guidance 'classifier' needs log_prob(x, t) -> (B,), log p(y | x_t) of a noise-aware classifier"
            )

    def add(
        self,
        g: torch.Tensor,
        c: torch.Tensor,
        predictions: Mapping[str, torch.Tensor],
        call: Call,
        state: None,
    ) -> torch.Tensor:
        assert self.log_prob is not None
        with torch.enable_grad():
            x = call.x.detach().requires_grad_()
            score = gradient_at(self.log_prob(x, times(call)), x)
        return towards(g, self.scale * score, call)


@method(
    "gfcg",
    rank=76,
    reference="Gradient-Free Classifier Guidance for Diffusion Model Sampling, https://arxiv.org/abs/2411.15393",
    experimental=True,
)
@dataclass(frozen=True, eq=False)
class GradientFreeClassifierGuidance(Method):
    """Gradient-free classifier guidance, ``D + (w_t - 1) (D - D_ref)``: away from the class it is most confused with.

    A classifier of clean samples, ``classifier(x_0) -> logits (B, K)``, sees the estimate D of each step. The
    reference is the strongest wrong class and ``w_t = 1 + (w - 1) (1 - p_target)``. ``scale`` is w. ``target`` holds
    the wanted classes, (B,), and ``with_label(x, t, labels)`` is the network under other labels. ``reference_class(p,
    target) -> labels`` and ``strength(p_target, w) -> w_t`` replace the two rules.

    Costs one evaluation and one run of the classifier a step. Experimental: the published map of p to the scale could
    not be read.
    """

    scale: float = 2.0
    _: KW_ONLY
    classifier: Callable[[torch.Tensor], torch.Tensor] | None = None
    with_label: Network | None = None
    target: torch.Tensor | None = None
    reference_class: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    strength: Callable[[torch.Tensor, float], torch.Tensor] | None = None

    needs_evaluate = True

    def check(self, run: Run, guidance: Guidance) -> None:
        for name in ("classifier", "with_label", "target"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"guidance 'gfcg' needs {name}: classifier(x_0) -> logits, with_label(x, t, labels), target (B,)"
                )

    def add(
        self,
        g: torch.Tensor,
        c: torch.Tensor,
        predictions: Mapping[str, torch.Tensor],
        call: Call,
        state: None,
    ) -> torch.Tensor:
        assert self.classifier is not None and self.with_label is not None and call.evaluate is not None
        assert self.target is not None
        network, target = self.with_label, self.target.to(c.device)
        p = self.classifier(call.to(c, "denoised")).softmax(dim=-1)
        labels = (self.reference_class or strongest_wrong)(p, target)
        own = p.gather(1, target[:, None])[:, 0]
        w = self.strength(own, self.scale) if self.strength else 1.0 + (self.scale - 1.0) * (1.0 - own)
        other = wide(call.evaluate(lambda x, t: network(x, t, labels), call.x, call.node))
        return g + like(w - 1.0, c) * (c - other)


def strongest_wrong(p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The likeliest class besides the target, (B,)."""
    return p.scatter(1, target[:, None], -1.0).argmax(dim=1)
