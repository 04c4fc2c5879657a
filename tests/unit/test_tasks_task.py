"""A task of any form: trees in, trees out, metrics with direction and unit, of a kind of one's own too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.batch import Example
from microglia.core.layers import prunable_layers
from microglia.scores import Evidence, scores
from microglia.tasks.metrics import Gathered, Metric, mean_metric
from microglia.tasks.task import CLASSIFICATION, softened_divergence
from microglia.train.agreement import agreement
from microglia.train.recover import recalibrate_on


class Two(nn.Module):
    """Takes a mapping by keyword, returns a mapping with two outputs, one of them a map."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(5, 4)

    def forward(self, image: Tensor, side: Tensor) -> dict[str, Tensor]:
        features = self.norm(self.image(image)) + self.head(side)[:, :, None, None]
        return {"map": features.relu().sum(1), "value": features.mean((1, 2, 3))}


@dataclass
class Made:
    """Batches of two inputs and ragged targets, made from the epoch's number."""

    length: int = 3

    def batches(self, split: str, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1, **rest: Any) -> Made:
        self.size = batch_size
        return self

    def __len__(self) -> int:
        return self.length

    def epoch(self, number: int) -> Iterator[tuple[Any, Any]]:
        generator = torch.Generator().manual_seed(number)
        for start in range(self.length):
            image = torch.randn(4, 1, 6, 6, generator=generator)
            inputs = {"image": image, "side": torch.randn(4, 5, generator=generator)}
            yield inputs, {"wanted": [image.sum((1, 2, 3)) / 36, image[:, 0]], "index": torch.arange(4) + 4 * start}


def loss(outputs: dict[str, Tensor], targets: dict[str, Any]) -> Tensor:
    return functional.mse_loss(outputs["value"], targets["wanted"][0]) + functional.mse_loss(
        outputs["map"], targets["wanted"][1]
    )


@dataclass(frozen=True)
class Largest:
    """A metric of a third kind: neither a sum nor records."""

    better: str = "lower"
    unit: str = ""

    def update(self, state: float | None, predictions: Any, targets: Any) -> float:
        return max(state or 0.0, float((predictions["value"] - targets["wanted"][0]).abs().max()))

    def over_ranks(self, state: float) -> float:
        return state

    def values(self, name: str, state: float) -> dict[str, float]:
        return {name: state}


def make_task(**changed: Any) -> mg.Task:
    example = {"image": torch.randn(1, 1, 6, 6), "side": torch.randn(1, 5)}
    metrics = {"worst": Largest(), "halved": mean_metric(lambda p, t: p["value"] - t["wanted"][0], better="lower", unit="")}
    return mg.Task("two", build, Made(), loss, metrics, example, **changed)


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Two()


def test_trees_go_through_training_evaluation_recovery_and_scores() -> None:
    task, model = make_task(), build()
    teacher = build()
    distance = {"distance": lambda own, other, temperature: (own["value"] - other["value"]).square().mean()}
    before = mg.evaluate(model, task)
    rows = mg.fit(model, make_task(**distance), mg.FitConfig(epochs=2, lr=0.05, distill=0.2, max_batches=2), teacher=teacher)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert mg.evaluate(model, task)["worst"] != before["worst"]
    assert rows[-1]["validation_worst"] == mg.evaluate(model, task, "validation")["worst"]
    recalibrate_on(model, task, batch_size=4)
    evidence = Evidence(list(Made().epoch(0)), task.loss, forward=task.forward, count=lambda t: len(t["index"]))
    for name in ("gradient", "snip", "grasp", "synflow", "magnitude"):
        values = scores[name](model, prunable_layers(model), evidence)
        assert set(values) == set(prunable_layers(model))


def test_the_default_of_a_mapping_is_what_example_says() -> None:
    task = make_task()
    example = Example.of(task.example_batch(3))
    assert example.batch == 3
    single = build().eval()(**task.example)["map"][0]
    torch.testing.assert_close(task.forward(build().eval(), example.kwargs)["map"][2], single)


def test_predictions_reach_the_metrics_and_outputs_the_loss() -> None:
    task, model = make_task(), build()
    shifted = make_task(predict=lambda out: {**out, "value": out["value"] + 100.0})
    plain, moved = mg.evaluate(model, task)["halved"], mg.evaluate(model, shifted)["halved"]
    assert moved == pytest.approx(plain + 100.0, abs=1e-4)
    assert mg.fit(model, shifted, mg.FitConfig(epochs=1, lr=0.0))[0]["loss"] < 50


