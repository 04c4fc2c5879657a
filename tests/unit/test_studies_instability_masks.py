"""Masks found anew for every epoch at which copies part, over seeds: the search itself, its control, and its resumption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from microglia.core.errors import MicrogliaError
from microglia.core.masks import masks_of
from microglia.lab.execute import make_task
from microglia.lab.recipe import method_config, resolve
from microglia.methods.lottery import Tickets, tickets
from microglia.storage.files import digest
from microglia.storage.run import Run
from microglia.studies.instability import analysis as room
from microglia.studies.instability.figures import figures
from microglia.studies.instability.masks import Rewound
from microglia.studies.instability.study import Sensing, instability_table, sense
from microglia.studies.study import draw

TRAIN = {"epochs": 3, "max_batches": 4, "batch_size": 32, "lr": 0.1}
RECIPE = resolve(
    {"model": "lenet-300-100", "method": "imp", "prune": {"density": 0.4, "rate": 0.4, "exclude": ["fc3"]}, "train": TRAIN}
)


@pytest.fixture(scope="module")
def task():
    return make_task(RECIPE)


def asking(directory):
    return Sensing(RECIPE, (0, 2), directory, points=3, recalibrate=0, find=True)


@pytest.fixture
def asked(tmp_path):
    return asking(tmp_path / "i")


def found_in(directory):
    return {path.name for path in directory.rglob("*.safetensors")}


def test_the_masks_of_an_epoch_are_those_of_pruning_rewound_to_it(task):
    search = Rewound(task, Run(), RECIPE)
    for epoch in (0, 2):
        rewound = replace(method_config(RECIPE), rewind=epoch)
        whole = masks_of(tickets(task, Run(), rewound))
        assert digest(search.masks(epoch)) == digest(whole)
        assert whole.kept == round(0.4 * whole.total)
    assert digest(search.masks(0)) != digest(search.masks(2))
    assert digest(Rewound(task, Run(), RECIPE).masks(2)) == digest(search.masks(2))


def test_another_initialization_has_masks_of_its_own(task):
    other = replace(RECIPE, seed=1)
    assert digest(Rewound(make_task(other), Run(seed=1), other).masks(0)) != digest(Rewound(task, Run(), RECIPE).masks(0))


def test_the_control_keeps_as_many_of_every_layer_elsewhere(task):
    search = Rewound(task, Run(), RECIPE)
    masks, control = search.masks(2), search.control(2)
    assert {n: int(m.sum()) for n, m in masks.items()} == {n: int(m.sum()) for n, m in control.items()}
    assert all(not torch.equal(masks[name], control[name]) for name in masks)


def test_a_search_for_two_epochs_trains_the_dense_network_once(task, tmp_path):
    run = Run(tmp_path / "run")
    search = Rewound(task, run, RECIPE)
    first, _ = search.masks(2), search.masks(0)
    run.close()
    stages = found_in(tmp_path)
    assert stages == {"level-00.safetensors"} | {f"imp-{k}-{s}.safetensors" for k in (0, 2) for s in ("start", "level-01")}
    alone = Run()
    assert digest(Tickets(task, alone, method_config(RECIPE)).dense().state["model"]) == digest(
        Tickets(task, alone, replace(method_config(RECIPE), rewind=2), prefix="x").dense().state["model"]
    )
    assert digest(Rewound(task, alone, RECIPE).masks(2)) == digest(first)


def test_every_seed_and_epoch_is_told_with_its_spread(asked):
    told = sense(replace(asked, seeds=2))
    rows = {(row["network"], row["seed"], row["epoch"]): row for row in told["rows"]}
    assert set(rows) == {(n, seed, k) for n in ("dense", "imp", "random") for seed in (0, 1) for k in (0, 2)}
    assert all((row["masks"] is None) == (row["network"] == "dense") for row in told["rows"])
    assert len({row["masks"] for row in told["rows"]}) == 9  # none, and another for every network, seed and epoch
    assert all(row["density"] == pytest.approx(1 if row["network"] == "dense" else 0.4, abs=1e-4) for row in told["rows"])
    for row in told["summary"]:
        values = [rows[row["network"], seed, row["epoch"]]["instability"]["test"] for seed in (0, 1)]
        spread = row["instability"]["test"]
        assert row["n"] == 2
        assert spread["mean"] == pytest.approx(sum(values) / 2)
        assert spread["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert set(told["stable_from"]) == {"dense", "imp", "random"}
    assert instability_table(told.result).row_count == 6
    pictures = [Path(path) for path in draw("instability", figures(told.result), asked.directory)]
    assert all(path.stat().st_size for path in pictures)


def test_copies_with_the_same_noise_have_no_barrier(asked, monkeypatch):
    monkeypatch.setattr(room, "NOISE", (5, 5))
    assert all(row["instability"] == {"train": 0.0, "test": 0.0} for row in sense(asked)["rows"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a search tells that nothing interrupts, and its directory."""
    directory = tmp_path_factory.mktemp("whole") / "i"
    return sense(asking(directory)), directory


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_search_that_is_interrupted_goes_on_to_the_same_bits(asked, uninterrupted, monkeypatch, stop):
    whole, directory = uninterrupted
    write, written = Run._write, []

    def interrupted(run, path, state):
        written.append(path)
        if len(written) == stop:
            raise KeyboardInterrupt
        write(run, path, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sense(asked)
    assert sense(asked) == whole
    assert found_in(asked.directory) == found_in(directory)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"recipe": replace(RECIPE, method="magnitude", prune={"density": 0.4})}, "method imp"),
        ({"recipe": resolve({"method": "lr-rewinding", "prune": {"density": 0.4}, "train": TRAIN})}, "to=weights"),
        ({"recipe": resolve({"method": "imp", "train": TRAIN})}, "--density"),
        ({"at": (0, 3)}, "at most 2 of 3"),
        ({"recipe": replace(RECIPE, prune={**RECIPE.prune, "exclude": ["fc9"]})}, "'fc9' meets no layer"),
    ],
)
def test_what_cannot_be_rewound_is_refused_before_anything_is_written(asked, change, text):
    with pytest.raises(MicrogliaError, match=text):
        sense(replace(asked, **change))
    assert not asked.directory.exists()
