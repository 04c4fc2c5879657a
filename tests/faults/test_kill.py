"""A run killed at any moment and started again ends in the bits of one that was never interrupted (contract 4)."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest

from commands import LIMIT, TINY, microglia, start, weights

GRADUAL = ("--method", "gradual", "train.optimizer=adam", "train.lr=0.003", "prune.updates=5")
CHANNELS = ("--method", "channels", "prune.recalibrate=2")
SMART = ("--method", "smart", "--pattern", "block:8x4", "prune.search=0.7")
SMART_CHANNELS = ("--method", "smart", "--pattern", "channel", "prune.search=0.4", "prune.recalibrate=2")
SFP = ("--method", "sfp", "prune.recalibrate=2", "prune.updates=5")
PERMUTED = ("--method", "magnitude", "--pattern", "block:16x1", "--permute")
METHODS = {
    "magnitude": ("--method", "magnitude"),
    "permuted": PERMUTED,
    "gradual": GRADUAL,
    "channels": CHANNELS,
    "smart": SMART,
    "smart-channels": SMART_CHANNELS,
    "sfp": SFP,
}
EVERY = ("magnitude", "smart-channels")
"""What is killed at nearly every file; the others share their stages, and die at each fifth file."""
GATED = ("lenet-5", "--data", "digits", "--method", "ftwt", "--seed", "3", "dense.epochs=1", "train.epochs=3", "prune.r=0.8")
GATED += ("prune.images=64", "dense.max_batches=4", "train.max_batches=4", "measure.latency=false", "threads=1")
EAGLEEYE = (*TINY, "--method", "eagleeye", "prune.recalibrate=2", "prune.candidates=6", "prune.tolerance=0.05")
EAGLEEYE += ("prune.rates=[0.0, 0.95]", "prune.processes=2")
OTHERS = {"ftwt": GATED, "eagleeye": EAGLEEYE}


def words_of(method):
    return OTHERS[method] if method in OTHERS else (*TINY, *METHODS[method])


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The runs that nothing interrupts, by method."""

    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp("uninterrupted")
        outcome = microglia("prune", *words_of(method), "--out", folder / "run", folder=folder / "work")
        assert outcome.status == 0, outcome.err
        return folder / "run"

    return run


def assert_same_run(run, other):
    """Same model, same measurements, same training curves."""
    assert weights(run) == weights(other)
    assert (run / "model" / "plan.json").read_bytes() == (other / "model" / "plan.json").read_bytes()
    results = [json.loads((directory / "result.json").read_text()) for directory in (run, other)]
    names = ("dense", "before", "pruned", "masks", "removed", "search", "permutation", "estimate", "routes", "widths")
    for name in (*names, "candidates"):
        assert results[0].get(name) == results[1].get(name)
    assert curves(run) == curves(other)
    assert not list(run.rglob("*.part")), "debris of a killed write"
    assert not list(run.rglob("*.partial.safetensors"))


def curves(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ("magnitude", "stages/dense.partial.safetensors"),
        ("magnitude", "stages/prune.safetensors"),
        ("magnitude", "stages/train.partial.safetensors"),
        ("magnitude", "model/plan.json"),
        ("permuted", "stages/dense-observed.safetensors"),  # while it looks for an order
        ("permuted", "stages/permute.safetensors"),
        ("permuted", "stages/train.partial.safetensors"),
        ("gradual", "stages/train.partial.safetensors"),
        ("channels", "stages/dense-observed.safetensors"),  # while it scores and cuts
        ("channels", "stages/prune.safetensors"),
        ("channels", "stages/recalibrate.safetensors"),
        ("channels", "stages/train.partial.safetensors"),
        ("channels", "model/plan.json"),
        ("smart", "stages/train.partial.safetensors"),  # in the middle of the search
        ("smart-channels", "stages/train.partial.safetensors"),
        ("smart-channels", "stages/shrink.safetensors"),
        ("sfp", "stages/sparse.partial.safetensors"),  # between two choices
        ("sfp", "stages/prune.safetensors"),
        ("eagleeye", "stages/search.partial.safetensors"),  # some candidates have values
        ("eagleeye", "stages/search.safetensors"),
        ("ftwt", "stages/estimate.safetensors"),
        ("ftwt", "stages/train.partial.safetensors"),  # one epoch with heads that learn, one in which they come to rest
        ("ftwt", "stages/train.safetensors"),  # finished, its partial state perhaps still there
        ("ftwt", "stages/routes.safetensors"),
    ],
)
def test_killed_when_a_file_appears(tmp_path, reference, method, file):
    words = ("prune", *words_of(method), "--out", tmp_path / "run")
    first = start(*words, folder=tmp_path / "work")
    first.wait_for(tmp_path / "run" / file)
    assert first.kill().status in (-signal.SIGKILL, 0)
    stages = [path for path in (tmp_path / "run" / "stages").glob("[!.]*") if ".partial." not in path.name]
    finished = {path: path.stat().st_mtime_ns for path in stages}
    again = microglia(*words, folder=tmp_path / "work")
    assert again.status == 0, again.err
    assert "damaged" not in again.err
    assert {path: path.stat().st_mtime_ns for path in stages} == finished
    assert_same_run(tmp_path / "run", reference(method))


@pytest.mark.parametrize(("method", "files"), [(name, 2 if name in EVERY else 5) for name in METHODS])
def test_killed_around_every_write(tmp_path, reference, method, files):
    """Every start gets some files further: one dies right after a file is in place, the next right before one is."""
    words = ("prune", *TINY, *METHODS[method], "--out", tmp_path / "run")
    for attempt in itertools.count():
        number = files + attempt // 10  # the files of the end are written anew at every start
        prepare = functools.partial(die_at_write, *((number, "after") if attempt % 2 else (number + 1, "before")))
        outcome = microglia(*words, folder=tmp_path / "work", prepare=prepare)
        if outcome.status == 0:
            break
        assert outcome.status == -signal.SIGKILL, outcome.err
        assert attempt < 40
    assert attempt > 8 if files == 2 else attempt > 2
    last = microglia(*words, folder=tmp_path / "work")
    assert last.status == 0, last.err
    assert_same_run(tmp_path / "run", reference(method))


def die_at_write(number, moment):
    """Makes this process kill itself when it puts its number-th file in place."""
    replace, count = os.replace, itertools.count(1)

    def dying(source, target):
        due = next(count) == number
        if due and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying


@pytest.mark.slow
def test_python_m_microglia_killed_and_started_again(tmp_path, reference):
    command = [sys.executable, "-m", "microglia", "prune", *TINY, "--method", "magnitude", "--out", "run"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run/stages/dense.partial.safetensors").exists():
            with pytest.raises(subprocess.TimeoutExpired):
                first.wait(0.001)
    finally:
        first.kill()
        first.wait()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert again.returncode == 0, again.stderr
    assert_same_run(tmp_path / "run", reference("magnitude"))
