"""Layer-wise pruning over two gloo processes: each has half of the calibration, and both get the masks of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from commands import LIMIT
from two_ranks import alone_and_on_two_ranks

SCRIPT = """
import json, os
import torch
from torch import nn
import microglia as mg

world = int(os.environ.get("WORLD_SIZE", "1"))
if world > 1:
    torch.distributed.init_process_group("gloo")
rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
batches = [torch.randn(20, 16) @ torch.randn(16, 16) for _ in range(4)]
found = {}
for rule in ("wanda", "sparsegpt"):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    pruner = mg.methods.Layerwise(model, batches[rank::world], rule=rule, density=0.5)
    pruner.prune()
    found[rule] = {name: mask.int().tolist() for name, mask in pruner.masks.items()}
    found[rule]["weights"] = [round(float(p.double().sum()), 4) for p in mg.fold(model).parameters()]
    scored = mg.scores.scores["obs"](model, mg.core.layers.prunable_layers(model), mg.scores.Evidence(
        [(x, None) for x in batches[rank::world]]))
    found[rule]["scored"] = [round(float(value.sum()), 3) for value in scored.values()]
print(json.dumps(found))
"""


def test_two_ranks_prune_as_one_does() -> None:
    found = alone_and_on_two_ranks(SCRIPT, LIMIT)
    assert found[1] == found[2]
    for rule, layers in found[0].items():
        for name, value in layers.items():
            assert value == found[1][rule][name], (rule, name)
