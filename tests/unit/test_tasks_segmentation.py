"""Segmentation: losses, intersection over union, batches without a class, every method, the command line, wrong input."""

import importlib.util
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import microglia as mg
from microglia.cli.app import app
from microglia.core.errors import DataError, MicrogliaError
from microglia.data.scenes import IGNORED, SceneData, SceneSet
from microglia.lab.recipe import as_dict, resolve
from microglia.methods import methods
from microglia.methods.what import taken
from microglia.storage.run import Run
from microglia.storage.validation import adapter_of
from microglia.tasks.maps import Confusion, MapDistance, MapLoss, hard_pixels, same_pixels
from microglia.tasks.segmentation import SegmentationOptions, head_groups, segmentation_task
from microglia.tasks.task import DistanceOnTargets
from microglia.train.evaluate import evaluate
from microglia.train.recover import distillation
from microglia.zoo.registry import KINDS, MODELS, ModelError, register

CLASSES = ("sky", "road", "tree")


def scenes(count, seed, height=16, width=40):
    """Blobs: the class of a pixel follows from its colour, and a strip has no class."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        classes = torch.randint(0, 3, (height // 8, width // 8), generator=generator)
        classes = classes.repeat_interleave(8, 0).repeat_interleave(8, 1).to(torch.uint8)
        image = torch.randint(0, 60, (3, height, width), generator=generator, dtype=torch.uint8)
        for number in range(3):
            image[number] += 180 * (classes == number).to(torch.uint8)
        classes[:2] = IGNORED
        found.append((image, classes))
    return SceneSet(found)


@pytest.fixture(scope="module")
def data():
    return SceneData("blobs", CLASSES, scenes(8, 1), scenes(2, 2), scenes(3, 3))


class Small(nn.Module):
    """A segmenter with a sum of two branches, a product, and an auxiliary head."""

    auxiliary = ("aux",)
    heads = ("head", "aux")

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.right = nn.Conv2d(8, 8, 1)
        self.head, self.aux = nn.Conv2d(8, classes, 1), nn.Conv2d(8, classes, 1)

    def forward(self, x):
        stem = self.stem(x)
        y = torch.relu(self.left(stem) * torch.sigmoid(self.right(stem)) + stem)
        main = functional.interpolate(self.head(y), x.shape[2:], mode="bilinear", align_corners=False)
        return (main, self.aux(stem)) if self.training and self.aux is not None else main


@pytest.fixture(scope="module")
def small():
    if "small-segmenter" not in MODELS:
        register("small-segmenter", kind="segmentation")(lambda name, classes, shape: Small(classes))
    yield "small-segmenter"
    MODELS._items.pop("small-segmenter")
    KINDS.pop("small-segmenter")


def task_of(small, data, **options):
    return segmentation_task(small, data, **{"augment": "none", **options})


def test_the_loss_of_hard_pixels_is_that_of_a_sort():
    for seed in range(20):
        losses = torch.rand(200, generator=torch.Generator().manual_seed(seed)) * (0.3 + 0.05 * seed)
        ranked = losses.sort(descending=True).values
        number = max(int((losses > -math.log(0.7)).sum()), 200 // 16)
        assert torch.equal(hard_pixels(losses).sort(descending=True).values, ranked[:number])


def test_a_crop_without_a_class_costs_nothing_and_has_a_gradient():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    targets = torch.full((2, 4, 4), IGNORED)
    for name in ("ohem", "cross-entropy"):
        loss = MapLoss(name)((logits, logits), targets)
        assert loss.item() == 0
        loss.backward()
        assert logits.grad.abs().max() == 0
    targets[0, 0, :3] = 1  # fewer than 16 easy pixels: none of them counts
    sure = torch.full((2, 3, 4, 4), -20.0)
    sure[:, 1] = 20.0
    assert MapLoss("ohem")(sure, targets) == 0


def test_every_head_counts_at_full_resolution():
    generator = torch.Generator().manual_seed(0)
    main, small = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    targets = torch.randint(0, 3, (2, 8, 8), generator=generator)
    targets[:, 0] = IGNORED
    large = functional.interpolate(small, (8, 8), mode="bilinear", align_corners=False)
    wanted = sum(functional.cross_entropy(one, targets, ignore_index=IGNORED) for one in (main, large))
    assert MapLoss("cross-entropy")((main, small), targets) == pytest.approx(float(wanted), rel=1e-6)


def test_intersection_over_union_is_that_of_a_loop_and_adds_up_over_batches():
    generator = torch.Generator().manual_seed(0)
    metric = Confusion((*CLASSES, "never"))
    logits, targets = torch.randn(6, 5, 8, 8, generator=generator), torch.randint(0, 3, (6, 8, 8), generator=generator)
    targets[:, :2] = IGNORED
    logits[:, 3:] = -100.0  # the last class is in no label and no prediction, and the model has one logit too many
    once = metric.update(None, logits, targets)
    parts = metric.update(metric.update(None, logits[:1], targets[:1]), logits[1:], targets[1:])
    assert torch.equal(once, parts)
    found = metric.values("miou", once)
    predicted = logits[:, :4].argmax(1)
    counted = targets != IGNORED
    each = []
    for number in range(3):
        mine, theirs = (predicted == number) & counted, (targets == number) & counted
        each.append(int((mine & theirs).sum()) / int((mine | theirs).sum()))
    assert [found[f"iou/{name}"] for name in CLASSES] == pytest.approx(each, abs=1e-12)
    assert found["miou"] == pytest.approx(sum(each) / 3, abs=1e-12)
    assert found["pixel_accuracy"] == pytest.approx(float((predicted == targets)[counted].float().mean()), abs=1e-6)
    assert "iou/never" not in found


def test_padding_and_pixels_without_a_class_count_nowhere(small, data):
    task = task_of(small, data)
    model, state = task.build().eval(), None
    for inputs, targets in task.data.batches("test", 2).epoch(0):
        assert tuple(inputs.shape[2:]) == tuple(targets.shape[1:]) == (32, 64)
        state = task.metrics["miou"].update(state, task.forward(model, inputs), targets)
    assert int(state.sum()) == 3 * 14 * 40
    assert tuple(task.example.shape) == (1, 3, 32, 64)
    whole, halves = (evaluate(model, task, batch_size=size) for size in (3, 1))
    assert whole["miou"] == halves["miou"]
    assert whole["loss"] == pytest.approx(halves["loss"], rel=1e-6)


def test_batches_without_augmentation_are_small_enough_for_memory(small, data, monkeypatch):
    monkeypatch.setattr("microglia.tasks.segmentation.PIXELS", 2 * 32 * 64)
    source = task_of(small, data).data
    assert len(source.batches("train", 256)) == 4
    assert len(source.batches("train", 4, shuffle=True)) == 4
    assert len(source.batches("train", 256, world=2)) == 2
    assert len(source.batches("train", 8, shuffle=True, augment=True)) == 1  # a training keeps its batch size
    without = SceneData("b", CLASSES, data.train, SceneSet(()), data.test)
    assert len(task_of(small, without).data.batches("validation", 4, shuffle=True)) == 0


def test_the_teacher_counts_where_a_pixel_has_a_class():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    targets = torch.zeros(2, 4, 4, dtype=torch.int64)
    targets[:, 2:] = IGNORED
    distance = MapDistance()
    assert isinstance(distance, DistanceOnTargets)
    upper = distance(student[:, :, :2], teacher[:, :, :2], 2.0)
    assert distance.on_targets((student, student), teacher, targets, 2.0) == pytest.approx(float(upper), rel=1e-5)
    assert distance.on_targets(student, teacher, torch.full_like(targets, IGNORED), 2.0) == 0
    logs = [(one / 2).log_softmax(1) for one in (student, teacher)]
    plain = (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean()
    assert distance(student, teacher, 2.0) == pytest.approx(float(plain), rel=1e-5)
    loss = distillation(MapLoss("cross-entropy"), nn.Identity(), weight=0.5, temperature=2.0, distance=distance)
    mixed = loss(student, targets, teacher)
    assert mixed == pytest.approx(0.5 * float(MapLoss("cross-entropy")(student, targets)) + 0.5 * 4 * float(upper), rel=1e-5)


def test_heads_have_their_own_rate(small, data):
    task = task_of(small, data, head_lr=10.0)
    model = task.build()
    (group,) = task.groups(model)
    assert group["lr_scale"] == 10.0
    assert {id(p) for p in group["params"]} == {id(p) for part in (model.head, model.aux) for p in part.parameters()}
    with pytest.raises(ModelError, match="does not name its own"):
        head_groups(nn.Conv2d(1, 1, 1), 10.0)


def test_two_models_agree_by_pixels():
    one = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other[0, :, 0, 0] = -one[0, :, 0, 0]
    assert same_pixels(one, (other,)) == (31, 32)


SHORT = {
    "score_batch_size": 2, "search_epochs": 1, "images": 8, "every": 2, "candidates": 2, "population": 2, "iterations": 1,
    "episodes": 2, "warmup": 1, "tolerance": 0.3, "estimator": "fisher", "curvature": "fisher",
}  # fmt: skip
STEP = {"epochs": 2, "batch_size": 4, "lr": 0.01}  # four steps: as many as the phases of AC/DC need
FIRST = {"epochs": 1, "max_batches": 1, "batch_size": 4, "lr": 0.01}
REFUSED = {
    "layerwise": "Small has no blocks to find",
    "dcp": "Dcp adds classifiers to a classifier",
    "gal": "Gal needs a model that returns one tensor",
}
"""Methods that refuse this task or this network, and their sentence."""


def pattern_of(name):
    wanted = ("block:4x2", "unstructured", "channel", "nm:2:4")
    return next(p for p in wanted if methods[name].outcome(p) is not None)


def run_one(method, task, folder, config):
    method.check(task, config)
    return method.procedure(task, Run(folder / "run", {"method": method.name}), config)


@pytest.mark.parametrize("name", [name for name, m in methods.items() if m.original == name])
def test_every_method_runs_or_says_why_not(name, small, data, tmp_path):
    """One step of each method of the house, on the loss, the data and the form of outputs of this task."""
    task, method = task_of(small, data), methods[name]
    known, pattern = taken(method.config), pattern_of(name)
    budget = {"density": 0.5} if "density" in known else {"flops": 0.8}
    fields = {"pattern": pattern, "dense": FIRST, "train": STEP} | {k: v for k, v in SHORT.items() if k in known}
    fields |= {"compress": (0.2, 0.8), "decompress": (0.5,)} if "compress" in known else {}
    config = adapter_of(method.config).validate_python({**method.defaults, **fields, **budget})
    if name in REFUSED:
        with pytest.raises(MicrogliaError, match=REFUSED[name]):
            run_one(method, task, tmp_path, config)
        return
    model = run_one(method, task, tmp_path, config)
    assert set(evaluate(model, task)) >= {"miou", "loss"}
    shown = json.loads((tmp_path / "run" / "shown" / "dense.json").read_text())
    assert len(shown["examples"]) == 3


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    from PIL import Image

    root = tmp_path_factory.mktemp("blobs")
    for split, part in (("train", data.train), ("val", data.validation), ("test", data.test)):
        for index, (image, classes) in enumerate(part):
            for kind, pixels in (("images", image.permute(1, 2, 0)), ("masks", classes)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.numpy()).save(root / kind / split / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def command(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return json.loads(done.output[done.output.index("{") :])


def test_the_command_line_prunes_shrinks_measures_and_exports(small, folder, tmp_path):
    out = tmp_path / "run"
    quick = [f"{stage}.{key}" for stage in ("dense", "train") for key in ("epochs=1", "batch_size=4", "lr=0.01")]
    words = ["task.augment=none", "measure.latency=false", "threads=1", *quick]
    budget = ["--method", "magnitude", "--pattern", "channel", "--density", 0.5, "--scope", "layer"]
    result = command("prune", small, "--data", folder, *budget, *words, "--out", out, "--json")
    assert result["headline"] == "miou"
    assert result["recipe"]["task"]["data"] == str(folder)
    assert set(result["pruned"]["metrics"]) >= {"miou", "pixel_accuracy", "loss", "iou/sky"}
    shrunk = command("shrink", out, "--no-latency", "--json")
    assert shrunk["difference"] < 1e-4
    assert shrunk["shrunk"]["parameters"]["all"] < shrunk["masked"]["parameters"]["all"]
    assert command("eval", out, "--json")["miou"] == pytest.approx(result["pruned"]["metrics"]["miou"], abs=1e-9)
    again = command("eval", out / "shrunk", "--data", folder, "--json")
    assert again["miou"] == pytest.approx(shrunk["shrunk"]["metrics"]["miou"])
    fast = command("measure", out / "shrunk", "--accelerate", "--executions", "eager", "--json")["accelerated"]
    assert fast["agreement"]["equal"] == fast["agreement"]["images"] > 0
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        written = command("export", out / "shrunk", "--to", "onnx", "--json")
        assert (out / "shrunk").joinpath(written["export"]["path"].rpartition("/")[2]).is_file()
        assert written["export"]["difference"] < 1e-4

    report(out, tmp_path)


def report(run, folder):
    """The report has a table by class and pictures of maps; the file of results has no pictures."""
    if not all(map(importlib.util.find_spec, ("jinja2", "matplotlib", "plotly"))):
        return
    (run / "shown" / "other.json").write_text("{")
    written = command("report", run, "--out", folder / "report", "--export", folder / "results.json", "--json")
    assert "other.json: damaged, so it is not shown" in " ".join(written["left_out"])
    text = (folder / "report" / "results.md").read_text()
    assert "The metric iou of each class" in text
    assert "| sky | road | tree |" in text
    assert [name for name in written["figures"] if name.endswith("maps.png")]
    (record,) = json.loads((folder / "results.json").read_text())
    assert "shown" not in record


def test_a_models_name_stands_for_its_kind_of_task(small):
    resolved = resolve({"model": small, "data": "somewhere", "task": {"crop": [64, 64]}})
    assert resolved.task["kind"] == "segmentation"
    assert (resolved.data, resolved.task["data"], resolved.task["crop"]) == ("somewhere", "somewhere", (64, 64))
    assert resolve(as_dict(resolved)) == resolved
    assert resolve({"model": "resnet20"}).task is None


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"model": "bisenetv2", "image_size": 64}, "image_size is a field of the task classification"),
        ({"model": "bisenetv2", "task": {"loss": "dice"}}, "task.loss"),
        ({"model": "bisenetv2", "task": {"kind": "segmentations"}}, "no kind of task"),
    ],
)
def test_wrong_recipes(source, told):
    with pytest.raises(MicrogliaError, match=told):
        resolve(source)


class Narrow(nn.Module):
    def forward(self, x):
        return x[:, :2]


def narrow():
    return Narrow()


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("timm:resnet18", {}, "is no segmenter"),
        ("torchvision:resnet18", {}, "is no segmenter"),
        ("resnet20", {}, "segmentation needs logits"),
        ("test_tasks_segmentation:narrow", {}, "for the 3 classes of blobs"),
        ("bisenetv2", {"model_options": {"width": 12}}, "multiple of 8"),
        ("bisenetv2", {"model_options": {"width": 8}, "augment": "random", "crop": (100, 64)}, "such as 96 x 64"),
        ("small-segmenter", {"normalize": "photos"}, "no normalization"),
    ],
)
def test_wrong_input(model, options, told, small, data):
    if ":" in model and importlib.util.find_spec(model.partition(":")[0]) is None:
        pytest.skip("a library is missing")
    with pytest.raises((ModelError, DataError, MicrogliaError), match=told):
        task_of(model, data, **options)


def test_a_file_cannot_pass_options_that_run_code():
    from microglia.core.errors import FileError
    from microglia.zoo.trust import require_known_recipe

    task = {"kind": "segmentation", "model_options": {"trust_remote_code": True}}
    with pytest.raises(FileError, match="trust_remote_code"):
        require_known_recipe({"model": "hf:someone/net", "task": task}, "a file")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is missing")
def test_a_segmenter_of_torchvision(data):
    task = segmentation_task("torchvision:lraspp_mobilenet_v3_large", data, augment="none")
    assert tuple(task.forward(task.build().eval(), task.example).shape) == (1, 3, 32, 64)
    found = next(iter(task.data.batches("train", 2).epoch(0)))
    model = task.build().train()
    task.loss(task.forward(model, found[0]), found[1]).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is missing")
def test_a_segmenter_of_transformers_by_its_configuration(data, tmp_path):
    from microglia.core.vision import import_torchvision

    import_torchvision()
    import transformers

    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    task = segmentation_task(f"hf:{tmp_path / 'config'}", data, augment="none")
    model = task.build().eval()
    assert tuple(task.forward(model, task.example).shape) == (1, 3, 32, 64)
    mg.save(model, tmp_path / "saved")
    again = mg.load(tmp_path / "saved", task.build()).eval()
    assert torch.equal(again(task.example), model(task.example))


@pytest.mark.data
def test_bisenet_learns_a_few_images_of_camvid(data_root, small):
    if not (data_root / "camvid").is_dir():
        pytest.skip("camvid is not there")
    from microglia.data.scene_load import read_image, read_mask

    files = sorted((data_root / "camvid" / "images" / "train").glob("*.jpg"))[:4]
    found = []
    for file in files:
        mask = torch.from_numpy(read_mask(data_root / "camvid" / "annotations" / "train" / f"{file.stem}.png"))
        mask[mask == 11] = IGNORED
        found.append((read_image(file)[:, 100:164, 100:164], mask[100:164, 100:164]))
    part = SceneSet(found)
    data = SceneData("camvid", tuple(map(str, range(11))), part, SceneSet(()), part)
    task = segmentation_task("bisenetv2", data, augment="none", model_options={"width": 8})
    model = task.build()
    rows = mg.fit(model, task, mg.FitConfig(epochs=12, batch_size=4, lr=0.05))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert evaluate(model, task)["miou"] > 0


def test_options_of_the_specification():
    options = SegmentationOptions()
    assert (options.scales, options.ignore, options.boosters, options.loss) == ((0.5, 2.0), 255, True, "ohem")
