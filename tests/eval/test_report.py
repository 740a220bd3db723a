"""The page: self-contained, readable without its script, and free of what was put into names."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from fewstep.eval.report import build
from fewstep.eval.report_images import strip_png
from fewstep.eval.words import half_width, listed, number

HOSTILE = "<script>alert(1)</script>"


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def result() -> dict[str, Any]:
    rows = [
        {"solver": "euler", "schedule": "karras", "label": "euler", "order": 1, "stochastic": False},
        {"solver": "heun", "schedule": "karras", "label": HOSTILE, "order": 2, "stochastic": False},
        {
            "solver": "euler_ancestral",
            "schedule": "karras",
            "label": "euler_ancestral",
            "order": 1,
            "stochastic": True,
        },
    ]
    base = {"schedule": "karras", "message": None, "status": "ok", "steps": 4, "calls": 4, "samples": 10}
    cells = [
        {
            **base,
            "row": 0,
            "solver": "euler",
            "budget": 4,
            "nfe": 4,
            "key": "a",
            "rms": estimate(0.2),
            "frechet": estimate(9.0),
        },
        {
            **base,
            "row": 0,
            "solver": "euler",
            "budget": 8,
            "nfe": 8,
            "key": "b",
            "rms": estimate(0.1),
            "frechet": estimate(5.0),
        },
        {
            **base,
            "row": 1,
            "solver": "heun",
            "budget": 4,
            "key": None,
            "status": "unreachable",
            "message": "heun cannot",
        },
        {
            **base,
            "row": 1,
            "solver": "heun",
            "budget": 8,
            "key": "c",
            "status": "failed",
            "message": "NaN at step 3",
        },
        {
            **base,
            "row": 2,
            "solver": "euler_ancestral",
            "budget": 4,
            "nfe": 4,
            "key": "d",
            "frechet": estimate(20.0),
        },
        {**base, "row": 2, "solver": "euler_ancestral", "budget": 8, "key": "e", "status": "pending"},
    ]
    panel = {
        "id": "toy-w2",
        "model": "builtin:toy",
        "guidance": 2.0,
        "cost": 2,
        "note": "A note.",
        "warnings": ["few samples"],
        "samples": 10,
        "budgets": [4, 8],
        "rows": rows,
        "cells": cells,
        "reference": {
            "solver": "unipc:order=3",
            "schedule": "karras",
            "steps": 200,
            "key": "ref",
            "resolution": estimate(1e-4),
        },
        "floor": estimate(3.0),
        "agreement": None,
        "features": {"fingerprint": "f", "reference_count": 100, "dimension": 64},
    }
    run = {
        "command": f"fewstep eval -s '{HOSTILE}'",
        "versions": {"fewstep": "0.1.0", "torch": "2", "numpy": "2", "python": "3.11"},
        "host": {"cpu": "a processor", "cores": 2},
        "processes": 2,
        "config": {"threads": 1, "device": "cpu", "seed": 0},
        "git": None,
        "started": "2026-01-01T00:00:00+00:00",
        "finished": None,
        "seconds": 12.0,
    }
    return {"format": 1, "complete": False, "run": run, "panels": [panel]}


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.integers(0, 255, (12, 1, 8, 8)).astype(np.uint8) for key in ("a", "b", "d", "ref")}


@pytest.fixture(scope="module")
def page(images: dict[str, np.ndarray]) -> str:
    return build(result(), images)


class Outline(HTMLParser):
    """What the page links to, what it says, and whether its elements are closed in order."""

    VOID = {"meta", "img", "link", "br", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    assert parser.open == []
    return parser


def without_plotly(page: str) -> str:
    return re.sub(r'<script id="plotly">.*?</script>', "", page, flags=re.S)


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert all(link.startswith(("data:", "#")) for link in outline(page).links)
    assert not re.search(r"https?://", without_plotly(page))
    assert "@import" not in page and "url(http" not in page
    assert "default-src 'none'" in page  # the browser enforces it, for the script inside as well
    assert "Plotly" in page


def test_names_cannot_become_markup(page: str) -> None:
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, flags=re.S)
    assert data is not None
    assert json.loads(data.group(1))["panels"][0]["rows"][1]["label"] == HOSTILE


def test_the_page_says_what_it_is(page: str) -> None:
    text = " ".join(" ".join(outline(page).text).split())
    for words in [
        "toy, guidance 2",
        "This run is not finished",
        "0.200 ±0.020",
        "heun cannot",
        "NaN at step 3",
        "stochastic: it does not follow the differential equation",
        "few samples",
        "Resolution",
        "Floor",
        "fewstep eval -s",
        "torch",
        "a processor",
        "2 calls",
        "Not comparable with any published FID",
    ]:
        assert words in text, words


def test_pictures_are_there_without_the_script(page: str) -> None:
    pictures = [link for link in outline(page).links if link.startswith("data:image/png;base64,")]
    assert len(pictures) >= 2
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert image.height == 8 and image.width == 20 * 9 - 1


def test_strips_keep_the_pixels() -> None:
    from PIL import Image

    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    strip = np.asarray(Image.open(io.BytesIO(strip_png(images, count=3))))
    assert strip.shape == (4, 17, 3)
    assert (strip[:, 6:11] == images[1].transpose(1, 2, 0)).all()
    assert (strip[:, 12:] == 255).all()


def test_an_empty_run_makes_a_page() -> None:
    empty = result()
    for cell in empty["panels"][0]["cells"]:
        cell.update(status="pending", rms=None, frechet=None)
    assert "No finished cells yet" in build(empty, {})


def test_numbers_as_words() -> None:
    assert [number(v) for v in (0.098312, 12.345, 1234.5, 0.0, None, 0.00008521)] == [
        "0.0983", "12.3", "1,234", "0", "–", "0.0000852",
    ]  # fmt: skip
    assert half_width({"low": 0.9, "high": 1.1}) == "±0.10" and half_width({"low": None, "high": 1.0}) == ""
    assert listed(["a"]) == "a" and listed(["a", "b", "c"], "or") == "a, b or c"
