"""The task of detection: training falls, every step of the house on YOLOv5n, reports, the command line, wrong input."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import microglia as mg
from microglia.cli.app import app
from microglia.core.errors import MicrogliaError
from microglia.data.box_folders import load_boxes
from microglia.data.boxes import BoxData
from microglia.tasks.boxes import corners
from microglia.tasks.detection import BoxSource, detection_task
from microglia.tasks.detections import USE, same_boxes, suppressed
from microglia.tasks.yolo import Grid, decoded
from microglia.train.optim import FitConfig
from microglia.zoo import build
from microglia.zoo.yolov5 import ANCHORS, STRIDES

GRID = Grid(STRIDES, ANCHORS)
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def drawn(root: Path, count: int = 8) -> Path:
    """Writes a VOC folder of images with two rectangles each; one image is empty."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    names = [f"i{k}" for k in range(count)]
    for k, name in enumerate(names):
        image, text = Image.new("RGB", (80, 60), (20, 20, 20)), ""
        for kind, box in (("a", (4 + k, 5, 34 + k, 40)), ("b", (45, 20 + k, 70, 45 + k))) if k else ():
            image.paste((250, 250, 250) if kind == "a" else (250, 0, 0), box)
            text += OBJECT.format(kind, *box)
        image.save(root / "JPEGImages" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(f"<a>{text}</a>")
    for split in ("train", "val", "test"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("voc") / "drawn")


def narrow(classes, shape):
    return build("yolov5n", classes=classes, shape=shape, activation="relu", width=0.03)


@pytest.fixture
def task(folder):
    return detection_task(f"{__name__}:narrow", str(folder), size=64, augment="none")


def boxes_found(maps):
    return suppressed(*decoded(maps, GRID), USE)


@pytest.mark.data
@pytest.mark.skipif("MICROGLIA_DATA" not in os.environ, reason="MICROGLIA_DATA is not set")
@pytest.mark.filterwarnings("ignore:bccd")
def test_yolov5n_learns_eight_images_of_bccd():
    data = load_boxes("bccd", fit=(64, 64))
    few = data.train.subset(range(8))
    task = detection_task("yolov5n", BoxData("bccd", data.classes, few, few, few), size=64, activation="relu", augment="flip")
    model = task.build()
    config = FitConfig(epochs=16, batch_size=8, optimizer="adam", lr=0.004, schedule="constant", evaluate_every=16)
    rows = mg.fit(model, task, config)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert 0 <= rows[-1]["validation_map"] <= rows[-1]["validation_map50"] <= 1


def test_metrics_and_what_a_run_tells(task):
    metrics = mg.evaluate(task.build(), task, "test", batch_size=3)
    assert set(metrics) == {"map", "map50", "map/a", "map/b"}
    assert metrics == pytest.approx(mg.evaluate(task.build(), task, "test", batch_size=8), abs=0.02)
    assert task.headline == "map"
    assert task.data.told() == {"classes": ["a", "b"], "left_out": {
        "boxes": 42, "no_area": 0, "outside": 0, "unknown_class": 0, "no_image": 0}}  # fmt: skip
    targets = next(iter(task.data.batches("test", 4).epoch(0)))[1]
    assert task.count(targets) == 4


def test_a_perfect_detector_scores_one(task):
    perfect = {}
    for _, targets in task.data.batches("test", 8).epoch(0):
        for place in range(8):
            mine = targets["image"] == place
            centre, half = targets["boxes"][mine, :2] * 64, targets["boxes"][mine, 2:] * 32
            label = targets["labels"][mine, None].float()
            perfect[place] = torch.cat([centre - half, centre + half, torch.ones_like(label), label], 1)
        metric = task.metrics["map"]
        state = metric.update(None, [perfect[place] for place in range(8)], targets)
        assert metric.values("map", state)["map"] == pytest.approx(1)


def test_biases_may_warm_up_apart(folder):
    task = detection_task(f"{__name__}:narrow", str(folder), size=64, bias_warmup=0.1)
    group = task.groups(task.build())[0]
    assert group["warmup_from"] == 0.1
    assert sum(p.numel() for p in group["params"]) == sum(
        p.numel() for name, p in task.build().named_parameters() if name.endswith("bias")
    )
    config = FitConfig(epochs=1, batch_size=4, lr=0.001, warmup_epochs=0.5, no_decay=("norm", "bias"), ema=0.99, accumulate=2)
    assert len(mg.fit(task.build(), task, config)) == 1


def test_channels_are_removed_verified_accelerated_and_exported(task, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = build("yolov5n", classes=2, shape=(3, 64, 64), activation="relu", width=0.1).eval()
    with torch.no_grad():
        for head in model.heads:  # so that boxes pass the threshold, none of them saturated
            head.weight *= 3
            head.bias.view(3, 7)[:, 4:] += 4
    small = mg.prune_channels(model, task.example, mg.Budget(flops=0.5))
    plan = mg.graph.plan_of(small)
    assert plan.macs[1] <= 0.51 * plan.macs[0]
    maps = small(task.example)
    assert [m.shape[-1] for m in maps] == [7, 7, 7]
    written = mg.export(small, tmp_path / "small.onnx", task.example)
    session = written.open()
    fast = mg.accelerate(small, task.example, against="eager", cache=None, rounds=1)
    images = next(iter(task.data.batches("test", 1).epoch(0)))[0]
    with torch.no_grad():
        wanted = boxes_found(small(images))
        assert len(wanted[0]) > 0
        for other in (session(images), fast(images)):
            assert same_boxes(boxes_found(other), wanted) == (1, 1)
            assert task.agree(other, small(images)) == (1, 1)


class Doubled(nn.Module):
    """A network whose maps are for another number of classes, or no maps at all."""

    def __init__(self, classes, plain):
        super().__init__()
        self.net, self.plain = narrow(classes + 1, (3, 64, 64)), plain

    def forward(self, x):
        return self.net(x)[0].mean((1, 2, 3)) if self.plain else self.net(x)


def other_classes(classes, shape):
    return Doubled(classes, False)


def no_maps(classes, shape):
    return Doubled(classes, True)


def test_wrong_input_is_one_sentence(folder, tmp_path):
    name = f"{__name__}:narrow"
    for settings, told in (
        ({"size": 100}, "The size 100x100 does not fit: both sides are multiples of 32"),
        ({"size": (64, 48)}, "The size 64x48 does not fit"),
        ({"classes": ("a",), "strict": True}, "of the class 'b'"),
    ):
        with pytest.raises(MicrogliaError, match=told):
            detection_task(name, str(folder), **settings)
    for model, told in (
        ("resnet20", "made for classification; detection takes yolov5n"),
        ("timm:resnet18", "gives no maps of boxes"),
        ("yolov6", "yolov5"),
    ):
        with pytest.raises(MicrogliaError, match=told):
            detection_task(model, str(folder), size=64)
    with pytest.raises(MicrogliaError, match=r"maps are for 3 classes, and .* has 2"):
        detection_task(f"{__name__}:other_classes", str(folder), size=64).build()
    with pytest.raises(MicrogliaError, match="does not return three maps"):
        detection_task(f"{__name__}:no_maps", str(folder), size=64).build()
    torch.save(build("yolov5n", classes=2, shape=(3, 64, 64), width=0.1).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(MicrogliaError, match=r"does not fit YOLOv5.* another width"):
        detection_task(name, str(folder), size=64, checkpoint=str(tmp_path / "wide.pt")).build()


def test_other_anchors_of_a_checkpoint_are_taken_over(folder, tmp_path):
    state = narrow(2, (3, 64, 64)).state_dict()
    state["anchors"] = state["anchors"] * 2
    torch.save(state, tmp_path / "anchors.pt")
    task = detection_task(f"{__name__}:narrow", str(folder), size=64, checkpoint=str(tmp_path / "anchors.pt"))
    assert task.data.told()["anchors"][0][0] == (20.0, 26.0)
    assert isinstance(task.data, BoxSource)


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn"])
def test_detectors_of_torchvision_train_by_their_own_losses(name, folder):
    pytest.importorskip("torchvision")
    task = detection_task(f"torchvision:{name}", str(folder), size=64, augment="none")
    images, targets = next(iter(task.data.batches("train", 2).epoch(0)))
    model = task.build().train()
    value = task.loss(task.forward(model, images), targets)
    own = task.loss.__self__.detector
    own.backbone, own.head = model.backbone, model.head
    own.transform.min_size, own.transform.max_size = (64,), 64
    boxes = corners(targets["boxes"]) * 64
    wanted = [{"boxes": boxes[targets["image"] == k], "labels": targets["labels"][targets["image"] == k]} for k in range(2)]
    theirs = sum(own.train()(list(images), wanted).values())
    torch.testing.assert_close(value, theirs, rtol=1e-3, atol=1e-4)
    value.backward()
    with torch.no_grad():
        found = task.predict(task.forward(model.eval(), images))
    assert [rows.shape[1] for rows in found] == [6, 6]
    assert task.agree(model(images), model(images)) == (2, 2)


def test_detectors_that_choose_boxes_inside_are_refused(folder):
    pytest.importorskip("torchvision")
    with pytest.raises(MicrogliaError, match="chooses boxes inside its network"):
        detection_task("torchvision:fasterrcnn_resnet50_fpn", str(folder), size=64)
    with pytest.raises(MicrogliaError, match="retinanet_resnet50_fpn"):
        detection_task("torchvision:retinanet_resnet5_fpn", str(folder), size=64)


# ------------------------------------------------------------------------------------------------------ the command line
def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


TRAINING = [f"{name}.{key}" for name in ("dense", "train") for key in ("epochs=1", "batch_size=8", "lr=0.001")]


@pytest.fixture(scope="module")
def pruned(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "smart"
    run("prune", "yolov5n", "--data", folder, "--method", "smart", "--pattern", "block:16x8", "--density", 0.5, "--out", out,
        "--exclude", "heads.*", "task.size=64", "task.activation=relu", "measure.latency=false", *TRAINING)  # fmt: skip
    return out


def test_prune_eval_and_report(pruned, folder, tmp_path):
    result = json.loads((pruned / "result.json").read_text())
    assert result["headline"] == "map"
    assert result["recipe"]["task"]["kind"] == "detection"
    assert result["masks"]["kept"] < 0.55 * result["masks"]["total"]
    assert not any(name.startswith("heads") for name in result["densities"])
    assert result["left_out"]["boxes"] == 42 if "left_out" in result else True
    metrics = json.loads(run("eval", pruned, "--json"))
    assert "map/a" in json.dumps(metrics)
    run("eval", pruned / "model", "--data", folder)
    for name in ("dense", "pruned"):
        shown = json.loads((pruned / "shown" / f"{name}.json").read_text())
        assert (shown["kind"], shown["classes"], len(shown["examples"])) == ("detection", ["a", "b"], 3)
        assert len(shown["examples"][0]["truth"]) == 2
    run("report", pruned, "--out", tmp_path / "report")
    assert (tmp_path / "report" / "results.md").read_text().count("map")
    assert list((tmp_path / "report" / "figures").glob("*boxes*.png"))


def test_a_damaged_picture_is_left_out_of_a_report(pruned, tmp_path):
    from microglia.report.sections.detection import _drawn
    from microglia.report.write import collect

    record = collect([pruned])[0]
    assert len(_drawn(record, "pruned")["truth"]) == 3
    record.shown["pruned"]["examples"][0]["image"] = "nothing"
    assert _drawn(record, "pruned") is None
    assert _drawn(record, "other") is None


def test_a_saved_detector_knows_its_size(pruned, folder, tmp_path):
    import shutil

    from microglia.lab.target import open_target

    shutil.copytree(pruned / "model", tmp_path / "alone")
    _, task = open_target(str(tmp_path / "alone"), str(folder))
    assert tuple(task.example.shape) == (1, 3, 64, 64)
