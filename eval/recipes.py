"""Recipes as rows of ``fewstep eval``, and as the list of ``fewstep list recipes``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..guidance import parse as parse_guidance
from ..tuning import Recipe, load, schedule_digest
from .guiding import Choice
from .targets import Target

PREFIX = "recipe:"
FOLDER = Path()
"""Where ``fewstep list recipes`` looks: the current folder and those below."""


def named(files: Sequence[str | Path]) -> dict[str, Recipe]:
    """Name of a row -> recipe; ValueError for a file that is none, and for two of one name."""
    found: dict[str, Recipe] = {}
    for file in files:
        name = PREFIX + Path(file).stem
        if name in found:
            raise ValueError(
                f"two recipes are called {Path(file).stem}.json; rename one, the name is its row's"
            )
        found[name] = load(file)
    return found


def fits(recipe: Recipe, target: Target) -> bool:
    """Whether a model has the noise schedule that a recipe was fitted on."""
    return schedule_digest(target.noise_schedule) == recipe.noise_schedule


def check(recipes: dict[str, Recipe], targets: Sequence[Target]) -> None:
    """ValueError for a recipe that fits none of the models."""
    for name, recipe in recipes.items():
        if not any(fits(recipe, target) for target in targets):
            raise ValueError(
                f"{name.removeprefix(PREFIX)}.json was fitted to {recipe.model}, on a {recipe.frame} noise schedule "
                f"that is not the one of {', '.join(t.name for t in targets)}; fit one with fewstep tune --model ..."
            )


def warnings(name: str, recipe: Recipe, target: Target, guidance: Choice) -> list[str]:
    """What is other than when a recipe was fitted, and what to do about it."""
    file, found = name.removeprefix(PREFIX) + ".json", []
    if recipe.fingerprint != target.fingerprint:
        found.append(
            f"{file} was fitted to {recipe.model}, with other weights; fewstep tune fits one to these"
        )
    used = "" if guidance in (None, 1.0) else parse_guidance(guidance).spec
    if recipe.guidance != used:
        mine, other = recipe.guidance or "no guidance", used or "none"
        found.append(f"{file} was fitted with {mine} and is used with {other}; fewstep tune fits one to that")
    return found


def listed(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The recipes of a folder and those below, as rows of a list."""
    rows = []
    for file in _json_files(folder):
        try:
            recipe = load(file)
        except ValueError:
            continue
        rows.append(
            {
                "file": str(file),
                "model": recipe.model,
                "nfe": recipe.nfe,
                "guidance": recipe.guidance or "none",
                "kind": recipe.kind,
                "method": recipe.method,
                "error": recipe.errors.get("test", recipe.errors.get("held_out")),
                "fixed": recipe.errors.get("fixed"),
            }
        )
    return rows


def _json_files(folder: Path, depth: int = 2) -> Iterator[Path]:
    """JSON files of a size that a recipe may have, hidden folders left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and depth > 0:
            try:
                yield from _json_files(path, depth - 1)
            except PermissionError:
                continue
        elif path.suffix == ".json" and path.stat().st_size < 1 << 20:
            yield path
