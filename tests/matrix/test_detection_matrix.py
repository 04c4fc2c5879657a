"""Every method runs on a detector: a few steps on drawn rectangles, on a small network; some on a narrow YOLOv5n too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from microglia.core.errors import MicrogliaError
from microglia.core.patterns import parse_pattern
from microglia.methods import methods
from microglia.methods.what import taken
from microglia.storage.run import Run
from microglia.storage.validation import adapter_of
from microglia.tasks import Task
from microglia.tasks.detection import detection_task
from microglia.zoo import build

SHORT = {
    "score_batch_size": 1, "search_epochs": 1, "images": 2, "every": 1, "candidates": 2, "population": 2, "iterations": 1,
    "episodes": 1, "warmup": 1, "tolerance": 0.5, "compress": (0.2, 0.8), "decompress": (0.5,), "rounds": 2,
    "estimator": "fisher", "curvature": "fisher", "together": 64,
    "per_class": None,  # boxes have no one class per example: evidence by class is refused
}  # fmt: skip
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
NARROW = ("smart", "channels", "gradual")
"""Methods that also run on the layers of YOLOv5: one that learns masks, one that removes channels, one that waits."""
EPOCHS = {"acdc": 6, "rigl": 3, "set": 3, "dsr": 3}
"""Methods that change their masks several times."""
REFUSED = {"layerwise": "blocks", "sparsegpt": "blocks", "wanda": "blocks", "dcp": "a classifier", "gal": "one tensor"}
"""Method -> a word of the reason why it refuses a detector."""


def narrow(classes: int, shape: tuple[int, int, int]) -> torch.nn.Module:
    """Returns a network of 8 to 32 channels."""
    return build("yolov5n", classes=classes, shape=shape, activation="relu", width=0.03)


class Small(nn.Module):
    """Five units and three heads: maps as YOLOv5 has them, in a twentieth of its time."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.stem = nn.Sequential(unit(3), unit(8))
        self.levels = nn.ModuleList(unit(8) for _ in range(3))
        self.heads = nn.ModuleList(nn.Conv2d(8, 3 * (5 + classes), 1) for _ in range(3))

    def forward(self, x):
        x, maps = self.stem(x), []
        for level, head in zip(self.levels, self.heads, strict=True):
            x = level(x)
            y = head(x)
            maps.append(y.view(len(y), 3, self.classes + 5, *y.shape[2:]).permute(0, 1, 3, 4, 2))
        return tuple(maps)


def unit(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def small(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    return Small(classes)


def drawn(root: Path, count: int) -> Path:
    """Writes a VOC folder of images with one rectangle each."""
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    names = [f"i{k}" for k in range(count)]
    for k, name in enumerate(names):
        box = (2 + k, 3, 22 + k, 25)
        image = Image.new("RGB", (32, 32), (20, 20, 20))
        image.paste((250, 250, 250) if k % 2 else (250, 0, 0), box)
        image.save(root / "JPEGImages" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(f"<a>{OBJECT.format('ab'[k % 2], *box)}</a>")
    for split in ("train", "val", "test"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    return root


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    root = drawn(tmp_path_factory.mktemp("voc") / "drawn", 4)
    return {net: detection_task(f"{__name__}:{net}", str(root), size=64, augment="none") for net in ("small", "narrow")}


def config_of(name: str, pattern: str) -> Any:
    method = methods[name]
    short = {"epochs": EPOCHS.get(name, 1), "batch_size": 4, "lr": 0.001}
    known = taken(method.config)
    budget = {"density": 0.6} if "density" in known else {"flops": 0.7}
    budget = {} if parse_pattern(pattern).fixed_density is not None else budget
    fields = {"pattern": pattern, "exclude": ("heads.*",), "dense": {**short, "epochs": 0}, "train": short, **budget}
    fields = {key: value for key, value in fields.items() if key in known or key in ("dense", "train")}
    fields |= {key: SHORT[key] for key in SHORT if key in known}
    return adapter_of(method.config).validate_python({**method.defaults, **fields})


def first_pattern(name: str) -> str:
    """Returns the first pattern that a method takes, blocks before others."""
    patterns = ["block:4x2", "unstructured", "nm:2:4", "channel"]
    return next(p for p in patterns if methods[name].outcome(p) in ("masked", "shrunk", "gated"))


CASES = [("small", name) for name in methods] + [("narrow", name) for name in NARROW]


@pytest.mark.parametrize(("net", "name"), CASES)
def test_method_runs_on_a_detector(net: str, name: str, tasks: dict[str, Task], tmp_path: Path) -> None:
    method, task = methods[name], tasks[net]
    pattern = first_pattern(name)
    config = config_of(name, pattern)
    if name in REFUSED:
        with pytest.raises(MicrogliaError, match=REFUSED[name]):
            method.check(task, config)
        return
    method.check(task, config)
    model = method.procedure(task, Run(tmp_path / "run", {"method": name}), config)
    with torch.no_grad():
        maps = model.eval()(task.example)
    assert [tuple(m.shape) for m in maps] == [(1, 3, 64 // s, 64 // s, 7) for s in (8, 16, 32)]
    assert all(torch.isfinite(m).all() for m in maps)
