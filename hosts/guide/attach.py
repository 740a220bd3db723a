"""``guide()``: methods of guidance, and steps without the network, in pipelines of diffusers that stay as they are."""

from __future__ import annotations

from typing import Any

from ...guidance import Extrapolate, Guidance, Method
from ...guidance import parse as parse_guidance
from .check import GuidanceNotApplied
from .handle import Handle

__all__ = ["GuidanceNotApplied", "Handle", "guide"]

Spec = str | float | Method | Guidance | None


def guide(
    pipe: Any, guidance: Spec = None, *, skip: str | Extrapolate | None = None, audio: Spec = None
) -> Any:
    """Put guidance, and steps without the network, into a pipeline of diffusers, which stays as it is.

    ::

        handle = fs.guide(pipe, fs.APG(10.0) + fs.CADS(), skip="h2/s3")
        image = pipe("a photo of a cat", guidance_scale=7.5).images[0]
        print(handle.nfe, handle.trace())
        handle.remove()

    The pipeline must make its unconditional prediction: pass a ``guidance_scale`` above 1 (``true_cfg_scale`` and a
    negative prompt for FLUX, Qwen-Image and HunyuanVideo). Its value applies where ``guidance`` gives no scale of its
    own, and is not used otherwise. The network runs only for the rows that the guidance asks for, and a ControlNet with
    it.

    Args:
        pipe: a pipeline, standard or modular. One that has a guider gets another in its place.
        guidance: methods, their text (``"apg:10+cads"``) or a scale; None is the pipeline's own guidance.
        skip: steps in which no network runs and predictions are continued, :class:`fewstep.Extrapolate` or its text.
        audio: guidance of the audio of LTX 2, the same as of the video if None.

    Returns:
        The :class:`Handle`, also a context manager: ``nfe`` and ``trace()`` of the last call, ``remove()``.

    Raises:
        ValueError: for pipelines that cannot be guided or are guided already, and for methods that contradict each
            other; when the pipeline is called, before its first evaluation, for methods that it cannot have.
        GuidanceNotApplied: in a call, where the pipeline does not use the guided prediction.
    """
    chosen = _with_skip(guidance, skip)
    if getattr(pipe, "guider", None) is not None:
        from .guider_handle import attach_guider

        return attach_guider(pipe, chosen)
    return Handle(pipe, chosen, None if audio is None else _with_skip(audio, skip))


def _with_skip(guidance: Spec, skip: str | Extrapolate | None) -> Guidance | None:
    chosen = None if guidance is None else parse_guidance(guidance)
    if skip is None:
        return chosen
    if isinstance(skip, str):
        return _with_skip(chosen, _extrapolate(skip))
    if not isinstance(skip, Extrapolate):
        raise TypeError(f"skip is fs.Extrapolate(...) or its text such as 'h2/s3', got {type(skip).__name__}")
    return Guidance((skip,)) if chosen is None else chosen + skip


def _extrapolate(text: str) -> Extrapolate:
    (method,) = parse_guidance("extrapolate:" + text.removeprefix("extrapolate:")).methods
    assert isinstance(method, Extrapolate)
    return method
