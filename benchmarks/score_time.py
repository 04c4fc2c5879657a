"""Claim: scoring an untrained network costs a few passes; SynFlow's 100 rounds hardly more than 100 passes of one image.

SNIP and GraSP on a batch, and SynFlow's 100 rounds (scores, selection and masks of every round, down to 1 % of the weights),
in units of one forward and backward pass: of the same batch, and for SynFlow of one image. Passes of a batch are timed
between the scores, passes of one image between SynFlow's rounds, for a machine may change its pace in between; medians. Peak
memory is what a fresh process holds at most while it scores (or runs the pass) beyond what it held before.
Run: ``python benchmarks/score_time.py``
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

import microglia as mg
from microglia.scores import Evidence, PositiveFlow, scores

MODELS = {"vgg16-bn": ((3, 32, 32), 128), "torchvision:resnet50": ((3, 224, 224), 8)}
"""Name -> (shape of an image, images in a batch)."""
ROUNDS = 100
EVERY = 4  # rounds of SynFlow from one timed pass to the next

Job = Callable[[], object]


def make(name: str) -> tuple[nn.Module, Evidence]:
    shape, batch = MODELS[name]
    torch.manual_seed(0)
    model = mg.tasks.build(name, classes=10, shape=shape)
    return model, Evidence([(torch.randn(batch, *shape), torch.randint(10, (batch,)))], functional.cross_entropy)


def one_pass(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Job:
    def run() -> None:
        model.train(len(images) > 1)  # batch norm has nothing to normalize over in one image at 1 x 1
        functional.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    return run


def jobs(name: str, rounds: int) -> dict[str, Job]:
    model, evidence = make(name)
    images, labels = next(iter(evidence.batches))
    layers = mg.core.layers.prunable_layers(model)

    unit = one_pass(model, images[:1], labels[:1])
    pruner = mg.methods.AtInit  # imported here, so that no first call is charged with it

    def synflow() -> None:
        fresh, _ = make(name)
        passes: list[float] = []
        begin = time.perf_counter()
        with between_rounds(lambda: passes.append(seconds(unit))):
            pruner(fresh, density=0.01, score="synflow", rounds=rounds, evidence=Evidence([(images[:1], labels[:1])]))
        synflow.seconds = time.perf_counter() - begin - sum(passes)  # type: ignore[attr-defined] # without the building
        synflow.passes = passes  # type: ignore[attr-defined]

    return {
        "pass": one_pass(model, images, labels),
        "pass of one": unit,
        "snip": lambda: scores["snip"](model, layers, evidence),
        "grasp": lambda: scores["grasp"](model, layers, evidence),
        "synflow": synflow,
    }


@contextmanager
def between_rounds(work: Job) -> Iterator[None]:
    """Works before every few of SynFlow's rounds."""
    slopes, count = PositiveFlow.slopes, itertools.count()

    def after(flow: PositiveFlow) -> object:
        if next(count) % EVERY == 0:
            work()
        return slopes(flow)

    PositiveFlow.slopes = after  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PositiveFlow.slopes = slopes  # type: ignore[method-assign]


def seconds(job: Job) -> float:
    begin = time.perf_counter()
    job()
    took = time.perf_counter() - begin
    return getattr(job, "seconds", took)


def peak(name: str, job: str, rounds: int, answer: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    """Answers with the MiB that a job takes at most."""
    torch.set_num_threads(1)
    made = jobs(name, rounds)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before = held("VmRSS")
    made[job]()
    answer.put(held("VmHWM") - before)


def held(kind: str) -> float:
    """Returns MiB of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def memory(name: str, job: str) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=peak, args=(name, job, 3, answer))
    process.start()
    found = answer.get(timeout=600)
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of SynFlow")
    parser.add_argument("--repeat", type=int, default=3, help="of every score")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, float32")
    ratios = []
    for name in arguments.models:
        made = jobs(name, arguments.rounds)
        made["pass"](), made["pass of one"]()
        times: dict[str, list[float]] = {job: [] for job in made}
        for _ in range(arguments.repeat):
            for job in ("snip", "grasp", "synflow"):
                times["pass"] += [seconds(made["pass"]) for _ in range(2)]
                times[job].append(seconds(made[job]))
            times["pass of one"] += made["synflow"].passes  # type: ignore[attr-defined]
        middle = {job: statistics.median(values) for job, values in times.items()}
        title = f"{name}, batch {MODELS[name][1]} (SynFlow: one image of ones, {arguments.rounds} rounds)"
        table = Table("", "seconds", "passes", "peak memory, MiB", title=title)
        for job, value in middle.items():
            unit = middle["pass of one"] if job in ("pass of one", "synflow") else middle["pass"]
            table.add_row(job, f"{value:.3f}", f"{value / unit:.2f}", f"{memory(name, job):.0f}")
        Console(width=110).print(table)
        ratios.append(middle["synflow"] / (arguments.rounds * middle["pass of one"]))
        print(f"{name}: SynFlow / ({arguments.rounds} passes of one image) = {ratios[-1]:.3f}", flush=True)
    print(f"ratio: {max(ratios):.3f}")


if __name__ == "__main__":
    main()
