"""`benchmarks/gpu_all.py` keeps what each part gave, also where a part fails, hangs or is not reached."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_all", ROOT / "benchmarks" / "gpu_all.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)

    sys.modules["gpu_all"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_each_part_is_recorded(script: ModuleType, tmp_path: Path) -> None:
    written = tmp_path / "own.json"
    wanted = [
        script.Part("good", ("-c", f"open({str(written)!r}, 'w').write('[1, 2]'); print('ratio: 2.50')"), 20, written),
        script.Part("fails", ("-c", "print('before'); raise SystemExit(3)"), 20),
        script.Part("hangs", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 2),
    ]
    found = script.run(wanted, tmp_path / "deep" / "gpu.json", 60)
    assert [part["status"] for part in found.values()] == [0, 3, None]
    assert found["good"]["ratio"] == 2.5
    assert found["good"]["result"] == [1, 2]
    assert found["fails"]["tail"] == ["before"]
    assert json.loads((tmp_path / "deep" / "gpu.json").read_text())["parts"] == found


def test_what_the_limit_does_not_reach_is_said(script: ModuleType, tmp_path: Path) -> None:
    found = script.run([script.Part("late", ("-c", "print(1)"), 20)], tmp_path / "gpu.json", 5)
    assert found["late"]["tail"] == ["not begun: the limit of all parts was reached"]


def test_every_command_names_a_file_that_exists(script: ModuleType, tmp_path: Path) -> None:
    for part in script.parts(tmp_path):
        files = [word for word in part.command if word.startswith(str(ROOT))]
        assert files
        assert all(Path(file).exists() for file in files)
    assert sum(part.seconds for part in script.parts(tmp_path)) <= 1.2 * script.LIMIT
