"""The repository's root is the package: the conditions under which that works, each tried out on a copy of
the tree.

The numbers are those of docs/development.md, which says how each was found.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import repository

pytestmark = pytest.mark.xdist_group("packaging")  # the builds are shared, so they stay on one worker

# Planted in the tree that is built: none of it may reach the wheel.
STRAYS = [
    "notes.txt",
    "samplers/scratch.json",
    "docs/stray.md",
    "tests/test_stray.py",
    "examples/stray.py",
    "eval/table.csv",
]


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree with stray files in it."""
    copy = repository.copy_to(tmp_path_factory.mktemp("packaging") / "tree")
    for stray in STRAYS:
        (copy / stray).parent.mkdir(exist_ok=True)
        (copy / stray).write_text("# stray\n", encoding="utf-8")
    return copy


@pytest.fixture(scope="session")
def sdist(tree: Path) -> Path:
    return repository.build("sdist", tree, tree.parent / "dist")


@pytest.fixture(scope="session")
def wheel(tree: Path) -> Path:
    return repository.build("wheel", tree, tree.parent / "dist")


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel."""
    return repository.install(wheel, tmp_path_factory.mktemp("installed") / "venv")


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def run(code: str, cwd: Path, *arguments: str | Path, interpreter: str | Path = sys.executable) -> str:
    """Run a piece of Python in a folder outside the tree, and return what it printed."""
    done = repository.python(["-c", code, *arguments], cwd=cwd, interpreter=interpreter)
    assert done.returncode == 0, done.stdout
    return done.stdout


# 1. pytest imports the root's __init__.py as a bare module when the checkout's name is not an identifier.


@pytest.mark.parametrize(
    "name", ["few-step-1.0", "ComfyUI-fewstep", "fewstep", pytest.param("main", marks=pytest.mark.slow)]
)
def test_1_pytest_runs_in_a_checkout_of_any_name(name: str, tmp_path: Path) -> None:
    checkout = repository.copy_to(tmp_path / name, library_only=True)
    (checkout / "tests" / "helpers").mkdir(parents=True)
    (checkout / "tests" / "test_trivial.py").write_text(
        "def test_trivial():\n    assert True\n", encoding="utf-8"
    )
    done = repository.python(["-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=checkout)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_1_the_front_door_survives_being_a_bare_module(tmp_path: Path) -> None:
    """What pytest does then: the file is run without a package. It must not reach for a relative import."""
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("__init__", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.__package__ == ""
"""
    run(code, tmp_path, repository.ROOT / "__init__.py")


# 2. Any other .py at the root becomes a module of the package.


def test_2_the_front_door_is_the_only_module_at_the_top(wheel: Path) -> None:
    assert [name for name in names_in(wheel) if re.fullmatch(r"fewstep/[^/]*\.py", name)] == [
        "fewstep/__init__.py"
    ]


def test_2_a_module_at_the_root_would_be_swept_in(tree: Path, tmp_path: Path) -> None:
    """Why the rule exists. When this fails, setuptools has changed and the rule may go."""
    copy = shutil.copytree(
        tree, tmp_path / "tree", ignore=shutil.ignore_patterns("tests", "docs", "data", "*.egg-info")
    )
    (copy / "conftest.py").touch()
    assert "fewstep/conftest.py" in names_in(repository.build("wheel", copy, tmp_path / "dist"))


# 3. An editable install hides a package that the list forgets; only the wheel tells.


def test_3_the_wheel_holds_every_module(wheel: Path) -> None:
    modules = {
        "fewstep/" + file.relative_to(repository.ROOT).as_posix()
        for file in repository.library_files()
        if "data" not in file.relative_to(repository.ROOT).parts
    }
    packed = {name for name in names_in(wheel) if name.endswith(".py") and "/data/" not in name}
    assert packed == modules


def test_3_every_package_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    packages = repository.settings()["tool"]["setuptools"]["packages"]
    code = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""
    files = json.loads(run(code, tmp_path, *packages, interpreter=installed).splitlines()[-1])
    assert list(files) == packages
    assert all(Path(file).is_relative_to(installed.parents[1]) for file in files.values()), files


