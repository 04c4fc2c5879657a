"""Claim: feeding CIFAR-10 to the training of a ResNet-20 costs less than 5 % of the training itself.

Both are timed in one process, turn by turn: one batch from the loader (batch 128, crops and flips, channels_last), then
one training step on it. Medians, because the machine may be shared. Run: ``python benchmarks/loader.py``
"""

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from microglia.core.errors import MicrogliaError
from microglia.data import Batches, ImageData, load_data
from microglia.zoo import build

WARM_UP = 5
STEPS = 40


def main() -> None:
    try:
        data = load_data("cifar10")
    except MicrogliaError as error:
        print(f"The loader was not measured because CIFAR-10 is not available: {error}")
        return
    loader = Batches(
        data.train,
        128,
        normalization=data.normalization,
        augmentation=data.augmentation,
        shuffle=True,
        channels_last=True,
    )
    fetch, step = interleaved(data, loader)
    begun = time.perf_counter()
    count = sum(1 for _ in loader.epoch(1))
    alone = (time.perf_counter() - begun) / count
    table = Table(title=f"CIFAR-10, batches of 128, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("", "ms per batch", f"s per epoch of {count}"):
        table.add_column(column, justify="right")
    for name, seconds in (("loader, between steps", fetch), ("loader, epoch alone", alone), ("training step", step)):
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds * count:.2f}")
    Console().print(table)
    print(f"ratio: {fetch / step:.4f}")


def interleaved(data: ImageData, loader: Batches) -> tuple[float, float]:
    """Returns the median seconds of one loader batch and of one training step."""
    model = build("resnet20", classes=len(data.classes), shape=data.shape).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    batches = loader.epoch(0)
    times: list[tuple[float, float]] = []
    for _ in range(WARM_UP + STEPS):
        begun = time.perf_counter()
        inputs, labels = next(batches)
        fetched = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        times.append((fetched - begun, time.perf_counter() - fetched))
    fetch, step = zip(*times[WARM_UP:], strict=True)
    return statistics.median(fetch), statistics.median(step)


if __name__ == "__main__":
    main()
