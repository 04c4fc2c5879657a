"""Image classification from files: crops, mixing, reproducible batches, ViT and Swin with 2:4, wrong input."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from microglia.cli.app import app
from microglia.core.errors import DataError, MicrogliaError
from microglia.data.image_files import Variation
from microglia.lab.recipe import resolve
from microglia.lab.recipe_task import build_task

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is missing")
CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in CLASSES:
            for index in range(count):
                path = root / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 255, (40 + index, 50, 3)).astype(np.uint8)).save(path)
    return root


def task_of(folder, model="resnet8", **options):
    return build_task(resolve({"model": model, "task": {"kind": "images", "data": str(folder), "size": 32, **options}}))


MIXED = {"randaugment": 9, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}


def test_val_is_the_test_split_of_a_folder_like_imagenet(folder):
    task = task_of(folder)
    assert [len(task.data.batches(split, 4)) for split in ("train", "validation", "test")] == [3, 0, 2]
    inputs, labels = next(iter(task.data.batches("test", 4).epoch(0)))
    assert (tuple(inputs.shape), labels.tolist()) == ((4, 3, 32, 32), [0, 0, 1, 1])
    assert tuple(task.example.shape) == (1, 3, 32, 32)


def test_mixed_labels_are_shares_and_the_loss_takes_them(folder):
    task = task_of(folder, **MIXED)
    mixed = 0
    for inputs, shares in task.data.batches("train", 12, seed=1, shuffle=True, augment=True).epoch(0):
        assert tuple(shares.shape) == (12, 3)
        assert torch.allclose(shares.sum(1), torch.ones(12))
        mixed += int(((shares > 0).sum(1) > 1).sum())
        outputs = task.forward(task.build(), inputs)
        assert torch.isfinite(task.training_loss(outputs, shares))
    assert mixed > 0
    _, labels = next(iter(task.data.batches("train", 12, shuffle=True).epoch(0)))
    assert labels.dtype == torch.int64  # only augmented batches are mixed


def test_batches_are_a_pure_function_of_seed_and_epoch(folder):
    source = task_of(folder, **MIXED).data

    def epoch(number, seed=1):
        batches = source.batches("train", 6, seed=seed, shuffle=True, augment=True).epoch(number)
        return torch.cat([torch.cat([inputs.flatten(), shares.flatten()]) for inputs, shares in batches])

    torch.manual_seed(0)
    once = epoch(0)
    torch.manual_seed(5)
    assert torch.equal(epoch(0), once)
    assert not torch.equal(epoch(1), once)
    assert not torch.equal(epoch(0, seed=2), once)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is missing")
def test_a_vit_with_stochastic_depth_and_a_moving_average_is_pruned_2_to_4(folder, tmp_path):
    quick = [
        "train.epochs=1",
        "train.batch_size=6",
        "train.ema=0.9",
        "train.distill=0",
        "dense.epochs=0",
        "measure.latency=false",
    ]
    options = {"size": 32, "model_options": {"drop_path_rate": 0.1, "embed_dim": 24, "depth": 2, "num_heads": 2}, **MIXED}
    task = [f"task.{key}={json.dumps(value)}" for key, value in options.items()]
    words = ["prune", "timm:vit_tiny_patch16_224", "--data", str(folder), "--task", "images", "--method", "smart"]
    words += ["--pattern", "nm:2:4", "--exclude", "head", "--exclude", "patch_embed.proj", "threads=1", "prune.search=0.5"]
    done = CliRunner().invoke(app, [*words, *task, *quick, "--out", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.output[done.output.index("{") :])
    assert result["masks"]["kept"] * 2 == result["masks"]["total"]
    assert set(result["densities"].values()) == {0.5}
    assert len(result["densities"]) == 2 * 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"data": "no/where"}, "There is no folder"),
        ({"scale": (0.5, 2.0)}, "scale is two numbers"),
        ({"mixup": -1.0}, "mixup and cutmix are at least 0"),
        ({"normalize": "photos"}, "no normalization"),
        ({"randaugment": 40}, "randaugment is in 0 to 30"),
        ({"cutmixes": 1.0}, "task.cutmixes"),
    ],
)
def test_wrong_input(folder, options, told):
    with pytest.raises(MicrogliaError, match=told):
        task_of(folder, **options)


def test_a_folder_without_a_test_split(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    with pytest.raises(DataError, match="neither 'val' nor 'test'"):
        task_of(tmp_path)


def test_a_damaged_image_is_named(folder, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad.png cannot be read"):
        task_of(tmp_path)


def test_variation_of_the_specification():
    assert Variation() == Variation((0.08, 1.0), True, 0, 0.0, 0.0, 0.0)