def test_3_metadata(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.metadata as metadata, json, fewstep
entry = [e.value for e in metadata.entry_points(group="console_scripts") if e.name == "fewstep"]
print(json.dumps([fewstep.__version__, metadata.version("fewstep"), entry, metadata.requires("fewstep")]))
"""
    version, declared, entry, requires = json.loads(
        run(code, tmp_path, interpreter=installed).splitlines()[-1]
    )
    assert version == declared == repository.settings()["project"]["version"]
    assert "fewstep.eval.__main__:main" in entry
    assert sorted(re.split(r"[^a-z]", line)[0] for line in requires if "extra ==" not in line) == [
        "numpy",
        "torch",
    ]


def test_3_the_command_says_how_to_install_its_packages(installed: Path, tmp_path: Path) -> None:
    """Without the [eval] extra: one line, no traceback. Missing packages are played by a finder that refuses
    them.
    """
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"typer", "rich", "plotly", "scipy", "torchmetrics"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
from fewstep.eval.__main__ import main
sys.argv = ["fewstep", "list"]
sys.exit(main())
"""
    done = repository.python(["-c", code], cwd=tmp_path, interpreter=installed)
    assert done.returncode == 2
    assert len(done.stdout.strip().splitlines()) == 1 and 'pip install "fewstep[eval]"' in done.stdout, (
        done.stdout
    )


# 4. editable_mode=compat does not work with this mapping; strict does, and type checkers see through it.


def test_4_nothing_recommends_the_compat_mode() -> None:
    places = ["Makefile", "CONTRIBUTING.md", "README.md", "pyproject.toml", ".ci/run"]
    for place in places:
        assert "editable_mode=compat" not in (repository.ROOT / place).read_text(encoding="utf-8"), place


@pytest.mark.slow
def test_4_the_strict_editable_install_works(tmp_path: Path) -> None:
    tree = repository.copy_to(tmp_path / "few-step-1.0", library_only=True)
    interpreter = repository.install(repository.build("wheel", tree, tmp_path / "dist"), tmp_path / "venv")
    site = next((tmp_path / "venv").rglob("site-packages"))
    shutil.rmtree(site / "fewstep")
    for info in site.glob("fewstep-*.dist-info"):
        shutil.rmtree(info)
    out = tmp_path / "editable"
    out.mkdir()
    strict = {"editable_mode": "strict"}
    call = f"import setuptools.build_meta as backend; backend.build_editable({str(out)!r}, {strict!r})"
    done = repository.python(["-c", call], cwd=tree)
    assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        archive.extractall(site)
    module = tree / "schedules" / "__init__.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nEDITED = True\n", encoding="utf-8")
    code = "import fewstep, fewstep.schedules, fewstep.samplers; print(fewstep.schedules.EDITED)"
    assert run(code, tmp_path, interpreter=interpreter).split() == ["True"]


# 5. Type checkers believe the package (py.typed) and resolve it in a plain install.


def test_5_the_wheel_is_typed(wheel: Path) -> None:
    assert "fewstep/py.typed" in names_in(wheel)


@pytest.mark.slow
def test_5_a_planted_type_error_is_found(installed: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}', encoding="utf-8")
    (tmp_path / "user.py").write_text(
        "import fewstep\n\nwrong: int = fewstep.__version__\nright: str = fewstep.__version__\n"
    )
    done = repository.python(
        ["-m", "pyright", "--outputjson", "--pythonpath", installed, "user.py"], cwd=tmp_path
    )
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert [(item["rule"], item["range"]["start"]["line"]) for item in report["generalDiagnostics"]] == [
        ("reportAssignmentType", 2)
    ]


# 6. A clone in ComfyUI's custom_nodes and a pip install are two packages that must not mix.
# 7. ComfyUI looks for NODE_CLASS_MAPPINGS with hasattr: a module-level __getattr__ answers, and nobody else
# pays for it.

# As ComfyUI loads a custom node: by file location, under the folder's path as the module's name, its dots
# replaced.
CUSTOM_NODE = """
import importlib.util, json, os, sys
path_before = list(sys.path)
folder = sys.argv[1]
name = folder.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
"""


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in custom_nodes."""
    return repository.copy_to(tmp_path_factory.mktemp("ComfyUI") / "custom_nodes" / "few-step-1.0")


def test_6_a_clone_loads_as_a_custom_node(clone: Path, tmp_path: Path) -> None:
    """No sys.path edit and no module named fewstep: an absolute import would bring the installed copy in."""
    other = tmp_path / "another_node"  # another custom node has put its own `samplers` on the path
    (other / "samplers").mkdir(parents=True)
    (other / "samplers" / "__init__.py").write_text("raise ImportError('the other node')\n", encoding="utf-8")
    code = f"""
