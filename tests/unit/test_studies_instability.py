"""Instability: equal noises, exact ends, masks, permuted twins, and trainings that are never done twice (survey T2.3)."""

from dataclasses import replace

import pytest
import torch

from microglia.core.errors import MicrogliaError
from microglia.core.layers import prunable_layers
from microglia.storage.run import Run
from microglia.studies.instability import analysis as room
from microglia.studies.instability.analysis import Training, copy_from, instability, smallest_stable
from microglia.studies.space.gauge import Gauge
from microglia.studies.space.points import point_of
from microglia.tasks.classification import image_task
from microglia.train.evaluate import evaluate
from microglia.train.fit import fit
from microglia.train.optim import FitConfig

TRAIN = FitConfig(epochs=3, max_batches=4, batch_size=32, lr=0.1)


@pytest.fixture(scope="module")
def training():
    return Training(image_task("lenet-300-100", "digits"), Run(), TRAIN)


@pytest.fixture(scope="module")
def gauge(training):
    return Gauge(training.task, recalibrate=0)


def test_the_same_noise_ends_in_the_same_bits(training, gauge, monkeypatch):
    monkeypatch.setattr(room, "NOISE", (5, 5))
    one, other = (point_of(copy_from(training, 1, number)) for number in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert instability(training, 1, gauge, points=3)["instability"] == {"train": 0.0, "test": 0.0}


def test_other_noise_ends_elsewhere_and_the_ends_are_measured_exactly(training, gauge):
    found = instability(training, 0, gauge, points=5)
    for number, place in ((0, 0), (1, -1)):
        model = copy_from(training, 0, number)
        expected = 1 - evaluate(model, training.task, "test")["accuracy"]
        assert found["error"]["test"][place] == expected == found["ends"]["test"][place]
    assert found["error"]["test"][0] != found["error"]["test"][-1]
    peak = max(found["error"]["test"])
    assert found["instability"]["test"] == pytest.approx(peak - (found["error"]["test"][0] + found["error"]["test"][-1]) / 2)
    assert found["alphas"] == [0, 0.25, 0.5, 0.75, 1]


def test_copies_that_part_at_the_end_are_one_network(training, gauge):
    found = instability(training, TRAIN.epochs, gauge, points=3)
    assert found["instability"] == {"train": 0.0, "test": 0.0}
    assert found["stable"]
    plain = training.task.build()
    fit(plain, training.task, TRAIN)
    model = copy_from(training, TRAIN.epochs, 0)
    assert all(torch.equal(value, point_of(plain)[name]) for name, value in point_of(model).items())


def test_a_parting_goes_on_from_the_whole_state(training):
    """Momentum, rate and place in the data continue: with the run's own noise the original training comes out."""
    copy = copy_from(training, 1, 0)
    monkey = replace(training, run=Run(seed=0))
    original, room.NOISE = room.NOISE, (0, 0)
    try:
        again = copy_from(monkey, 1, 0)
    finally:
        room.NOISE = original
    plain = training.task.build()
    fit(plain, training.task, TRAIN)
    assert all(torch.equal(value, point_of(plain)[name]) for name, value in point_of(again).items())
    assert any(not torch.equal(value, point_of(copy)[name]) for name, value in point_of(plain).items())


def test_masks_hold_in_both_copies_and_on_the_line(training, gauge):
    layers = prunable_layers(training.task.build())
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(layer.shape, generator=generator) < 0.5 for name, layer in layers.items()}
    subnetwork = replace(training, masks=masks, name="masked")
    for number in (0, 1):
        point = point_of(copy_from(subnetwork, 1, number))
        assert all(not point[name][~kept].any() and point[name][kept].all() for name, kept in masks.items())
    found = instability(subnetwork, 1, gauge, points=3)
    assert found["instability"] != instability(training, 1, gauge, points=3)["instability"]


def test_a_permuted_copy_has_the_same_function_but_lies_elsewhere(training, gauge):
    model = copy_from(training, 1, 0)
    twin = copy_from(training, 1, 0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        twin.fc1.weight.copy_(model.fc1.weight[order])
        twin.fc1.bias.copy_(model.fc1.bias[order])
        twin.fc2.weight.copy_(model.fc2.weight[:, order])
    x = training.task.example
    assert torch.allclose(model(x), twin(x), atol=1e-5)
    line = room._line([model, twin], training, gauge, 5)
    errors = [1 - row["test_accuracy"] for row in line["rows"]]
    assert max(errors) - (errors[0] + errors[-1]) / 2 > 0


def test_trainings_are_kept_and_shared_between_epochs(training, gauge, tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    kept = replace(training, run=run)
    once = instability(kept, 1, gauge, points=3)
    run.close()
    monkeypatch.setattr("microglia.train.rewind.fit", lambda *a, **k: pytest.fail("trained again"))
    run = Run(tmp_path / "run")
    assert instability(replace(training, run=run), 1, gauge, points=3) == once
    run.close()


@pytest.mark.parametrize("epoch", [-1, 4])
def test_an_epoch_outside_of_the_training_is_refused(training, gauge, epoch):
    with pytest.raises(MicrogliaError, match="0 to 3"):
        instability(training, epoch, gauge)


def test_the_smallest_epoch_from_which_on_all_are_stable():
    rows = [{"epoch": epoch, "stable": stable} for epoch, stable in [(0, False), (1, True), (2, False), (4, True), (8, True)]]
    assert smallest_stable(rows) == 4
    assert smallest_stable([{"epoch": 8, "stable": False}]) is None
