"""The shape of the house: short files and functions, no circles, no arrow up, and shared rooms that name no family.

The limits and the functions that measure are those of `benchmarks/house.py`, which prints the same figures.
"""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["house"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(house: ModuleType) -> list:
    return house.files_of(ROOT)


def test_no_file_is_long(house: ModuleType, files: list) -> None:
    assert [f"{file.name}: {file.lines}" for file in files if file.lines > house.LONGEST_FILE] == []


def test_no_function_is_long(house: ModuleType, files: list) -> None:
    # The kernel in Triton's language is left out: it calls no Python function, so that it cannot be split.
    assert house.long_functions(files, house.LONGEST_FUNCTION) == []


def test_the_lab_is_small(house: ModuleType, files: list) -> None:
    assert sum(file.lines for file in files if file.room == "lab") <= house.LINES_OF_LAB


def test_no_files_import_each_other_in_a_circle(house: ModuleType, files: list) -> None:
    assert house.circles(files) == []


def test_no_arrow_goes_up(house: ModuleType, files: list) -> None:
    assert house.arrows_up(ROOT, files) == []
    rooms = {file.room for file in files if not file.room.startswith("(")}
    assert rooms == set(house.floors(ROOT))
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract for contract in linter["contracts"] if contract["type"] == "layers")
    assert layers["exhaustive"] is True
    assert layers["exhaustive_ignores"] == ["__main__"]


def test_few_names_are_public(house: ModuleType) -> None:
    assert 20 <= house.public(ROOT) <= 32  # the verbs `pack`, `unpack`, `push` and `sparse_activations` are the newest


def test_shared_rooms_name_no_family(house: ModuleType) -> None:
    assert house.families_named(ROOT) == []


# ------------------------------------------------------------------------------------------------ the measure itself
def _package(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "src" / "microglia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "back",
    [
        "from microglia.lab import one\n",
        "from microglia.lab.one import f\n",
        "import microglia.lab.one\n",
        "def late():\n    from microglia.lab.one import f\n    return f\n",
    ],
)
def test_a_circle_is_seen_in_modules_and_in_functions(house: ModuleType, tmp_path: Path, back: str) -> None:
    _package(tmp_path, {"lab/one.py": "from microglia.lab.two import g\n", "lab/two.py": back})
    assert house.circles(house.files_of(tmp_path)) == ["microglia.lab.one, microglia.lab.two"]


def test_what_is_imported_for_types_makes_no_circle(house: ModuleType, tmp_path: Path) -> None:
    back = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from microglia.lab.one import f\n"
    _package(tmp_path, {"lab/one.py": "from microglia.lab.two import g\n", "lab/two.py": back})
    assert house.circles(house.files_of(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "text", "seen"),
    [
        ("lab/one.py", "KIND = 'ftwt'\n", True),
        ("lab/one.py", "def of_gates(model): ...\n", True),
        ("lab/one.py", "from microglia.methods import Soft\n\ndef f(x):\n    return isinstance(x, (int, Soft))\n", True),
        (
            "lab/one.py",
            "from microglia.core.errors import FileError\n\ndef f(x):\n    return isinstance(x, FileError)\n",
            False,
        ),
        ("lab/one.py", "# an investigated passage, gateway and smartphone\n", False),
        ("report/sections/one.py", "KIND = 'ftwt'\n", False),
        ("methods/one.py", "KIND = 'ftwt'\n", False),
    ],
)
def test_a_family_is_seen_where_it_is_named(house: ModuleType, tmp_path: Path, name: str, text: str, seen: bool) -> None:
    assert bool(house.families_named(_package(tmp_path, {name: text}))) is seen


def test_a_long_function_is_seen_and_a_kernel_is_not(house: ModuleType, tmp_path: Path) -> None:
    long = "def f():\n" + "    x = 1\n" * 60
    _package(tmp_path, {"lab/one.py": long, house.LANGUAGES[0]: long})
    assert house.long_functions(house.files_of(tmp_path), house.LONGEST_FUNCTION) == [(61, "lab/one.py f")]
