"""The sample grids of the report: pictures as data in the page, the same start noise in each column."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .report_tables import name
from .words import number, value_of

Images = Mapping[str, NDArray[np.uint8]]
"""Key of a cell (or of a reference) -> its first images, uint8 of shape (n, height, width) or (n, channels, h, w)."""

Strips = dict[str, dict[str, dict[str, str]]]
"""Row -> budget -> picture (``src``) and what is written at its right (``note``)."""

COUNT = 20
"""Images in one row."""


def strip_png(images: NDArray[np.uint8], count: int = COUNT, gap: int = 1) -> bytes:
    """PNG of the first ``count`` images side by side, ``gap`` white pixels apart, at their own resolution.

    Args:
        images: uint8, (n, h, w), (n, 1, h, w) or (n, 3, h, w).
        count: places in the strip; missing images stay white.
        gap: pixels between two images.
    """
    from PIL import Image

    pictures = np.asarray(images[:count])
    if pictures.ndim == 4:
        pictures = pictures[:, 0] if pictures.shape[1] == 1 else pictures.transpose(0, 2, 3, 1)
    height, width = pictures.shape[1:3]
    canvas = np.full((height, count * (width + gap) - gap, *pictures.shape[3:]), 255, np.uint8)
    for i, picture in enumerate(pictures):
        canvas[:, i * (width + gap) : i * (width + gap) + width] = picture
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _data_url(images: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(strip_png(images)).decode("ascii")


def strips(panel: Mapping[str, Any], images: Images) -> Strips:
    """The pictures of all finished cells of a panel."""
    found: Strips = {}
    for cell in panel["cells"]:
        if cell["status"] == "ok" and cell["key"] in images:
            rms, frechet = value_of(cell, "rms"), value_of(cell, "frechet")
            note = number(rms) if rms is not None else f"{number(frechet)} (Fréchet)"
            entry = {"src": _data_url(images[cell["key"]]), "note": note}
            found.setdefault(str(cell["row"]), {})[str(cell["budget"])] = entry
    return found


def grid(panel: Mapping[str, Any], pictures: Strips, images: Images) -> str:
    """The grid: the converged solution, then one row a solver, for the budget chosen in the selector."""
    if not pictures:
        return ""
    shown = str(sorted(panel["budgets"])[min(1, len(panel["budgets"]) - 1)])
    buttons = "".join(
        f'<button type="button" value="{b}" aria-pressed="{"true" if str(b) == shown else "false"}">{b}</button>'
        for b in panel["budgets"]
    )
    rows = [_reference_row(panel, images)]
    for row in range(len(panel["rows"])):
        rows.append(_solver_row(panel, row, pictures.get(str(row), {}).get(shown), shown))
    title = "<small>one column is one start noise; at the right the RMS distance</small>"
    selector = f'<div class="switch budget" role="group" aria-label="Evaluations">{buttons}</div>'
    return f"""<div class="row spaced"><h3>Samples {title}</h3>
<div class="row tight"><span class="small muted">NFE</span>{selector}</div></div>
<div class="strips">{"".join(rows)}</div>"""


def _reference_row(panel: Mapping[str, Any], images: Images) -> str:
    key = panel["reference"]["key"]
    if key not in images:
        return ""
    picture = f'<img alt="converged samples" src="{_data_url(images[key])}">'
    return (
        f'<div class="name truth"><b>converged</b></div><div class="pic truth">{picture}</div>'
        f'<div class="num truth">{panel["reference"]["steps"]} steps</div>\n'
    )


def _solver_row(panel: Mapping[str, Any], row: int, strip: Mapping[str, str] | None, shown: str) -> str:
    src, note = (strip["src"], strip["note"]) if strip else ("data:,", "")
    label = escape(panel["rows"][row]["label"])
    picture = f'<img alt="samples of {label}" src="{src}"{"" if strip else " hidden"}>'
    empty = f'<div class="empty"{" hidden" if strip else ""}>no run with {shown} evaluations</div>'
    return (
        f'<div class="name">{name(panel, row)}</div><div class="pic" data-strip="{row}">{picture}{empty}</div>'
        f'<div class="num">{note}</div>\n'
    )
