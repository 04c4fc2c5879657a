"""HRank's own claims, on a trained network and real images (Lin et al. 2020).

    stable      the ranks of maps hardly depend on the images: Spearman's correlation of the channels' mean ranks over two
                disjoint sets of --images training images, layer by layer; the claim is that every one is above 0.95
    order       at equal widths HRank keeps more accuracy than its variants: hrank > edge, random > reverse; without recovery,
                and after --epochs epochs of it. `random` is the mean over --draws draws

Run: ``OMP_NUM_THREADS=1 python benchmarks/hrank_claims.py --checkpoint resnet56-4bfd9763.th``. One table for each claim; the
last lines say which claim holds. ``--out results/structured/hrank_claims.json`` keeps the numbers and the sentences, and
`structured_table.py --write` takes the sentences into its document.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import microglia as mg
from microglia.core.layers import prunable_layers
from microglia.lab.execute import make_task
from microglia.lab.recipe import resolve
from microglia.methods import Hrank
from microglia.methods.widths_observed import spearman
from microglia.scores import Evidence
from microglia.scores.features import ranks_by_batch
from microglia.scores.guard import untouched
from microglia.tasks.loaders import loaders
from microglia.tasks.task import Split, Task
from microglia.train.evaluate import evaluate
from microglia.train.fit import fit
from microglia.train.recover import recalibrate_on

CLAIMED = 0.95
VARIANTS = ("hrank", "edge", "random", "reverse")
BATCH = 100


@dataclass(frozen=True)
class Accuracy:
    """One variant at the common widths.

    Attributes:
        variant: Which channels went.
        before: Accuracy without any recovery.
        after: Accuracy after the recovery; None without one.
    """

    variant: str
    before: float
    after: float | None = None


def agreement(
    model: nn.Module, one: Sequence[tuple[Tensor, Tensor]], other: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Returns Spearman's correlation of the channels' mean ranks over two sets of batches, by layer.

    Layers in which all ranks are equal are left out, such as the classifier.
    """
    means = []
    for batches in (one, other):
        with untouched(model):
            found = ranks_by_batch(model, prunable_layers(model), Evidence(batches))
        means.append({name: sum(s[0] for s in sums) / sum(s[2] for s in sums) for name, sums in found.items()})
    values = {name: spearman(means[0][name], means[1][name]) for name in means[0]}
    return {name: value for name, value in values.items() if not math.isnan(value)}


@dataclass(frozen=True)
class Trial:
    """What all variants have in common.

    Attributes:
        task: Its test split judges.
        model: The trained network.
        batches: Images on which maps are ranked.
        density: Kept fraction of the channels.
        training: The recovery.
    """

    task: Task
    model: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    density: float
    training: mg.FitConfig

    def order(self, draws: int) -> list[Accuracy]:
        """Returns the accuracy of each variant; `random` is the mean over draws."""
        counts = {variant: draws if variant == "random" else 1 for variant in VARIANTS}
        return [_mean([self.cut(variant, draw) for draw in range(count)]) for variant, count in counts.items()]

    def cut(self, variant: str, draw: int) -> Accuracy:
        """Returns the accuracy of one variant before and after the recovery."""
        task, small = self.task, deepcopy(self.model)
        pruner = Hrank(
            small,
            total_steps=1,
            example_inputs=task.example,
            evidence=Evidence(self.batches, task.loss, torch.Generator().manual_seed(draw)),
            variant=variant,
            order="all-at-once",
            density=self.density,
        )
        pruner.finish()
        before = float(evaluate(small, task, "test")[task.headline])
        if not self.training.epochs:
            return Accuracy(variant, before)
        small = mg.shrink(small, task.example, clear=True)
        recalibrate_on(small, task, batch_size=self.training.batch_size, count=20, seed=0)
        fit(small, task, self.training, seed=0)
        return Accuracy(variant, before, float(evaluate(small, task, "test")[task.headline]))


