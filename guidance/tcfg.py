"""Tangential damping of the unconditional prediction."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch

from .method import Method, method
from .run import Call
from .tensors import inner


@method(
    "tcfg",
    rank=40,
    reference="TCFG: Tangential Damping Classifier-free Guidance, https://arxiv.org/abs/2503.18137",
)
@dataclass(frozen=True)
class TCFG(Method):
    """Tangential damping: u is projected on the first right singular vector v of c and u, ``u <- <u, v> v``; then CFG.

    v belongs to each sample and comes from the 2 x 2 matrix of scalar products: ``v = (p c + q u) / |p c + q u|`` with
    its leading eigenvector (p, q). Where c and u are orthogonal and equally long v is c's direction.

    ``scale`` is w; left out, another method gives it. ``space``: the paper's is the score, a multiple of ``epsilon``;
    ``network`` is that of the network.
    """

    scale: float | None = None
    _: KW_ONLY
    space: Literal["network", "denoised", "epsilon", "v", "flow"] = "network"

    needs_scale = True

    @property
    def weight(self) -> float | None:
        return self.scale

    def unconditional(self, c: torch.Tensor, u: torch.Tensor, call: Call, state: None) -> torch.Tensor:
        c, u = call.to(c, self.space), call.to(u, self.space)
        cc, cu, uu = inner(c, c), inner(c, u), inner(u, u)
        top = (cc + uu + torch.hypot(cc - uu, 2.0 * cu)) / 2.0
        longer = cc >= uu  # of the two forms of the eigenvector the one without cancellation
        p, q = torch.where(longer, top - uu, cu), torch.where(longer, cu, top - cc)
        length = torch.hypot(p, q)
        none = length == 0
        safe = torch.where(none, 1.0, length)
        p, q = torch.where(none, 1.0, p / safe), torch.where(none, 0.0, q / safe)
        share = (p * cu + q * uu) / torch.where(top == 0, 1.0, top)
        return call.back(share * (p * c + q * u), self.space)
