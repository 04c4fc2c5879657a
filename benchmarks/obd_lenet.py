"""OBD, OBS, magnitude and Fisher on LeNet-300-100 (MNIST): what the loss does without retraining.

The network is trained here (``--epochs``). Its weights are then removed by magnitude, by OBD's three estimators and by
WoodFisher, at densities from 0.9 to 0.1, all on the same 1,024 training images. OBS inverts the Hessian of all its weights
together, 20,000 at most: it is compared on the last layer alone, which has 1,000. Then 500 weights are deleted one at a time:
the Spearman correlation of the predicted and the measured change of the loss on these images.

Run: ``MICROGLIA_DATA=... python benchmarks/obd_lenet.py`` (about 6 minutes; a trial: ``--images 64 --deletions 20``).
The last line is ``ratio: <Spearman correlation of OBD by Gauss-Newton, over deletions with a prediction other than 0>``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from microglia.core.layers import prunable_layers
from microglia.methods import Obd, Obs, OneShot, WoodFisher
from microglia.methods.procedure import train
from microglia.scores import Evidence, estimators
from microglia.storage.run import Run
from microglia.tasks import image_task
from microglia.train.optim import FitConfig

DENSITIES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)


@torch.no_grad()
def loss_of(model: nn.Module, evidence: Evidence) -> float:
    """Returns the mean loss on the images."""
    model.eval()
    ((images, labels),) = evidence.batches
    return float(nn.functional.cross_entropy(model(images).double(), labels))


def pruners(evidence: Evidence) -> dict[str, Callable[[nn.Module, float], object]]:
    """Returns by name what prunes a model to a density, at once."""
    found: dict[str, Callable[[nn.Module, float], object]] = {"magnitude": lambda m, d: OneShot(m, density=d)}
    for name in estimators:
        found[f"obd, {name}"] = lambda m, d, name=name: Obd(m, density=d, estimator=name, evidence=evidence)  # type: ignore[misc]
    found["woodfisher"] = lambda m, d: WoodFisher(m, density=d, total_steps=1, evidence=evidence, examples=4).finish()
    return found


def spearman(model: nn.Module, evidence: Evidence, deletions: int, estimator: str) -> tuple[float, float, int]:
    """Returns the correlation for weights with a prediction other than 0, for all, and how many of them have one."""
    layers = prunable_layers(model)
    predicted = torch.cat([v.flatten() for v in estimators[estimator](model, layers, evidence).values()])
    places = torch.randperm(len(predicted), generator=torch.Generator().manual_seed(0))[:deletions].tolist()
    base, measured, first = loss_of(model, evidence), {}, 0
    for layer in layers.values():
        flat = layer.raw.detach().view(-1)
        for place in sorted(p - first for p in places if first <= p < first + len(flat)):
            value = flat[place].clone()
            flat[place] = 0
            measured[first + place] = loss_of(model, evidence) - base
            flat[place] = value
        first += len(flat)
    pairs = torch.tensor([[float(predicted[p]), measured[p]] for p in places], dtype=torch.float64)
    some = pairs[pairs[:, 0] != 0]
    return _correlation(some), _correlation(pairs), len(some)


def _correlation(pairs: torch.Tensor) -> float:
    ranks = pairs.argsort(0, stable=True).argsort(0).double()
    return float(torch.corrcoef(ranks.T)[0, 1])


def main() -> None:
    """Prints loss against density, and the correlations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/obd_lenet"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--deletions", type=int, default=500)
    given = parser.parse_args()
    task = image_task("lenet-300-100", data="mnist", seed=0)
    run = Run(given.out, {"epochs": given.epochs})
    dense = task.build()
    train(task, run, "dense", dense, FitConfig(epochs=given.epochs, lr=0.05, batch_size=128))
    batch = next(iter(task.data.batches("train", given.images, seed=0, shuffle=True).epoch(0)))
    evidence = Evidence([batch], task.loss)
    print(f"loss on {given.images} training images, dense {loss_of(dense, evidence):.4f}, no retraining")
    print("| pruned by | " + " | ".join(f"{d:g}" for d in DENSITIES) + " |")
    print("| --- |" + " --- |" * len(DENSITIES))
    last = list(prunable_layers(dense))[-1]
    rows = pruners(evidence)
    rows["magnitude, last layer"] = lambda m, d: OneShot(m, density=d, layers=[last])
    rows["obd, last layer"] = lambda m, d: Obd(m, density=d, layers=[last], evidence=evidence)
    rows["obs, last layer"] = lambda m, d: Obs(m, density=d, layers=[last], together=4, alpha=1e-5, evidence=evidence)
    for name, prune in rows.items():
        losses = []
        for density in DENSITIES:
            model = deepcopy(dense)
            prune(model, density)
            losses.append(loss_of(model, evidence))
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in losses) + " |", flush=True)
    worst = 1.0
    for name in estimators:
        some, every, count = spearman(dense, evidence, given.deletions, name)
        print(f"{name}: Spearman {some:.3f} over {count} deletions with a prediction, {every:.3f} over all {given.deletions}")
        worst = min(worst, some if name == "gauss-newton" else 1.0)
    print(f"ratio: {worst:.3f}")


if __name__ == "__main__":
    main()