def _mean(found: Sequence[Accuracy]) -> Accuracy:
    after = [one.after for one in found if one.after is not None]
    return Accuracy(found[0].variant, fmean(one.before for one in found), fmean(after) if after else None)


@dataclass(frozen=True)
class Judged:
    """The data of a task with the first batches of its test split alone."""

    task: Task
    count: int

    def batches(self, split: Split, batch_size: int, **settings: Any) -> Any:
        """Returns the batches of a split."""
        if split != "test":
            return self.task.data.batches(split, batch_size, **settings)
        test = [batch for batch, _ in zip(self.task.data.batches("test", BATCH).epoch(0), range(self.count), strict=False)]
        return loaders(train=test, test=test).batches("test", BATCH)


def verdicts(agreements: Mapping[str, float], accuracies: Sequence[Accuracy]) -> Iterator[str]:
    """Yields one sentence for each claim."""
    least = min(agreements, key=agreements.__getitem__)
    holds = "holds" if agreements[least] > CLAIMED else "does not hold"
    yield (
        f"stable: {holds}; least {agreements[least]:.3f} ({least}), mean {fmean(agreements.values()):.3f} over "
        f"{len(agreements)} layers; claimed > {CLAIMED}"
    )
    for moment in ("before", "after"):
        values = {one.variant: getattr(one, moment) for one in accuracies}
        if None in values.values():
            continue
        middle = values["edge"], values["random"]
        right = values["hrank"] > max(middle) and min(middle) > values["reverse"]
        told = ", ".join(f"{name} {100 * value:.2f}" for name, value in values.items())
        yield f"order {moment} recovery: {'holds' if right else 'does not hold'}; {told} %"


def drawn(task: Task, images: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Returns two disjoint sets of training images, in batches, drawn once without augmentation."""
    size = min(BATCH, images)
    count = -(-images // size)
    batches = task.data.batches("train", size, seed=0, shuffle=True).epoch(0)
    found = [batch for batch, _ in zip(batches, range(2 * count), strict=False)]
    if len(found) < 2 * count:
        raise SystemExit(f"Two sets of {images} training images are needed, and the data hold fewer: lower --images.")
    return found[:count], found[count:]


def shown(console: Console, agreements: Mapping[str, float], accuracies: Sequence[Accuracy]) -> None:
    """Prints both tables and the verdicts."""
    table = Table("layer", "Spearman", title="ranks over two disjoint sets of images")
    for name, value in agreements.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    table = Table("variant", "before recovery, %", "after, %", title="accuracy at equal widths")
    for one in accuracies:
        table.add_row(one.variant, f"{100 * one.before:.2f}", "" if one.after is None else f"{100 * one.after:.2f}")
    console.print(table)
    for sentence in verdicts(agreements, accuracies):
        console.print(sentence, highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--checkpoint")
    parser.add_argument("--images", type=int, default=500, help="training images in each of the two sets")
    parser.add_argument("--density", type=float, default=0.8, help="kept fraction of the channels")
    parser.add_argument("--draws", type=int, default=3, help="draws of the variant random")
    parser.add_argument("--judged", type=int, default=2000, help="test images; 0 for all")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--limit", type=int, help="batches in an epoch")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    task = make_task(resolve({"model": asked.model, "data": asked.data, "checkpoint": asked.checkpoint}))
    model = task.build()
    one, other = drawn(task, asked.images)
    agreements = agreement(model, one, other)
    judged = replace(task, data=Judged(task, -(-asked.judged // BATCH))) if asked.judged else task
    training = mg.FitConfig(epochs=asked.epochs, lr=asked.lr, max_batches=asked.limit, weight_decay=5e-4)
    accuracies = Trial(judged, model, one, asked.density, training).order(asked.draws)
    shown(Console(), agreements, accuracies)
    if asked.out is not None:
        told = {
            "verdicts": list(verdicts(agreements, accuracies)),
            "agreement": agreements,
            "order": [vars(one) for one in accuracies],
            "asked": vars(asked) | {"out": None, "checkpoint": asked.checkpoint and Path(asked.checkpoint).name},
        }
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
