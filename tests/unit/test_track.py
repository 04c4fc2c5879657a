"""Trackers: real local stores, read back by their own libraries; what they cannot do never ends a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import microglia as mg
from microglia.core.callbacks import Callback, Callbacks, Lines
from microglia.core.errors import MissingLibraryError, UnknownNameError
from microglia.lab.recipe import RecipeError, resolve
from microglia.storage.run import Progress, Run
from microglia.track import Place, Tracker, opened, trackers
from microglia.track.tracker import TrackingError

SHORT = {"epochs": 2, "max_batches": 2, "batch_size": 32}
RECIPE = {"model": "conv-2", "prune": {"density": 0.5}, "dense": SHORT, "train": SHORT, "measure": {"latency": False}}


class Stopped(Exception):
    """Stops a run in the middle."""


class Stop(Callback):
    """Stops at the first epoch of a stage."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_epoch(self, stage: str, row: dict) -> None:
        if stage == self.stage:
            raise Stopped


class Told(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages, self.epochs, self.results = [], [], []

    def on_stage(self, stage, state, epochs=0):
        self.stages.append((stage, state, epochs))

    def on_epoch(self, stage, row):
        self.epochs.append((stage, row["epoch"]))

    def on_result(self, result):
        self.results.append(result)


def run(directory: Path, *names: str, stop: str | None = None, callbacks: tuple[Callback, ...] = ()) -> dict:
    """Runs the recipe with trackers; ``stop`` stops it within a stage."""
    recipe = resolve({**RECIPE, "track": list(names)})
    if stop is None:
        return mg.execute(recipe, directory, callbacks=callbacks)
    with pytest.raises(Stopped):
        mg.execute(recipe, directory, callbacks=[*callbacks, Stop(stop)])
    return {}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """One real run that is stopped in its second training and taken up again, with all three trackers."""
    pytest.importorskip("tensorboard"), pytest.importorskip("mlflow"), pytest.importorskip("wandb")
    directory = tmp_path_factory.mktemp("tracked") / "a"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        run(directory, "tensorboard", "mlflow", "wandb", stop="train")
        return directory, run(directory, "tensorboard", "mlflow", "wandb")


def test_tensorboard_files_are_read_back_by_tensorboard(tracked: tuple[Path, dict]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory, result = tracked
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        found = {event.step: event.value for event in events.Scalars(f"{row['stage']}/loss")}
        assert found[row["epoch"]] == pytest.approx(row["loss"])
    assert events.Scalars("pruned/accuracy")[-1].value == pytest.approx(result["pruned"]["metrics"]["accuracy"])
    assert "conv-2" in str(events.Tensors("recipe/text_summary")[0])


def test_mlflow_has_one_run_that_went_on(tracked: tuple[Path, dict]) -> None:
    from mlflow.tracking import MlflowClient

    directory, result = tracked
    client = MlflowClient(tracking_uri=f"sqlite:///{directory.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("microglia")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["model"] == "conv-2"
    assert found.data.params["prune.density"] == "0.5"
    assert found.data.metrics["pruned/accuracy"] == pytest.approx(result["pruned"]["metrics"]["accuracy"])
    assert {m.step for m in client.get_metric_history(found.info.run_id, "train/loss")} == {1, 2}


def log_records(content: bytes) -> Iterator[bytes]:
    """Yields the records of a file of W&B: 7 bytes of its own, then a log of LevelDB in blocks of 32 KiB."""
    place, record = 7, b""
    while place < len(content):
        left = 2**15 - place % 2**15
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6] if left > 6 else 0
        if kind == 0:  # padding to the next block
            place += left
            continue
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_files_are_read_back_by_wandb(tracked: tuple[Path, dict]) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    directory, result = tracked
    files = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
    known = json.loads((directory / "tracking.json").read_text())["wandb"]
    assert len(files) == 2, "the run was stopped once"
    codes = [
        Record.FromString(data).exit.exit_code
        for file in files
        for data in log_records(file.read_bytes())
        if Record.FromString(data).HasField("exit")
    ]
    assert codes == [1, 0], "the part that was stopped does not count as finished"
    assert all(known in file.name for file in files), "both parts have one name, so that they become one run"
    losses, summary = [], {}
    for file in files:
        for data in log_records(file.read_bytes()):
            record = Record.FromString(data)
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            losses += [(items["epoch"], items["train/loss"])] if "train/loss" in items else []
            summary |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
    assert {epoch for epoch, _ in losses} == {1, 2}
    assert summary["pruned/accuracy"] == pytest.approx(result["pruned"]["metrics"]["accuracy"])


def test_the_bits_do_not_depend_on_trackers_nor_on_the_interruption(tracked: tuple[Path, dict], tmp_path: Path) -> None:
    directory, _ = tracked
    run(tmp_path / "plain")
    weights = [path / "model" / "model.safetensors" for path in (directory, tmp_path / "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_trackers_are_no_part_of_a_run_s_identity(tmp_path: Path) -> None:
    class Counting(Tracker):
        name, opens = "counting", 0

        def open(self) -> None:
            Counting.opens += 1

        def write(self, values: dict, epoch: int | None) -> None:
            raise OSError("the disk of the store is full")

    trackers.add("counting")(Counting)
    try:
        run(tmp_path / "a", stop="train")
        told = Told()
        with pytest.warns(
            UserWarning, match=r"The tracker counting failed and is left out: the disk of the store is full\."
        ) as w:
            result = run(tmp_path / "a", "counting", callbacks=(told,))
        assert len([one for one in w if "counting" in str(one.message)]) == 1
        assert result["pruned"]["metrics"]
        assert Counting.opens == 1
        assert ("dense", "found", 0) in told.stages
        assert ("train", "finished", 0) in told.stages
        assert told.epochs == [("train", 1), ("train", 2)], "the epoch that was stopped before it was saved comes again"
        assert told.results[0]["seconds"] == result["seconds"]
        run(tmp_path / "a", "counting")
        assert Counting.opens == 1, "a finished run tells nothing"
    finally:
        trackers._items.pop("counting")


def test_a_resumed_stage_says_after_which_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class StopSecond(Callback):
        def on_epoch(self, stage, row):
            if (stage, row["epoch"]) == ("train", 2):
                raise Stopped

    caplog.set_level(logging.INFO, "microglia")
    with pytest.raises(Stopped):
        mg.execute(resolve(RECIPE), tmp_path / "a", callbacks=[StopSecond()])
    first = next(r.getMessage() for r in caplog.records if r.name == "microglia.epochs")
    assert first.startswith("dense: epoch 1, loss ")
    mg.execute(resolve(RECIPE), tmp_path / "a")
    mg.execute(resolve(RECIPE), tmp_path / "a")
    lines = [r.getMessage() for r in caplog.records if r.name == "microglia.stages" and r.levelno >= logging.INFO]
    assert lines[-3:] == [lines[-3], "train: resumed after epoch 1", f"{tmp_path / 'a'}: already finished"]
    assert "dense: already finished" in lines


def test_the_state_of_a_stage_may_be_a_list(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def half(progress: Progress) -> list:
        progress.save([1])
        raise Stopped

    with pytest.raises(Stopped):
        run.stage("counted", half)
    assert run.stage("counted", lambda progress: [*progress.state, 2]) == [1, 2]


def test_fit_tells_callbacks_and_their_errors_end_it() -> None:
    task = mg.tasks.image_task("conv-2", data="digits")
    told = Told()
    config = mg.FitConfig(**SHORT)
    mg.fit(task.build(), task, config, callbacks=[told], title="mine")
    assert told.stages == [("mine", "began", 0), ("mine", "finished", 0)]
    assert told.epochs == [("mine", 1), ("mine", 2)]
    with pytest.raises(Stopped):
        mg.fit(task.build(), task, config, callbacks=[Stop("training")])


def test_the_base_does_nothing_and_several_are_one() -> None:
    told = Told()
    many = Callbacks([Callback(), Lines(), told])
    many.on_stage("a", "began")
    many.on_epoch("a", {"epoch": 1, "loss": 0.5, "words": "no number"})
    many.on_result({"seconds": 1})
    many.close()
    assert (told.stages, told.epochs, told.results) == ([("a", "began", 0)], [("a", 1)], [{"seconds": 1}])


def test_mlflow_takes_names_that_it_would_refuse_and_an_experiment_made_meanwhile(
    tracked: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{tracked[0].parent / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "meanwhile")
    client = MlflowClient(tracking_uri=store)
    number, find, asked = client.create_experiment("meanwhile"), MlflowClient.get_experiment_by_name, []

    def late(self: MlflowClient, name: str) -> object:
        """As if another process made the experiment after the first look."""
        asked.append(name)
        return find(self, name) if len(asked) > 1 else None

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    (tmp_path / "a").mkdir()
    settings = {f"field {i} %": i for i in range(130)}  # more than one request takes
    (tracker,) = opened(["mlflow"], Place(tmp_path / "a", "a", settings))
    tracker.on_epoch("train", {"epoch": 3, "mAP@50": 0.5, "loss": float("nan")})
    tracker.close()
    (found,) = client.search_runs([number])
    assert found.info.status == "KILLED"
    assert found.data.metrics["train/mAP_50"] == 0.5
    assert len(found.data.params) == 130
    assert found.data.params["field 129 _"] == "129"


def test_an_error_of_one_close_leaves_nothing_open(tmp_path: Path) -> None:
    class Closing(Callback):
        def __init__(self, closed: list[str], name: str) -> None:
            self.closed, self.name = closed, name

        def close(self) -> None:
            self.closed.append(self.name)
            raise Stopped(self.name)

    closed: list[str] = []
    run = Run(tmp_path)
    run.callbacks.all += [Closing(closed, "first"), Closing(closed, "second")]
    with pytest.raises(Stopped):
        run.close()
    assert closed == ["first", "second"]
    Run(tmp_path).close()  # the directory is free again


def test_callbacks_are_closed_if_a_tracker_cannot_be_opened(tmp_path: Path) -> None:
    class Broken(Tracker):
        name = "broken"

        def open(self) -> None:
            raise OSError("no store")

    closed: list[str] = []
    told = Callback()
    told.close = lambda: closed.append("told")  # type: ignore[method-assign]
    trackers.add("broken")(Broken)
    try:
        with pytest.raises(TrackingError, match="The tracker broken cannot be opened: no store"):
            run(tmp_path / "a", "broken", callbacks=(told,))
    finally:
        trackers._items.pop("broken")
    assert closed == ["told"]


def test_wrong_input_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"There is no tracker named 'tensorbord'. Did you mean 'tensorboard'"):
        run(tmp_path / "a", "tensorbord")
    assert not (tmp_path / "a").exists()
    with pytest.raises(RecipeError, match="a directory"):
        mg.execute(resolve({**RECIPE, "track": ["tensorboard"]}))
    monkeypatch.setattr("microglia.core.optional.present", lambda name: False)
    with pytest.raises(MissingLibraryError, match=r"pip install 'microglia\[track\]'"):
        opened(["wandb"], Place(tmp_path, "a"))


def test_an_unreachable_server_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"The tracker mlflow cannot be opened.*nothing was trained yet"):
        run(tmp_path / "a", "mlflow")
    assert not list((tmp_path / "a" / "stages").iterdir())
    assert run(tmp_path / "a")["pruned"], "the same directory goes on without it"
