"""Time functions against each other: interleaved in one process, medians of rounds."""

from __future__ import annotations

import gc
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from microglia.core.errors import MicrogliaError
from microglia.core.progress import progress_bar
from microglia.core.running import cuda_in_use


@dataclass(frozen=True)
class Timing:
    """Time of one call over several rounds, in milliseconds.

    Attributes:
        median: The middle round.
        low: First quartile of the rounds.
        high: Third quartile of the rounds.
        rounds: How many rounds there were.
    """

    median: float
    low: float
    high: float
    rounds: int


def time_interleaved(
    callables: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 3,
    min_round_seconds: float = 0.02,
    max_seconds: float = math.inf,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    title: str = "",
) -> dict[str, Timing]:
    """Times functions against each other, so that other load on the machine affects all of them equally.

    After a warm-up, every round times each function once, in an order shuffled anew by a seeded generator. A turn begins with
    one call that is not timed. The timed calls thus find the cache as their own last call left it, as in serving, and not as
    the other functions left it. A function faster than ``min_round_seconds`` is called several times in its turn, and the time
    is divided. Where CUDA is in use, each call is timed until the device has finished. Garbage collection waits meanwhile.

    Args:
        callables: Name -> function without arguments.
        rounds: Rounds, at least 1.
        warmup: Calls of each function before the first round, at least 1.
        min_round_seconds: Minimum time of one turn, in seconds.
        max_seconds: No further round starts after this time, in seconds; there are always three, or ``rounds`` if fewer.
        seed: Seeds the order; the global generators are left alone.
        clock: Returns the time in seconds.
        title: Text of a progress bar over the rounds, which is drawn between them; empty for none.

    Returns:
        Name -> time per call, in the order of ``callables``.

    Raises:
        MicrogliaError: No function, or ``rounds`` or ``warmup`` below 1.
    """
    if not callables or rounds < 1 or warmup < 1:
        raise MicrogliaError(
            f"Timing takes at least one function, one round and one warm-up call, not {len(callables)}, {rounds} and {warmup}."
        )
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda_in_use() else lambda: None
    turns = {name: partial(_turn, function, synchronize, clock) for name, function in callables.items()}
    order, names = random.Random(seed), list(callables)
    times: dict[str, list[float]] = {name: [] for name in names}
    fastest = {name: min(turn(1) for _ in range(warmup)) for name, turn in turns.items()}
    calls = {name: max(1, math.ceil(min_round_seconds / max(fastest[name], 1e-7))) for name in names}
    with _collection_waits(), progress_bar(title, rounds) if title else nullcontext() as bar:
        start = clock()
        for done in range(rounds):
            if done >= 3 and clock() - start > max_seconds:
                break
            for name in order.sample(names, len(names)):
                turns[name](1)
                times[name].append(turns[name](calls[name]))
            if bar is not None:
                bar.advance()
    return {name: _summary(values) for name, values in times.items()}


def _turn(function: Callable[[], object], synchronize: Callable[[], None], clock: Callable[[], float], calls: int) -> float:
    """Returns the seconds of one call, the mean over so many."""
    synchronize()
    start = clock()
    for _ in range(calls):
        function()
        synchronize()
    return (clock() - start) / calls


@contextmanager
def _collection_waits() -> Iterator[None]:
    """Within it no garbage is collected."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _summary(seconds: list[float]) -> Timing:
    milliseconds = [1e3 * value for value in seconds]
    if len(milliseconds) == 1:
        return Timing(milliseconds[0], milliseconds[0], milliseconds[0], 1)
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(median, low, high, len(milliseconds))


def processor_name() -> str:
    """Returns the name of this machine's CPU."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(errors="replace").splitlines() if described.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "CPU"
