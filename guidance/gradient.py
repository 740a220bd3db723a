"""Gradients of scalar functions of the state, and the shift of a prediction that they mean."""

from __future__ import annotations

import torch

from ..schedules import conversion
from .run import Call


def gradient_at(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of every sample's own number; samples do not depend on each other."""
    return torch.autograd.grad(value.sum(), x, retain_graph=True)[0]


def towards(g: torch.Tensor, score: torch.Tensor, call: Call) -> torch.Tensor:
    """A prediction of the network with ``score`` added to the score: ``eps - sigma score``, in any form.

    Without signal (alpha = 0) there is nothing to be known about the data, and g stays.
    """
    if call.node.alpha == 0.0:
        return g
    factor = conversion("epsilon", call.run.prediction, call.node)[1]
    return torch.add(g, score.to(g.dtype), alpha=-factor * call.node.sigma)
