"""The examples run: five scripts, each in a process of its own, and three notebooks, cell by cell in a kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from commands import python

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
NEEDS = {"export_and_serve": ("onnx", "onnxscript", "onnxruntime")}


def test_there_are_five_scripts_and_three_notebooks() -> None:
    assert len(list(EXAMPLES.glob("*.py"))) == 5
    assert len(list(EXAMPLES.glob("*.ipynb"))) == 3


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    done = python((EXAMPLES / f"{name}.py").read_text(), tmp_path)
    assert done.status == 0, done.err
    assert done.out.strip()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_runs_and_shows_tables(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason="notebooks need pip install '.[docs]'")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)  # committed without outputs
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    shown = [output.data.get("text/html", "") for cell in code for output in cell.outputs if "data" in output]
    assert any("<table>" in text for text in shown)
    assert not any("<script" in text for text in shown)
