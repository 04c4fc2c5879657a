"""Metrics over two gloo processes: records of all ranks in order, each example once; sums and records as of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from commands import LIMIT
from two_ranks import alone_and_on_two_ranks

SCRIPT = """
import json, os, sys
import torch
from torch import nn
import microglia as mg
from microglia.data.images import ImageData, ImageSet
from microglia.data.normalization import Normalization
from microglia.tasks.classification import ImageSource
from microglia.tasks.metrics import Gathered
from microglia.tasks.task import CLASSIFICATION, CrossEntropy

if os.environ.get("WORLD_SIZE"):
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
images = torch.randint(0, 256, (11, 1, 4, 4), dtype=torch.uint8)
labels = torch.arange(11)  # a label is the index in the split: what a gathered metric needs of an example
part = ImageSet(images, labels)
data = ImageData("own", tuple(map(str, range(11))), part, part, part, Normalization((0.5,), (0.5,)), None)
orders = []

def records(outputs, targets):
    found = list(zip(targets, outputs.argmax(1), strict=True))
    return found + found[:1]  # the padding of a sampler: an example that comes twice

def value(kept):
    orders.append([int(index) for index, _ in kept])
    return {"where": float(sum(int(i) * int(c) for i, c in kept)), "n": float(len(kept))}

model = nn.Sequential(nn.Flatten(), nn.Linear(16, 11))
task = mg.Task("own", lambda: model, ImageSource(data), CrossEntropy(),
               {"where": Gathered(records, value), **CLASSIFICATION}, images[:1] / 255)
found = mg.evaluate(model, task, batch_size=3 if os.environ.get("WORLD_SIZE") else 4)
from microglia.data.scenes import IGNORED
from microglia.tasks.maps import map_metrics
maps = torch.randint(0, 3, (11, 4, 4))
maps[:, 0] = IGNORED

class Pixels:
    def batches(self, split, size, *, rank=0, world=1, **rest):
        return Cut(size, rank, world)

class Cut:
    def __init__(self, size, rank, world):
        self.size, self.rank, self.world = size // world, rank, world
    def __len__(self):
        return 1
    def epoch(self, number):
        for start in range(self.rank * self.size, 11, self.world * self.size):
            yield images[start : start + self.size] / 255, maps[start : start + self.size]

segment = nn.Conv2d(1, 3, 1)
pixels = mg.Task("pixels", lambda: segment, Pixels(), CrossEntropy(), map_metrics(("a", "b", "c")), images[:1] / 255)
found |= {name: round(value, 6) for name, value in mg.evaluate(segment, pixels, batch_size=3).items()}
print(json.dumps([found, orders]))
"""


def test_two_ranks_measure_what_one_does() -> None:
    found = alone_and_on_two_ranks(SCRIPT, LIMIT)
    assert found[0] == found[1] == found[2]
    metrics, orders = found[0]
    assert orders == [list(range(11))]
    assert metrics["n"] == 11.0
    assert set(metrics) == {"where", "n", "accuracy", "top5", "loss", "miou", "pixel_accuracy", "iou/a", "iou/b", "iou/c"}
