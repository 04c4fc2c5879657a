"""What each layer alone can lose: measured on validation images, one layer at a time, everything else dense."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import BudgetError, MicrogliaError, RunError, SelectorError, UnknownNameError
from microglia.methods import OneShot
from microglia.report.chart import Chart
from microglia.storage.sensitivity import read_sensitivity
from microglia.studies.result import decode
from microglia.studies.sensitivity.figures import CURVES, curve_chart, map_chart, rows
from microglia.studies.sensitivity.layers import DENSITIES, curves_of
from microglia.studies.sensitivity.result import LayerSensitivity
from microglia.studies.sensitivity.study import Probing, measure_sensitivity, sensitivity_table
from microglia.tasks.classification import image_task
from microglia.train.optim import FitConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """LeNet-300-100, trained a little on digits and saved."""
    task = image_task("lenet-300-100", "digits")
    model = task.build()
    mg.fit(model, task, FitConfig(epochs=2, lr=0.1))
    path = tmp_path_factory.mktemp("saved") / "model"
    mg.save(model, path)
    return path, model, task


def probing(saved, out, **settings):
    return Probing(str(saved[0]), **{"densities": (0.5, 0.1), "out": out, "device": "cpu", **settings})


@pytest.fixture(scope="module")
def told(saved, tmp_path_factory):
    return measure_sensitivity(probing(saved, tmp_path_factory.mktemp("study")))


def test_each_place_is_one_layer_pruned_and_the_others_dense(saved, told):
    _, model, task = saved
    assert [row["layer"] for row in told["layers"]] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert told["dense"] == mg.evaluate(model, task, "validation")
    for row in told["layers"]:
        for place in row["places"]:
            copy = task.build()
            copy.load_state_dict(model.state_dict())
            masks = OneShot(copy, density=place["density"], layers=[row["layer"]]).masks
            assert masks.kept == place["kept"] == round(place["density"] * row["size"])
            found = mg.evaluate(copy, task, "validation")
            assert place["accuracy"] == found["accuracy"]
            assert place["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_the_test_images_are_never_looked_at(saved, tmp_path, monkeypatch):
    from microglia.tasks.classification import ImageSource

    seen = []
    batches = ImageSource.batches
    monkeypatch.setattr(
        ImageSource, "batches", lambda self, split, *a, **k: (seen.append(split), batches(self, split, *a, **k))[1]
    )
    measure_sensitivity(probing(saved, tmp_path, densities=(0.5,), recalibrate=1))
    assert "validation" in seen
    assert "test" not in seen
    with pytest.raises(MicrogliaError, match="validation or train, and not test"):
        measure_sensitivity(probing(saved, tmp_path, split="test"))


def test_what_is_measured_is_the_scope(saved, told):
    found = read_sensitivity(told["file"])
    assert found.dense == told["dense"]["loss"]
    for row in told["layers"]:
        assert found.curves[row["layer"]].size == row["size"]
        assert found.curves[row["layer"]].points == tuple((place["kept"], place["loss"]) for place in row["places"])
    _, model, task = saved
    copy = task.build()
    copy.load_state_dict(model.state_dict())
    total = sum(row["size"] for row in told["layers"])
    assert OneShot(copy, density=0.2, scope=f"sensitivity:{told['file']}").masks.kept == math.floor(0.2 * total + 0.5)


def test_an_interrupted_study_goes_on_within_a_layer(saved, told, tmp_path, monkeypatch):
    import microglia.studies.sensitivity.layers as layers

    asked, measured, calls = probing(saved, tmp_path), layers.Probe._measured, []

    def killed(self, masks):
        calls.append(masks)
        if len(calls) == 5:  # dense, both of the first layer, one of the second
            raise KeyboardInterrupt
        return measured(self, masks)

    monkeypatch.setattr(layers.Probe, "_measured", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(asked)
    again = measure_sensitivity(asked)
    assert len(calls) == 5 + 3
    assert again["layers"] == told["layers"]
    assert (tmp_path / "sensitivity.json").read_bytes() == Path(told["file"]).read_bytes()
    with pytest.raises(RunError, match="another recipe"):
        measure_sensitivity(replace(asked, densities=(0.4,)))


def test_layers_pruned_before_keep_no_more_than_they_have(saved, tmp_path):
    _, model, task = saved
    pruned = task.build()
    pruned.load_state_dict(model.state_dict())
    OneShot(pruned, density=0.3, scope="layer")
    mg.save(pruned, tmp_path / "model")
    told = measure_sensitivity(probing((tmp_path / "model",), tmp_path / "out", layers=("fc1",)))
    (row,) = told["layers"]
    half, tenth = row["places"]
    assert half["kept"] == round(0.3 * row["size"])
    assert half["loss"] == pytest.approx(told["dense"]["loss"], rel=1e-6)
    assert tenth["kept"] == round(0.1 * row["size"])


@pytest.mark.parametrize(
    ("pattern", "densities", "kept"),
    [("channel", (0.5, 0.1), [150 * 64, 30 * 64]), ("block:4x4", (0.25,), [4800]), ("nm:2:4", None, [9600])],
)
def test_other_patterns(saved, tmp_path, pattern, densities, kept):
    told = measure_sensitivity(probing(saved, tmp_path, pattern=pattern, densities=densities, layers=("fc1",)))
    assert [place["kept"] for place in told["layers"][0]["places"]] == kept


def test_gradient_scores_see_training_images(saved, tmp_path):
    told = measure_sensitivity(probing(saved, tmp_path, score="gradient", densities=(0.1,)))
    assert told["layers"][0]["places"][0]["kept"] == 1920


def test_batch_norm_is_recalibrated_at_every_place(tmp_path):
    asked = Probing("resnet8", (0.2,), layers=("layer1*",), limit=1, out=tmp_path / "a", device="cpu")
    plain, anew = (measure_sensitivity(replace(asked, recalibrate=n, out=tmp_path / str(n))) for n in (0, 2))
    assert plain["dense"]["loss"] != anew["dense"]["loss"]
    assert plain["layers"][0]["places"][0]["loss"] != anew["layers"][0]["places"][0]["loss"]
    assert plain["notes"] == []


# ------------------------------------------------------------------------------------------------ tables and charts
def test_the_charts_hold_what_was_measured(told):
    heat, curves = map_chart(told.result), curve_chart(told.result)
    assert isinstance(heat, Chart)
    field = heat.panels[0].field
    assert field.values == [[100 * place["accuracy"] for place in row["places"]] for row in told["layers"]]
    assert list(heat.panels[0].y.labels) == ["fc1", "fc2", "fc3"]
    worst = min(told["layers"], key=lambda row: sum(place["accuracy"] for place in row["places"]))
    assert curves.panels[0].lines[0].name == worst["layer"].removesuffix(".weight")
    assert len(rows(told.result)) == 6
    names = {path.rpartition("/")[2] for path in told["pictures"]}
    assert {f"sensitivity-{n}.{form}" for n in ("map", "curves") for form in ("png", "svg", "html", "json", "csv")} == names


def test_many_layers_share_grey(told):
    many = {**told, "layers": [{**told["layers"][n % 3], "layer": f"fc{n}.weight"} for n in range(CURVES + 4)]}
    lines = curve_chart(decode(LayerSensitivity, many)).panels[0].lines
    assert sum(line.name == "other layers" for line in lines) == 4
    assert len({line.look.color for line in lines}) == CURVES + 1


def test_the_table_says_per_cent_and_marks_what_is_no_number(told):
    places = [{"density": 0.5, "kept": 1, "accuracy": value} for value in (0.125, None)]
    table = sensitivity_table(decode(LayerSensitivity, {**told, "layers": [{**told["layers"][0], "places": places}]}))
    assert [next(iter(column.cells)) for column in table.columns] == ["fc1", "19,200", "12.50", "-"]


def test_losses_that_are_not_finite_are_the_worst(saved):
    task = saved[2]
    places = [{"kept": 5, "loss": 2.0}, {"kept": 1, "loss": math.inf}]
    found = curves_of(task, {"accuracy": 1.0, "loss": 1.0}, {"a": 10}, [{"layer": "a", "places": places}])
    assert found.curves["a"].points == ((5, 2.0), (1, 20.0))


def test_a_task_without_a_loss_shares_by_its_headline(saved):
    task = saved[2]
    found = curves_of(task, {"accuracy": 0.9}, {"a": 10}, [{"layer": "a", "places": [{"kept": 5, "accuracy": 0.5}]}])
    assert found.dense == -0.9
    assert found.curves["a"].points == ((5, -0.5),)


# -------------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"densities": ()}, BudgetError, "such as 0.5,0.2"),
        ({"densities": (0.5, 1.5)}, BudgetError, "in \\(0, 1\\)"),
        ({"densities": (0.0,)}, BudgetError, "in \\(0, 1\\)"),
        ({"densities": (0.2,), "pattern": "nm:2:4"}, BudgetError, "keeps 0.5 of each layer by itself"),
        ({"layers": ("conv9",)}, SelectorError, "meets no layer"),
        ({"score": "magnitud"}, UnknownNameError, "Did you mean 'magnitude'"),
        ({"limit": 0}, MicrogliaError, "at least 1; got 0"),
        ({"recalibrate": -1}, MicrogliaError, "0 for none; got -1"),
    ],
)
def test_wrong_settings_are_one_sentence_and_leave_nothing(saved, tmp_path, settings, error, sentence):
    with pytest.raises(error, match=sentence):
        measure_sensitivity(probing(saved, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_the_densities_fall_by_default():
    assert list(DENSITIES) == sorted(DENSITIES, reverse=True)


def test_a_task_without_validation_images_says_so(saved, tmp_path, monkeypatch):
    from microglia.studies.sensitivity import study

    x, y = torch.rand(8, 64), torch.randint(10, (8,))
    task = mg.Task(
        name="own",
        build=lambda: nn.Linear(64, 10),
        data=mg.tasks.loaders(train=[(x, y)], test=[(x, y)]),
        loss=nn.functional.cross_entropy,
        metrics=saved[2].metrics,
        example=x[:1],
    )
    monkeypatch.setattr(study, "open_target", lambda *given: (task.build(), task))
    with pytest.raises(MicrogliaError, match="own has no validation examples"):
        measure_sensitivity(Probing("own", (0.5,), out=tmp_path / "out", device="cpu"))
