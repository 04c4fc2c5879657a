"""Claim: batch-norm statistics estimated anew help right after weights went, by more than two standard errors.

ResNet-20 on CIFAR-10 from its checkpoint, without any training after the pruning: test accuracy of identical weights with the
statistics they had and with those of 20 augmented training batches (the default of the methods). Three kinds:

    oneshot     masks by a score, unstructured
    channels    channels removed by a score, uniformly
    freeze      a short search (lr 0.02, half of --steps; AC/DC's last compression at 0.85) up to its exact masks

Seeds are those of scores, order and augmentation. The error of the mean gain is that of images (paired, gains averaged over
seeds) and that of seeds together. Last line of each kind: in how many cases recalibration helps, and harms, by two of them.
Run: ``MICROGLIA_DATA=... python benchmarks/recalibration.py channels --json recalibration_channels.json``
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import microglia as mg
from microglia.methods import methods
from microglia.methods.acdc import Acdc
from microglia.methods.awg import Awg
from microglia.methods.pas import Pas
from microglia.methods.pdp import Pdp
from microglia.methods.smart import Smart
from microglia.methods.unit_pruner import UnitPruner
from microglia.tasks.task import Task
from microglia.train.recover import recalibrate_on

PRUNERS: dict[str, type[UnitPruner]] = {"smart": Smart, "pdp": Pdp, "pas": Pas, "awg": Awg, "acdc": Acdc}
SEARCHED = [("block:16x8", 0.3), ("channel", 0.5)]
Case = tuple[str, Callable[[int], nn.Module]]
"""What a case is called, and the pruned model of a seed."""


class Frozen(Exception):
    """The masks are exact."""


def source(task: Task, seed: int) -> mg.scores.Evidence:
    batches = task.data.batches("train", 128, seed=seed, shuffle=True)
    return mg.scores.Evidence(list(islice(batches.epoch(0), 4)), task.loss, torch.Generator().manual_seed(seed))


def oneshot(task: Task) -> Iterator[Case]:
    for score in ("magnitude", "gradient", "random"):
        for density in (0.5, 0.25, 0.125):

            def made(seed: int, score: str = score, density: float = density) -> nn.Module:
                model = task.build()
                mg.methods.OneShot(model, density=density, score=score, evidence=source(task, seed))
                return model

            yield f"{score}, density {density}", made


def channels(task: Task) -> Iterator[Case]:
    for score in ("magnitude", "gradient", "random"):
        for kept in (0.9, 0.75, 0.5):

            def made(seed: int, score: str = score, kept: float = kept) -> nn.Module:
                budget = mg.Budget(density=kept)
                evidence = source(task, seed)
                settings: dict[str, Any] = {"score": score, "reduction": "l2", "evidence": evidence, "round_to": 1}
                return mg.prune_channels(task.build(), task.example, budget, **settings)

            yield f"{score}, density {kept}", made


def freeze(task: Task, steps: int, batch: int, asked: float | None) -> Iterator[Case]:
    for pattern, usual in SEARCHED:
        density = asked or usual
        for name in PRUNERS:

            def made(seed: int, name: str = name, pattern: str = pattern, density: float = density) -> nn.Module:
                return frozen(task, name, (pattern, density), mg.FitConfig(1, batch, steps, lr=0.02), seed)

            yield f"{name}, {pattern}, density {density}", made


def frozen(task: Task, name: str, asked: tuple[str, float], training: mg.FitConfig, seed: int) -> nn.Module:
    """Returns the model of a search at the moment at which its masks are exact, as `searched` recalibrates it."""

    def moment(when: str) -> dict[str, float]:
        if when == "hard":
            raise Frozen
        return {}

    model, share = task.build(), {} if name == "acdc" else {"search": 0.5}
    pattern, density = asked
    config = methods[name].config(pattern=pattern, density=density, exclude=("linear",), **share)
    evidence = source(task, seed)
    pruner = PRUNERS[name](
        model,
        config,
        total_steps=training.max_batches or 0,
        example_inputs=task.example,
        evidence=evidence,
        at_freeze=moment,
    )
    try:
        mg.fit(model, task, training, seed=seed, pruner=pruner)
    except Frozen:
        return model
    raise RuntimeError(f"The search of {name} did not end in {training.max_batches} steps.")


@torch.no_grad()
def correct(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns which images the model gets right, (images,), as 0 and 1."""
    model = model.to(memory_format=torch.channels_last).eval()
    return torch.cat([(model(inputs).argmax(1) == targets).float() for inputs, targets in batches])


def measured(task: Task, case: Case, given: argparse.Namespace, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Returns the accuracies of one case (%), the gain in points and its standard error."""
    name, make = case
    stale, anew = [], []
    for seed in range(given.seeds):
        model = make(seed)
        stale.append(correct(model, batches))
        recalibrate_on(model, task, batch_size=given.batch, count=given.count, seed=seed)
        anew.append(correct(model, batches))
    without, with_ = 100 * torch.stack(stale), 100 * torch.stack(anew)
    gains = with_ - without
    of_images = float(gains.mean(0).std()) / math.sqrt(gains.shape[1])
    of_seeds = float(gains.mean(1).std()) / math.sqrt(given.seeds) if given.seeds > 1 else 0.0
    return {
        "case": name,
        "without": without.mean(1).tolist(),
        "with": with_.mean(1).tolist(),
        "gain": float(gains.mean()),
        "error": math.hypot(of_images, of_seeds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("oneshot", "channels", "freeze"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=20, help="batches of recalibration")
    parser.add_argument("--batch", type=int, default=128, help="training images in a batch, of recalibration too")
    parser.add_argument("--images", type=int, default=3072, help="test images")
    parser.add_argument("--steps", type=int, default=120, help="of the whole training that a search is half of")
    parser.add_argument("--density", type=float, help="of the searches, instead of 0.3 of blocks and 0.5 of channels")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path, help="file for the values")
    given = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Path(os.environ["MICROGLIA_DATA"]) / "checkpoints" / "resnet20-12fca82f.th"
    task = mg.tasks.image_task("resnet20", "cifar10", checkpoint=checkpoint, normalize="imagenet")
    drawn = task.data.batches("test", 256, seed=0, shuffle=True).epoch(0)
    batches = [
        (inputs.contiguous(memory_format=torch.channels_last), targets)
        for inputs, targets in islice(drawn, math.ceil(given.images / 256))
    ]
    cases = {"oneshot": oneshot, "channels": channels}.get(
        given.kind, lambda task: freeze(task, given.steps, given.batch, given.density)
    )(task)
    rows = []
    print(f"| {given.kind} | stale, % | anew, % | gain, points | two errors |\n| --- | ---: | ---: | ---: | ---: |")
    for case in cases:
        if given.only not in case[0]:
            continue
        row = measured(task, case, given, batches)
        rows.append(row)
        stale, anew = (sum(row[key]) / given.seeds for key in ("without", "with"))
        print(f"| {row['case']} | {stale:.2f} | {anew:.2f} | {row['gain']:+.2f} | {2 * row['error']:.2f} |", flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps({"asked": vars(given) | {"json": None}, "rows": rows}, indent=1) + "\n")
    helps, harms = (sum(sign * row["gain"] > 2 * row["error"] for row in rows) for sign in (1, -1))
    print(f"\n{given.kind}: helps in {helps} of {len(rows)} cases, harms in {harms}.")


if __name__ == "__main__":
    main()
