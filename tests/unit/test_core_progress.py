"""Progress of long work: what each verb tells, where it is shown, and that no thread draws while something is timed."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn

import microglia as mg
from microglia.core import progress
from microglia.core.callbacks import Callback
from microglia.core.progress import Bar, progress_bar, show_with
from microglia.core.timing import time_interleaved
from microglia.measure import measure_latency
from microglia.methods import EagleEye
from microglia.methods.layerwise import Layerwise
from microglia.storage.run import Run
from microglia.train import progress as shown


class Kept(Bar):
    """A bar that keeps what it was told."""

    made: ClassVar[list[Kept]] = []

    def __init__(self, title: str, total: int = 0, done: int = 0) -> None:
        super().__init__(title, total, done)
        self.open, self.threads = False, 0
        Kept.made.append(self)

    def __enter__(self) -> Kept:
        self.open = True
        return self

    def __exit__(self, *error: object) -> None:
        self.open = False


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Kept]]:
    """The bars of the test, in their order; the usual display comes back after it."""
    monkeypatch.setattr(Kept, "made", [])
    before = progress._display[-1]
    show_with(Kept)
    yield Kept.made
    show_with(before)
    assert not [bar.title for bar in Kept.made if bar.open]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()


X = torch.randn(2, 1, 8, 8)


def told(bars: list[Kept]) -> dict[str, tuple[int, int]]:
    return {bar.title: (bar.done, bar.total) for bar in bars}


def test_a_cut_tells_that_it_traces_and_how_much_is_verified(bars: list[Kept]) -> None:
    mg.prune_channels(network(), X, mg.Budget(density=0.5), round_to=1)
    found = told(bars)
    assert list(found) == ["trace", "verify"]
    done, total = found["verify"]
    assert done == total > 10


def test_a_budget_of_milliseconds_tells_each_timed_candidate(bars: list[Kept], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microglia.graph.prune.LatencyTable.__call__", lambda self, widths: float(sum(widths.values())))
    mg.prune_channels(network(), X, mg.Budget(ms=8), round_to=1)
    assert told(bars)["time candidate widths"][0] > 1


def test_a_measurement_tells_its_rounds(bars: list[Kept]) -> None:
    measure_latency({"a": network()}, X, rounds=4, executions="eager", min_round_seconds=1e-4)
    assert told(bars)["measure"] == (4, 4)


def test_accelerate_tells_layers_and_the_timing_of_the_whole(bars: list[Kept]) -> None:
    mg.accelerate(network(), X, rounds=3, cache=None, against="eager")
    found = told(bars)
    assert list(found) == ["accelerate: layers", "accelerate: whole model", "accelerate: whole model, again"]
    assert found["accelerate: layers"] == (3, 3)
    assert found["accelerate: whole model"] == (3, 3)


def test_a_search_tells_its_candidates_and_the_best(bars: list[Kept]) -> None:
    config = EagleEye.Config(flops=0.5, candidates=4, tolerance=0.3)
    pruner = EagleEye(network(), config, total_steps=1, example_inputs=X)
    values = iter([0.1, 0.4, 0.2, 0.3])
    pruner.search(lambda model: next(values))
    (bar,) = [bar for bar in bars if bar.title == "search"]
    assert (bar.done, bar.total, bar.said) == (len(pruner.values), 4, "best 0.4")


def test_blocks_of_a_large_model_and_an_evaluation_are_told(bars: list[Kept]) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    batches = [torch.randn(4, 8)]
    Layerwise(model, batches, rule="wanda", density=0.5).prune()
    assert told(bars)["blocks"] == (2, 2)
    task = mg.tasks.image_task("conv-2", data="digits")
    mg.evaluate(task.build(), task, "test", limit=2, batch_size=16)
    assert told(bars)["evaluate: test"] == (2, 2)


def test_without_a_screen_a_line_comes_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    caplog.set_level(logging.INFO, "microglia.progress")
    with Bar("search", 3) as bar:
        bar.say("best 0.5")
        bar.advance()
    assert [record.getMessage() for record in caplog.records] == ["search: 1 of 3, best 0.5"]


def test_a_terminal_is_drawn_by_the_calls_and_by_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(shown, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=80))
    before, seen, inside = progress._display[-1], [], []
    show_with(shown.fitting)
    try:
        with progress_bar("trace"), progress_bar("not shown inside"):
            pass
        time_interleaved({"a": lambda: inside.append(threading.active_count())}, rounds=3, min_round_seconds=1e-9)
        quiet = set(inside)
        inside.clear()
        time_interleaved(
            {"a": lambda: inside.append(threading.active_count())}, rounds=3, min_round_seconds=1e-9, title="measure"
        )
        seen = screen.getvalue()
    finally:
        show_with(before)
    assert set(inside) == quiet, "no thread of the bar runs beside what is timed"
    assert "trace" in seen
    assert "not shown inside" not in seen
    assert "measure" in seen


def test_a_forked_process_of_a_search_leaves_the_callbacks_of_its_parent_open(tmp_path) -> None:
    closed: list[str] = []
    one = Callback()
    one.close = lambda: closed.append("closed")  # type: ignore[method-assign]
    run = Run(tmp_path)
    run.callbacks.all.append(one)
    run.release()
    assert not closed
    Run(tmp_path).close()  # the directory is free
    run.close()
    assert closed == ["closed"]
