r"""What a network predicts, and the affine maps between the predictions.

At ``x = alpha x_0 + sigma eps`` (a, s for short) every prediction is an affine function of every other, with
coefficients that depend on the time only:

===========  ==================================  =====================
name         meaning                             denoised x_0 from it
===========  ==================================  =====================
epsilon      the noise eps                       (x - s m) / a
denoised     the clean sample x_0                m
v            a eps - s x_0                       (a x - s m) / (a^2 + s^2)
flow         eps - x_0, the flow velocity        (x - s m) / (a + s)
===========  ==================================  =====================
"""

from __future__ import annotations

from typing import Literal, get_args

from .grid import Node

Prediction = Literal["epsilon", "denoised", "v", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def conversion(source: Prediction, target: Prediction, node: Node) -> tuple[float, float]:
    """``(c_x, c_m)`` such that ``target = c_x x + c_m source`` at a node; both 1-d limits are exact.

    Raises ValueError where the source does not determine the target: an epsilon prediction at alpha = 0, a
    denoised one at sigma = 0.
    """
    if source == target:
        return 0.0, 1.0
    a, s = node.alpha, node.sigma
    if source == "epsilon" and a == 0.0:
        raise ValueError(
            f"an epsilon prediction says nothing about the data at t = {node.t:g}, where alpha = 0 "
            "(zero terminal SNR); use a v or denoised prediction, or start at a node with some signal"
        )
    if source == "denoised" and s == 0.0:
        raise ValueError(
            f"a denoised prediction says nothing about the noise at t = {node.t:g}, where sigma = 0"
        )
    q = a * a + s * s
    match source, target:
        case "epsilon", "denoised":
            return 1 / a, -s / a
        case "epsilon", "flow":
            return -1 / a, (a + s) / a
        case "epsilon", "v":
            return -s / a, q / a
        case "denoised", "epsilon":
            return 1 / s, -a / s
        case "denoised", "flow":
            return 1 / s, -(a + s) / s
        case "denoised", "v":
            return a / s, -q / s
        case "v", "denoised":
            return a / q, -s / q
        case "v", "epsilon":
            return s / q, a / q
        case "v", "flow":
            return (s - a) / q, (a + s) / q
        case "flow", "denoised":
            return 1 / (a + s), -s / (a + s)
        case "flow", "epsilon":
            return 1 / (a + s), a / (a + s)
        case "flow", "v":
            return (a - s) / (a + s), q / (a + s)
    raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {source!r} and {target!r}")
