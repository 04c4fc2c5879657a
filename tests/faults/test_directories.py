"""One directory, one run: finished ones are kept, other recipes and second processes are refused."""

import signal

import pytest

from commands import TINY, microglia, refused, start, weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert microglia("prune", *TINY, "--out", folder / "run", folder=folder / "work").status == 0
    return folder / "run"


def times(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_finished_run_is_not_run_again(tmp_path, finished):
    before = times(finished)
    outcome = microglia("prune", *TINY, "--out", finished, "--json", folder=tmp_path / "work")
    assert outcome.status == 0
    assert outcome.out
    assert times(finished) == before


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (("train.epochs=4",), ("train.epochs: 3 -> 4",)),
        (("--density", "0.3"), ("prune.density: 0.2 -> 0.3",)),
        (("--method", "random"), ("method: 'magnitude' -> 'random'", "prune.score: 'magnitude' -> 'random'")),
    ],
)
def test_another_recipe_is_refused(tmp_path, finished, change, texts):
    before = times(finished)
    refused(microglia("prune", *TINY, *change, "--out", finished, folder=tmp_path / "work"), "another recipe", *texts)
    assert times(finished) == before


@pytest.mark.parametrize("content", [b"only a text", b"- a\n- list\n", b"a: [", b"\xff\xfe\x00"])
def test_a_directory_that_is_no_run_is_refused(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_bytes(content)
    refused(microglia("prune", *TINY, "--out", tmp_path / "run", folder=tmp_path / "work"), "recipe.yaml")


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "run").write_text("mine")
    refused(microglia("prune", *TINY, "--out", tmp_path / "run", folder=tmp_path / "work"), "Cannot use")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_second_process_is_refused(tmp_path, finished):
    words = ("prune", *TINY, "--out", tmp_path / "run")
    first = start(*words, folder=tmp_path / "work")
    try:
        first.wait_for(tmp_path / "run/stages/dense.partial.safetensors")
        first.signal(signal.SIGSTOP)
        refused(microglia(*words, folder=tmp_path / "work"), "Another process is running in")
    finally:
        first.signal(signal.SIGCONT)
    assert first.end().status == 0
    assert weights(tmp_path / "run") == weights(finished)
