"""Recipes in ``fewstep eval`` and ``fewstep list``, and the schema of their file."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from typing import Any, cast

import pytest

from fewstep.eval.cli import main
from fewstep.eval.store import Store
from fewstep.eval.sweep import Config, expand
from fewstep.eval.targets import load_target
from fewstep.eval.tuning import fit
from fewstep.tuning import Recipe
from fewstep.tuning.recipe import OPTIONAL, SCHEMA

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    how: dict[str, Any] = {
        "trajectories": 8,
        "teacher_steps": 40,
        "schedules": ["arctan"],
        "method": "closed-form",
    }
    return cast(Recipe, fit(load_target("builtin:gmm"), 5, **how))


def violations(value: Any, schema: dict[str, Any], where: str = "recipe") -> list[str]:
    """What is wrong by the part of JSON schema that a recipe's uses; a word that is not known is an error here."""
    unknown = set(schema) - {
        *("$schema", "title", "description", "type", "const", "enum", "minimum", "minItems"),
        *("required", "properties", "additionalProperties", "items"),
    }
    assert not unknown, unknown
    if "const" in schema and value != schema["const"] or "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r}"]
    if "type" not in schema:
        return []
    if not isinstance(value, cast(Any, TYPES[schema["type"]])) or isinstance(value, bool):
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = []
    if (
        "minimum" in schema
        and value < schema["minimum"]
        or "minItems" in schema
        and len(value) < schema["minItems"]
    ):
        found.append(f"{where}: {value!r} is too small")
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{where}: no {key}" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            if key in known or isinstance(more, dict):
                found += violations(item, known.get(key, more), f"{where}.{key}")
            elif more is False:
                found.append(f"{where}: {key} is not known")
    if isinstance(value, list) and "items" in schema:
        found += [
            v for i, item in enumerate(value) for v in violations(item, schema["items"], f"{where}[{i}]")
        ]
    return found


def test_a_recipe_follows_its_schema_and_the_schema_is_the_class(recipe):
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert violations(recipe.to_dict(), schema) == []
    names = {f.name for f in fields(Recipe)}
    assert set(schema["properties"]) == names and set(schema["required"]) == names - set(OPTIONAL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "recipe.format: 2"),
        ({"nfe": 0}, "recipe.nfe: 0 is too small"),
        ({"rows": [[1.0]]}, r"recipe.rows\[0\].*too small"),
        ({"levels": ["a", 1.0]}, r"recipe.levels\[0\]: 'a' is no number"),
        ({"frame": "ve"}, "recipe.frame: 've'"),
        ({"more": 1}, "more is not known"),
    ],
)
def test_the_schema_finds_what_is_wrong(recipe, change, words):
    found = violations(recipe.to_dict() | change, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert len(found) == 1 and re.search(words, found[0])


def test_eval_measures_recipes_beside_solvers(recipe, tmp_path, capsys):
    file, out = tmp_path / "mine.json", tmp_path / "out"
    recipe.save(file)
    command = ["eval", "-m", "builtin:gmm", "-s", "dpmpp_2m", "--nfe", "4,5", "-n", "16", "-p", "1"]
    assert main([*command, "--recipe", str(file), "-o", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (panel,) = result["panels"]
    assert [r["label"] for r in panel["rows"]] == ["dpmpp_2m", "recipe:mine"]
    assert len([c for c in panel["cells"] if c["status"] != "unreachable"]) == 3
    file.unlink()  # the folder holds what it needs
    assert main(["report", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["panels"][0]["cells"] == panel["cells"]
    assert Store(out).load_json("run.json")["plan"]["panels"][0]["rows"][1]["recipe"]["nfe"] == 5


def test_other_models_are_warned_about_or_refused_with_the_remedy(recipe, tmp_path):
    file = tmp_path / "mine.json"
    replace(recipe, fingerprint="other", guidance="cfg:3").save(file)
    plan = expand(Config(models=("builtin:gmm",), solvers=("euler",), recipes=(str(file),), samples=4))
    words = " ".join(plan.panels[0].warnings)
    assert (
        "with other weights; fewstep tune fits one" in words
        and "fitted with cfg:3 and is used with none" in words
    )
    assert 5 in plan.panels[0].budgets
    with pytest.raises(ValueError, match="that is not the one of builtin:gmm:noise=edm; fit one"):
        expand(Config(models=("builtin:gmm:noise=edm",), recipes=(str(file),), samples=4))
    with pytest.raises(ValueError, match="cannot read the recipe 'nowhere.json'"):
        expand(Config(models=("builtin:gmm",), recipes=("nowhere.json",)))
    with pytest.raises(ValueError, match="recipe:mine spends 5 evaluations"):
        expand(Config(models=("builtin:gmm",), solvers=("euler",), nfe=(4,), recipes=(str(file),), samples=4))


def test_recipes_of_a_folder_are_listed(recipe, tmp_path, monkeypatch, capsys):
    recipe.save(tmp_path / "below" / "mine.json")
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(["list", "recipes", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["file"] == "below/mine.json" and row["nfe"] == 5 and row["model"] == "builtin:gmm"
