"""Claim: a width vector is evaluated at several times the rate of building, tracing and cutting a model for each.

Candidates per minute of a search over the widths of ResNet-56: random vectors at half of the multiply-accumulates; batch-norm
statistics estimated anew, then accuracy on --images random images. Three ways, the same vectors and the same values:

    shared          the evaluator of the searches: one trace, slices of the shared weights, --processes processes
    rebuild         the model built, its weights loaded, traced and cut for each vector, as many processes
    rebuild, one    the same in one process, as a plain loop does it

Ways take turns, and medians over --rounds count. The trace that the shared evaluator needs once is told beside its rate and is
not in it. The last line is the rate of `shared` over that of `rebuild, one`; the line before compares equal processes.
Run: ``OMP_NUM_THREADS=1 python benchmarks/search_cost.py``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import microglia as mg
from microglia.graph.channels.coupled import CoupledChannels
from microglia.methods import Evaluator, WidthSpace
from microglia.methods.width_space import Widths
from microglia.train.recover import recalibrate

BATCH = 128
EXAMPLE = torch.zeros(1, 3, 32, 32)


class Candidates:
    """Both ways to make the small model of a vector, and what values it."""

    def __init__(self, name: str, images: int, recalibration: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name, self.model = name, mg.zoo.build(name)
        begun = time.perf_counter()
        self.units = CoupledChannels(self.model, EXAMPLE)
        self.trace = time.perf_counter() - begun
        self.space = WidthSpace(self.units, mg.Budget(flops=0.5))
        self.ranking = torch.rand(self.units.count, generator=generator)
        self.seen = [(torch.randn(BATCH, 3, 32, 32, generator=generator), None) for _ in range(recalibration)]
        self.held = torch.randn(images, 3, 32, 32, generator=generator).split(BATCH)

    def kept(self, widths: Widths) -> Tensor:
        """Returns the channels that a vector keeps."""
        return self.space.channels(self.ranking, widths)

    @torch.no_grad()
    def value(self, small: nn.Module) -> float:
        """Returns the value of a small model."""
        recalibrate(small, self.seen, count=len(self.seen))
        small.eval()
        return float(torch.cat([small(batch).argmax(1) for batch in self.held]).double().mean())

    def shared(self, widths: Widths) -> float:
        """Returns the value of a slice of the shared weights."""
        return self.value(self.units.sliced(self.model, self.kept(widths)))

    def rebuild(self, widths: Widths) -> float:
        """Returns the value of a model that is built, traced and cut."""
        model = mg.zoo.build(self.name)
        model.load_state_dict(self.model.state_dict())
        return self.value(CoupledChannels(model, EXAMPLE).sliced(model, self.kept(widths)))


def rate(measure: Callable[[Widths], float], vectors: Sequence[Widths], processes: int) -> tuple[float, list[float]]:
    """Returns candidates per minute, and their values; the start of processes is not in it."""
    with Evaluator(measure, processes=processes) as evaluate:
        if processes > 1:
            evaluate([vectors[0]] * processes)
        begun = time.perf_counter()
        values = evaluate(vectors[1:])
        return 60 * (len(vectors) - 1) / (time.perf_counter() - begun), values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--recalibration", type=int, default=2, help="batches of 128 images")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    made = Candidates(asked.model, asked.images, asked.recalibration)
    vectors = made.space.distinct(asked.candidates + 1, torch.Generator().manual_seed(0))
    ways = {
        "shared": (made.shared, asked.processes),
        "rebuild": (made.rebuild, asked.processes),
        "rebuild, one": (made.rebuild, 1),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(asked.rounds):
        values = {}
        for way, (measure, processes) in ways.items():
            found, values[way] = rate(measure, vectors, processes)
            rates[way].append(found)
        if len({tuple(own) for own in values.values()}) != 1:
            raise SystemExit(f"The ways disagree: {values}")
    table = Table("way", "processes", "candidates per minute", title=f"{asked.model}, {asked.images} images")
    middle = {way: statistics.median(own) for way, own in rates.items()}
    for way, (_, processes) in ways.items():
        table.add_row(way, str(processes), f"{middle[way]:.1f}")
    console = Console()
    console.print(table)
    console.print(f"trace, once: {made.trace:.1f} s", highlight=False)
    console.print(f"at equal processes: {middle['shared'] / middle['rebuild']:.2f}", highlight=False)
    console.print(f"ratio: {middle['shared'] / middle['rebuild, one']:.2f}", highlight=False)


if __name__ == "__main__":
    main()
