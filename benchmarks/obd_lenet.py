"""OBD, OBS, magnitude and Fisher on LeNet-300-100 (MNIST): what the loss does without retraining.

The network is trained here (``--epochs``). OBD and OBS assume that the network is at a minimum of its loss: L-BFGS brings it to
one, in double precision, on the 512 training images that all methods see, with labels smoothed by 0.1 (else the loss has no
minimum). The weights are then removed by magnitude, by OBD's three estimators and by WoodFisher, at densities from 0.9 to 0.1.
OBS inverts the Hessian of all its weights together, 20,000 at most: it is compared on the last layer alone, which has 1,000.
Then 500 weights are deleted one at a time: the Spearman correlation of the predicted and the measured change of the loss on
these images, at the minimum, and as trained, where the gradient that OBD leaves out decides.

Run: ``MICROGLIA_DATA=... python benchmarks/obd_lenet.py`` (about 6 minutes; a trial: ``--images 64 --deletions 20``).
The last line is ``ratio: <Spearman correlation of OBD by Gauss-Newton, over deletions with a prediction other than 0>``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from microglia.core.layers import prunable_layers
from microglia.core.masks import mask
from microglia.methods import Obd, Obs, OneShot, Pruner, WoodFisher
from microglia.methods.procedure import train
from microglia.scores import Evidence, estimators
from microglia.storage.run import Run
from microglia.tasks import image_task
from microglia.train.optim import FitConfig

DENSITIES = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)


def smoothed(outputs: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy with labels smoothed by 0.1, which has a minimum on data that can be separated."""
    return nn.functional.cross_entropy(outputs, labels, label_smoothing=0.1)


@torch.no_grad()
def loss_of(model: nn.Module, evidence: Evidence) -> float:
    """Returns the mean loss on the images."""
    model.eval()
    ((images, labels),) = evidence.batches
    return float(smoothed(model(images), labels))


def to_minimum(model: nn.Module, evidence: Evidence, steps: int = 400) -> float:
    """Minimizes the loss on the images by L-BFGS; returns the largest absolute gradient that is left."""
    ((images, labels),) = evidence.batches
    rules: dict[str, Any] = {"tolerance_grad": 1e-9, "tolerance_change": 1e-14, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, history_size=20, **rules)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = smoothed(model(images), labels)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[arg-type, no-untyped-call]
    loss()
    return max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)


def masked(dense: nn.Module, values: Mapping[str, Tensor], density: float) -> nn.Module:
    """Returns a copy of a model with the weights of the largest values."""
    model = deepcopy(dense)
    pruner = Pruner(model, density=density)
    mask(model, pruner.select(values, pruner.target, {}))
    return model


def spearman(model: nn.Module, evidence: Evidence, values: Mapping[str, Tensor], deletions: int) -> tuple[float, float, int]:
    """Returns the correlation for weights with a prediction other than 0, for all, and how many of them have one."""
    layers = prunable_layers(model)
    predicted = torch.cat([value.flatten() for value in values.values()])
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
    return float(spearmanr(*pairs.T.numpy()).statistic)


def main() -> None:
    """Prints loss against density, and the correlations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/obd_lenet"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--deletions", type=int, default=500)
    given = parser.parse_args()
    task = image_task("lenet-300-100", data="mnist", seed=0)
    run = Run(given.out, {"epochs": given.epochs})
    dense = task.build()
    train(task, run, "dense", dense, FitConfig(epochs=given.epochs, lr=0.05, batch_size=128))
    images, labels = next(iter(task.data.batches("train", given.images, seed=0, shuffle=True).epoch(0)))
    dense.double()
    evidence = Evidence([(images.double(), labels)], smoothed)
    layers = prunable_layers(dense)
    trained = spearman(dense, evidence, estimators["gauss-newton"](dense, layers, evidence), given.deletions)
    gradient = to_minimum(dense, evidence)
    print(f"loss on {given.images} images, dense {loss_of(dense, evidence):.4f}, no retraining; gradients <= {gradient:.0e}")
    print("| pruned by | " + " | ".join(f"{d:g}" for d in DENSITIES) + " |")
    print("| --- |" + " --- |" * len(DENSITIES))
    found = {"magnitude": {name: layer.weight.detach().abs() for name, layer in layers.items()}}
    found |= {f"obd, {name}": estimate(dense, layers, evidence) for name, estimate in estimators.items()}
    rows: dict[str, Callable[[float], nn.Module]] = {
        name: lambda d, values=values: masked(dense, values, d)  # type: ignore[misc]
        for name, values in found.items()
    }

    def made(prune: Callable[[nn.Module, float], object]) -> Callable[[float], nn.Module]:
        def model_of(density: float) -> nn.Module:
            model = deepcopy(dense)
            prune(model, density)
            return model

        return model_of

    last = list(layers)[-1]
    steps: dict[str, Any] = {"total_steps": 1, "examples": 4, "evidence": evidence}
    rows["woodfisher"] = made(lambda m, d: WoodFisher(m, density=d, **steps).finish())
    rows["magnitude, last layer"] = made(lambda m, d: OneShot(m, density=d, layers=[last]))
    rows["obd, last layer"] = made(lambda m, d: Obd(m, density=d, layers=[last], evidence=evidence))
    rows["obs, last layer"] = made(lambda m, d: Obs(m, density=d, layers=[last], together=4, alpha=1e-5, evidence=evidence))
    for name, model_at in rows.items():
        losses = [loss_of(model_at(density), evidence) for density in DENSITIES]
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in losses) + " |", flush=True)
    worst = 1.0
    for name in list(found)[1:]:
        some, every, count = spearman(dense, evidence, found[name], given.deletions)
        print(f"{name}: Spearman {some:.3f} over {count} deletions with a prediction, {every:.3f} over all {given.deletions}")
        worst = some if name == "obd, gauss-newton" else worst
    print(f"as trained, not at a minimum: gauss-newton {trained[0]:.3f}")
    print(f"ratio: {worst:.3f}")


if __name__ == "__main__":
    main()
