"""Guidance in the place of a pipeline's guiders, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...guidance import CFG, Extrapolate, Guidance, Method, Record, Rescale
from ...guidance import parse as parse_guidance
from .guider import FewStepGuider

_SLOTS = ("guider", "guider_2", "ocr_guider")
"""What pipelines call their guiders; two of a pipeline get one and the same, which goes on from one to the other."""


class GuiderHandle:
    """Guidance that stands in for the guiders of a pipeline, until :meth:`remove`; also a context manager.

    ``nfe`` counts evaluations of one sample in the last call of the pipeline, ``trace()`` has a record for each step.
    """

    def __init__(self, pipe: Any, guider: FewStepGuider) -> None:
        self.pipe, self.guider = pipe, guider
        self._before = {n: g for n in _SLOTS if (g := getattr(pipe, n, None)) is not None}
        if not self._before:
            raise ValueError(f"{type(pipe).__name__} has no guider: it makes no unconditional prediction")
        for name, before in self._before.items():
            if isinstance(before, FewStepGuider) and before.scheduler is not None:
                raise ValueError(
                    f"{type(pipe).__name__}.{name} is guided already; remove that guidance first"
                )
        _put(pipe, dict.fromkeys(self._before, guider))
        guider.scheduler = lambda: pipe.scheduler

    @property
    def nfe(self) -> int:
        return self.guider.nfe

    def trace(self) -> list[Record]:
        """Scale, rows that ran, cosine and whether it was skipped, for every evaluation of the last call."""
        return [] if self.guider.session is None else list(self.guider.session.trace)

    def remove(self) -> None:
        """Give the pipeline its own guiders back."""
        if self._before:
            _put(self.pipe, self._before)
            self._before = {}
            self.guider.scheduler = None

    def __enter__(self) -> GuiderHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _put(pipe: Any, guiders: Mapping[str, Any]) -> None:
    """Make them the pipeline's components."""
    if hasattr(pipe, "update_components"):
        pipe.update_components(**guiders)
    else:
        pipe.register_modules(**guiders)


def attach_guider(
    pipe: Any,
    guidance: str | float | Method | Guidance | None,
    skip: Extrapolate | None = None,
    seed: int = 0,
) -> GuiderHandle:
    """Put guidance in the place of a pipeline's guiders.

    Args:
        pipe: a modular pipeline, or another one with a ``guider`` component.
        guidance: methods, their text or a scale. Where they give no scale, and for None, the pipeline's own applies.
        skip: steps in which no network runs.
        seed: for methods that draw noise.

    Raises:
        ValueError: the pipeline has no guider or is guided already, or a method cannot be had in one.
    """
    chosen = None if guidance is None else parse_guidance(guidance)
    if skip is not None:
        chosen = Guidance((skip,)) if chosen is None else chosen + skip
    if getattr(pipe, "guider", None) is not None and (chosen is None or not _scaled(chosen)):
        own = _own_guidance(pipe)
        chosen = own if chosen is None else own + chosen
    return GuiderHandle(pipe, FewStepGuider("cfg:1" if chosen is None else chosen, seed))


def _scaled(guidance: Guidance) -> bool:
    return any(m.weight is not None for m in guidance.methods)


def _own_guidance(pipe: Any) -> Guidance:
    """What the pipeline's own guider does, as methods."""
    own = pipe.guider
    if type(own).__name__ != "ClassifierFreeGuidance":
        raise ValueError(
            f"{type(pipe).__name__} is guided by {type(own).__name__}, which is not read here; give a scale: fs.CFG(w)"
        )
    scale = float(own.guidance_scale) + float(own.use_original_formulation)
    own_cfg = CFG(scale if own._enabled else 1.0, start=own._start, stop=own._stop)
    return Guidance((own_cfg,)) if not own.guidance_rescale else own_cfg + Rescale(own.guidance_rescale)
