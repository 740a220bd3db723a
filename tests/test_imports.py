"""Imports run one way, the library imports only relatively, and the package list is the folders'."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import repository

# A layer may import the layers named here, and itself. `eval` may also read the front door (its version).
BELOW: dict[str, set[str]] = {
    "schedules": set(),
    "kernels": set(),
    "samplers": {"schedules", "kernels"},
    "tuning": {"schedules", "samplers"},
    "guidance": {"schedules", "kernels"},
    "hosts": {"schedules", "kernels", "samplers", "tuning", "guidance"},
    "eval": {"schedules", "samplers", "tuning", "guidance", "hosts"},
}
FRONT_DOOR = "the package's __init__"
# Outside packages: at any place in the layer's files, and only inside functions (imported by those who use
# it).
OUTSIDE: dict[str, tuple[set[str], set[str]]] = {
    "schedules": ({"numpy"}, set()),
    # A Triton kernel is a module of its own, imported where it is called.
    "kernels": ({"torch", "triton"}, set()),
    "samplers": ({"numpy", "torch"}, set()),
    "guidance": ({"numpy", "torch"}, set()),
    "tuning": ({"numpy", "torch"}, {"safetensors", "scipy"}),
}
HEAVY = [
    "accelerate",
    "comfy",
    "diffusers",
    "PIL",
    "plotly",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "torchmetrics",
]
HEAVY += ["torchvision", "transformers", "triton", "typer"]


@dataclass(frozen=True)
class Import:
    """One import: what (dotted path below the package, or an outside name), and where it stands."""

    target: str
    relative: bool
    line: int
    in_function: bool

    @property
    def layer(self) -> str:
        return self.target.partition(".")[0] or FRONT_DOOR


def imports_of(source: str, inside: tuple[str, ...]) -> Iterator[Import]:
    """The imports in a file of the package ``inside`` (folders below the root), also those in functions and
    behind TYPE_CHECKING.

    ``import_module`` with a literal name counts. A relative import that climbs above the package has the
    target ``..``.
    """

    def resolve(level: int, module: str) -> str:
        if level - 1 > len(inside):
            return ".."
        return ".".join((*inside[: len(inside) - level + 1], *filter(None, [module])))

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, False, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield Import(node.module or "", False, node.lineno, in_function)
            elif resolve(node.level, node.module or ""):
                yield Import(resolve(node.level, node.module or ""), True, node.lineno, in_function)
            else:  # from .. import a, b: each name is a layer, or something the front door defines
                for alias in node.names:
                    yield Import(alias.name if alias.name in BELOW else "", True, node.lineno, in_function)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
        ):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                module = name.value.lstrip(".")
                level = len(name.value) - len(module)
                yield Import(resolve(level, module) if level else module, level > 0, node.lineno, in_function)
        for child in ast.iter_child_nodes(node):
            yield from walk(
                child, in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            )

    yield from walk(ast.parse(source), False)


def complaints(source: str, inside: tuple[str, ...], file: str = "file") -> list[str]:
    """What a file of the package ``inside`` imports against the rules."""
    found = []
    layer = inside[0] if inside else FRONT_DOOR
    for item in imports_of(source, inside):
        where = f"{file}:{item.line}"
        name = item.target.partition(".")[0]
        if item.relative:
            if item.target == "..":
                found.append(f"{where}: climbs above the package")
            elif inside and item.layer != layer and item.layer not in BELOW.get(layer, set()):
                if not (layer == "eval" and item.layer == FRONT_DOOR):
                    found.append(f"{where}: {layer} must not import {item.layer}")
        elif name == "fewstep" or (name in BELOW and name not in sys.stdlib_module_names):
            found.append(
                f"{where}: absolute import of {item.target}; inside the library imports are relative"
            )
        elif name not in sys.stdlib_module_names and layer in OUTSIDE:
            anywhere, inside_functions = OUTSIDE[layer]
            if name not in anywhere and not (item.in_function and name in inside_functions):
                found.append(
                    f"{where}: {layer} must not import {name}"
                    + ("" if item.in_function else " at module level")
                )
    return found


def test_imports_run_one_way() -> None:
    found: list[str] = []
    for file in repository.library_files():
        relative = file.relative_to(repository.ROOT)
        found += complaints(file.read_text(encoding="utf-8"), relative.parent.parts, str(relative))
    assert not found, "\n".join(found)


def test_every_layer_has_its_rule() -> None:
    layers = {name.split(".")[1] for name in repository.packages_on_disk() if "." in name}
    assert layers <= set(BELOW), f"no import rule for {layers - set(BELOW)}"


@pytest.mark.parametrize(
    ("inside", "source"),
    [
        (("samplers",), "from ..guidance import cfg"),
        (("guidance",), "from ..samplers.executor import Stepper"),
        (("schedules",), "from .. import samplers"),
        (("schedules",), "def f():\n    from ..samplers import program"),
        (("schedules",), "import torch"),
        (("schedules",), "def f():\n    import torch"),
        (("samplers",), "import scipy.special"),
        (("samplers",), "def f():\n    import triton"),
        (("kernels",), "from ..samplers import program"),
        (("samplers",), "from fewstep.schedules import grid"),
        (("samplers",), "import samplers.program"),
        (("samplers",), "import importlib\nimportlib.import_module('fewstep.eval')"),
        (("samplers",), "from importlib import import_module\nimport_module('..hosts.library', __package__)"),
        (("tuning",), "from ..hosts import library"),
        (("hosts",), "from ..eval import cli"),
        (("hosts",), "from .. import __version__"),
        (("hosts",), "from ... import folder_paths"),
        (("samplers", "tables"), "from ...guidance import cfg"),
        ((), "import fewstep.samplers"),
        ((), "from .. import something"),
    ],
)
def test_a_wrong_import_is_found(inside: tuple[str, ...], source: str) -> None:
    assert complaints(source, inside)


@pytest.mark.parametrize(
    ("inside", "source"),
    [
        ((), "from .hosts.library import sample"),
        (("schedules",), "import math\nimport numpy as np\nfrom .noise import NoiseSchedule"),
        (("samplers",), "import torch\nfrom ..schedules import TimeGrid\nfrom . import program"),
        (("kernels",), "import triton"),
        (("samplers",), "from ..kernels import combine"),
        (("samplers", "tables"), "from ...schedules import grid\nfrom ..program import Program"),
        (("hosts",), "from ..guidance.cfg import CFG\nfrom ..samplers import registry\nimport diffusers"),
        (("eval",), "from .. import __version__, hosts\nimport typer"),
    ],
)
def test_a_right_import_passes(inside: tuple[str, ...], source: str) -> None:
    assert not complaints(source, inside)


def test_the_package_list_is_the_folders() -> None:
    """The wheel holds what the list names; an editable install would hide a folder that is missing from it."""
    assert sorted(repository.settings()["tool"]["setuptools"]["packages"]) == repository.packages_on_disk()


def test_a_folder_missing_from_the_list_is_found(tmp_path: Path) -> None:
    for folder in (
        "",
        "samplers",
        "samplers/tables",
        "newpkg",
        "tests/helpers",
        "docs",
        "samplers/__pycache__",
        ".venv-test/x",
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "__init__.py").touch()
    assert repository.packages_on_disk(tmp_path) == [
        "fewstep",
        "fewstep.newpkg",
        "fewstep.samplers",
        "fewstep.samplers.tables",
    ]


def test_no_other_module_at_the_root() -> None:
    assert [file.name for file in repository.ROOT.glob("*.py")] == ["__init__.py"]


PROBE = """
import json, sys, time
start = time.perf_counter()
import torch
between = time.perf_counter()
before = set(sys.modules)
import fewstep
end = time.perf_counter()
new = sorted(set(sys.modules) - before)
print(json.dumps({"torch": between - start, "fewstep": end - between, "new": new}))
"""


def test_import_fewstep_brings_nothing_heavy(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The set of modules is asserted; the time is only reported, because machines differ."""
    done = repository.python(["-c", PROBE], cwd=tmp_path, env=_path_of_fewstep())
    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    record_property("import torch", f"{result['torch']:.3f} s")
    record_property("import fewstep after it", f"{result['fewstep']:.3f} s")
    loaded = {name.partition(".")[0] for name in result["new"]}
    assert not loaded & set(HEAVY)
    # hosts.diffusers may be there, without diffusers: saved pipelines look for the scheduler in the package.
    assert not [name for name in result["new"] if name.startswith(("fewstep.eval", "fewstep.hosts.comfyui"))]


ALONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("alone", sys.argv[1] + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules["alone"] = module
spec.loader.exec_module(module)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_schedules_load_without_torch(tmp_path: Path) -> None:
    """The folder by itself, as a package of another name: numpy and the standard library are all it needs."""
    done = repository.python(["-c", ALONE, repository.ROOT / "schedules"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert not set(done.stdout.split()) & {"torch", "fewstep", *HEAVY}


def _path_of_fewstep() -> dict[str, str]:
    """Where this process found fewstep, for a subprocess: an installed copy needs nothing, a linked tree its
    folder.
    """
    import fewstep

    folder = Path(fewstep.__path__[0]).parent
    return {} if folder.name == "site-packages" else {"PYTHONPATH": str(folder)}
