"""Accuracy of one-shot magnitude pruning at equal total density, by scope; nothing is retrained.

    python benchmarks/scopes.py resnet20 --data cifar10 --checkpoint resnet20.th --sensitivity runs/a/sensitivity.json

Every scope keeps the same number of weights, chosen by magnitude. Batch-norm statistics are then estimated anew (0 batches:
not). Test images decide; the sensitivity was measured on validation images. The last line: accuracy with the sensitivity
over the best of the other scopes, at the smallest density.
"""

from __future__ import annotations

import argparse
from copy import deepcopy

from rich.console import Console
from rich.table import Table

from microglia.lab.target import open_target
from microglia.methods import OneShot
from microglia.train.evaluate import evaluate
from microglia.train.recover import recalibrate_on

SCOPES = ("global", "layer", "erk")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--data")
    parser.add_argument("--checkpoint")
    parser.add_argument("--sensitivity", required=True, help="file of `microglia sensitivity`, or its directory")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.2, 0.1])
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--limit", type=int, help="batches of 256 test images, drawn once; default all")
    parser.add_argument("--recalibrate", type=int, nargs="+", default=[0, 20], help="batches of 256 training images")
    given = parser.parse_args()
    model, task = open_target(given.target, given.data, given.checkpoint)
    dense = evaluate(model, task, "test", limit=given.limit)["accuracy"]
    scopes = (*SCOPES, f"sensitivity:{given.sensitivity}")
    table = Table("density", "recalibrated", *(scope.partition(":")[0] for scope in scopes))
    found: dict[tuple[float, int, str], float] = {}
    for density in given.densities:
        for scope in scopes:
            pruned = deepcopy(model)
            kept = OneShot(pruned, density=density, scope=scope, pattern=given.pattern).masks
            assert abs(kept.kept / kept.total - density) < 0.01, f"{scope} keeps {kept.kept} of {kept.total}"
            for count in sorted(given.recalibrate):
                recalibrate_on(pruned, task, batch_size=256, count=count)
                found[density, count, scope] = evaluate(pruned, task, "test", limit=given.limit)["accuracy"]
        for count in sorted(given.recalibrate):
            cells = [f"{100 * found[density, count, scope]:.2f}" for scope in scopes]
            table.add_row(f"{density:g}", f"{count} batches" if count else "no", *cells)
    table.title = f"{task.name}, {given.pattern}: test accuracy in %; dense {100 * dense:.2f}"
    Console(width=120).print(table)
    least, most = min(given.densities), max(given.recalibrate)
    best = max(found[least, most, scope] for scope in SCOPES)
    print(f"ratio: {found[least, most, scopes[-1]] / best:.3f}")


if __name__ == "__main__":
    main()