import sys
sys.path.insert(0, {str(other)!r})
{CUSTOM_NODE}
import importlib
for layer in ("schedules", "samplers", "guidance", "hosts"):
    importlib.import_module("." + layer, name)
assert sys.path == path_before
strangers = [m for m in sys.modules if m.partition(".")[0] == "fewstep"]
print(json.dumps([strangers, sum(m.startswith(name + ".") for m in sys.modules)]))
"""
    strangers, own = json.loads(run(code, tmp_path, clone).splitlines()[-1])
    assert strangers == []
    assert own >= 4


def test_6_a_clone_and_an_install_are_two_packages(clone: Path, installed: Path, tmp_path: Path) -> None:
    code = f"""
{CUSTOM_NODE}
import fewstep, fewstep.schedules, importlib
theirs = importlib.import_module(".schedules", name)
assert theirs is not fewstep.schedules and theirs.__file__ != fewstep.schedules.__file__
assert fewstep.__version__ == module.__version__
"""
    run(code, tmp_path, clone, interpreter=installed)


def test_7_comfyui_asks_for_the_mappings(clone: Path, tmp_path: Path) -> None:
    """hasattr never raises: with nodes both names are there, and an unknown name is an AttributeError."""
    code = f"""
{CUSTOM_NODE}
names = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
before = [m for m in sys.modules if m.startswith(name) and m.endswith(".hosts.comfyui")]
found = [isinstance(getattr(module, n), dict) if hasattr(module, n) else None for n in names]
print(json.dumps([before, found, hasattr(module, "no_such_name"), hasattr(module, "WEB_DIRECTORY")]))
"""
    before, found, unknown, _ = json.loads(run(code, tmp_path, clone).splitlines()[-1])
    assert before == [], "the nodes are loaded before ComfyUI asks for them"
    assert found == ([True, True] if (clone / "hosts" / "comfyui.py").exists() else [None, None])
    assert unknown is False


def test_7_import_fewstep_does_not_load_the_nodes(installed: Path, tmp_path: Path) -> None:
    run(
        "import fewstep, sys; assert 'fewstep.hosts.comfyui' not in sys.modules",
        tmp_path,
        interpreter=installed,
    )


# 8. Only what is declared goes in, or the root sweeps in the repository.


def allowed(name: str, package_data: Sequence[str]) -> bool:
    if name.startswith("fewstep/eval/data/"):
        return "/__pycache__/" not in name
    return name.endswith(".py") or name in package_data or ".dist-info/" in name


def test_8_only_declared_data_is_packed() -> None:
    assert repository.settings()["tool"]["setuptools"]["include-package-data"] is False


def test_8_the_wheel_holds_nothing_else(wheel: Path) -> None:
    names = names_in(wheel)
    data = ["py.typed", "kernels/combine.cpp", "schedules/data/gits-sd15.json", "tuning/recipe.schema.json"]
    assert not [name for name in names if not allowed(name, ["fewstep/" + file for file in data])]
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"fewstep", next(name for name in tops if name.endswith(".dist-info"))}
    second = {name.split("/")[1] for name in names if name.startswith("fewstep/")}
    layers = {name.split(".")[1] for name in repository.packages_on_disk() if "." in name}
    assert second == {"__init__.py", "py.typed"} | layers
    assert not [stray for stray in STRAYS if "fewstep/" + stray in names]


def test_8_the_data_of_the_command_line_is_in_the_wheel(wheel: Path) -> None:
    data = repository.ROOT / "eval" / "data"
    there = {
        "fewstep/" + file.relative_to(repository.ROOT).as_posix()
        for file in data.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in names_in(wheel) if name.startswith("fewstep/eval/data/")} == there


def test_8_the_wheel_carries_the_licence(wheel: Path) -> None:
    assert [name for name in names_in(wheel) if name.endswith(".dist-info/licenses/LICENSE")]


def test_8_the_source_archive_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data") if hasattr(
            tarfile, "data_filter"
        ) else archive.extractall(tmp_path)
    (source,) = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    again = repository.build("wheel", source, tmp_path / "dist")
    assert sorted(names_in(again)) == sorted(names_in(wheel))