def by_index(order: list[int], value: Any = None) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensor(i), torch.tensor(float(i * i))) for i in order]


def test_gathered_records_come_in_order_and_once() -> None:
    seen: list[list[int]] = []

    def value(records: list[Any]) -> dict[str, float]:
        seen.append([int(index) for index, _ in records])
        return {"median": float(torch.stack([x for _, x in records]).median()), "examples": float(len(records))}

    metric = Gathered(lambda predictions, targets: by_index(predictions), value)
    one = metric.update(metric.update(None, [3, 0, 2], None), [1, 4], None)
    other = metric.update(None, [0, 1, 2, 3, 4, 4, 0], None)  # padding came twice
    assert metric.values("median", one) == metric.values("median", other) == {"median": 4.0, "examples": 5.0}
    assert seen == [[0, 1, 2, 3, 4]] * 2
    with pytest.raises(mg.MicrogliaError, match="must have its name"):
        metric.values("mean", one)


def test_a_gathered_metric_gives_several_numbers_in_evaluation() -> None:
    records = lambda p, t: list(zip(t["index"], p["value"], strict=True))  # noqa: E731
    metric = Gathered(records, lambda kept: {"low": float(min(v for _, v in kept)), "n": float(len(kept))}, "lower", "")
    task = mg.Task("two", build, Made(), loss, {"low": metric}, make_task().example)
    assert mg.evaluate(build(), task)["n"] == 12.0


def test_metrics_say_which_direction_is_better_and_how_they_are_read() -> None:
    accuracy, entropy = CLASSIFICATION["accuracy"], CLASSIFICATION["loss"]
    assert (accuracy.better, accuracy.unit, entropy.better, entropy.unit) == ("higher", "%", "lower", "")
    assert isinstance(accuracy, Metric)
    task = make_task()
    assert task.headline == "worst"
    assert task.is_better(1.0, 2.0)
    assert not task.is_better(2.0, 1.0)


def test_the_divergence_of_maps_is_the_mean_over_their_pixels() -> None:
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    pixels = [softened_divergence(a[None], b[None], 2.0) for a, b in zip(rows(student), rows(teacher), strict=True)]
    assert float(softened_divergence(student, teacher, 2.0)) == pytest.approx(float(torch.stack(pixels).mean()), rel=1e-5)
    flat = functional.kl_div(
        functional.log_softmax(student[:, :, 0, 0] / 2, 1),
        functional.log_softmax(teacher[:, :, 0, 0] / 2, 1),
        reduction="batchmean",
        log_target=True,
    )
    assert torch.equal(softened_divergence(student[:, :, 0, 0], teacher[:, :, 0, 0], 2.0), flat)  # bit for bit as ever
    with pytest.raises(mg.MicrogliaError, match="distance=function"):
        softened_divergence({"value": student}, teacher, 2.0)  # type: ignore[arg-type]


def rows(maps: Tensor) -> Tensor:
    return maps.movedim(1, -1).reshape(-1, maps.shape[1])


def test_agreement_is_the_tasks_own() -> None:
    near = lambda one, other: (int(((one["value"] - other["value"]).abs() < 0.1).sum()), len(one["value"]))  # noqa: E731
    told = agreement(build(), build().eval(), make_task(agree=near, count=lambda targets: len(targets["index"])), 4)
    assert told is not None
    assert (told["images"], told["equal"], told["correct"], told["difference"]) == (12, 12, None, 0.0)
    assert agreement(build(), build().eval(), make_task(), 4) is None  # mappings have no class


def test_data_that_are_batches_are_refused_in_a_sentence() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4)))
    with pytest.raises(mg.MicrogliaError, match=r"not one DataLoader; give data=mg\.tasks\.loaders"):
        mg.Task("t", build, loader, loss, CLASSIFICATION, torch.zeros(1, 2))


def test_every_loop_of_the_house_takes_the_one_training_step() -> None:
    source = Path(mg.__file__).parent
    loops = ["train/fit", "methods/ddnp"]
    loops += ["studies/descent/double_descent", "studies/space/ensembling", "studies/connect/curve_training"]
    for name in loops:
        text = (source / f"{name}.py").read_text()
        assert re.search(r"import .*\bStep\b", text), name
        assert not re.search(r"\.backward\(\)|\.zero_grad\(|inputs\.to\(|optimizer\.step\(\)", text), name
