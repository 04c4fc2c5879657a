"""Tile sizes, the work of one program of a kernel: the sizes to try, and the fastest for a problem."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from microglia.core.errors import MicrogliaError

COALESCED = 16
"""Bytes of one load; if the inputs of a block fill them, reading an image in channels last is at full speed."""


class Tile(NamedTuple):
    """The partition of a layer's work.

    Attributes:
        pixels: Output pixels of a program; Hopper's matrix instructions need 64 or more.
        columns: Columns of the weight in one step of its loop.
        warps: Warps of 32 threads.
        stages: Pipelined steps. Indices are read before the data that they point to, which takes two of the steps: 5 keep three
            tiles in shared memory (from the compiler's report).
        turned: Whether the image is first copied so that the images of the batch are neighbours in memory. Then every column of
            the weight reads contiguous memory, even with one input.
    """

    pixels: int
    columns: int
    warps: int
    stages: int
    turned: bool


_RUNS = ((128, 32, 4, 5), (64, 64, 4, 5), (128, 64, 4, 5), (128, 64, 8, 5), (256, 32, 8, 5), (256, 64, 8, 5))
_SCATTERED = ((64, 32, 4, 3), (128, 32, 8, 3))
"""Tiles for single elements, which are loaded through registers: small, so that they do not spill (128 x 64 with 4 warps
does)."""


def tiles(width: int, element_size: int) -> tuple[Tile, ...]:
    """Returns the tiles to time for blocks of ``width`` inputs; the first is the default without timing."""
    if width * element_size >= COALESCED:
        return tuple(Tile(*sizes, False) for sizes in _RUNS)
    return (*(Tile(*sizes, True) for sizes in _RUNS), *(Tile(*sizes, False) for sizes in _SCATTERED))


_chosen: dict[Hashable, Tile] = {}


def fastest_tile(problem: Hashable, options: tuple[Tile, ...], run: Callable[[Tile], Tensor], device: torch.device) -> Tile:
    """Returns the fastest tile for a problem, timed once per process.

    Nothing is timed on the CPU (Triton's interpreter) or while a CUDA graph is captured: then the first option is used, unless
    the problem was timed before.

    Args:
        problem: The key of the problem, all that its time depends on.
        options: Tiles to choose from.
        run: Runs the problem with a tile.
        device: Device of the run.

    Raises:
        MicrogliaError: No tile runs on this device; the text is that of the last failure.
    """
    if problem in _chosen:
        return _chosen[problem]
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return options[0]
    times: dict[Tile, float] = {}
    failure = ""
    for tile in options:
        try:
            run(tile)
            times[tile] = statistics.median(_milliseconds(lambda tile=tile: run(tile)) for _ in range(3))  # type: ignore[misc]
        except RuntimeError as error:  # this tile needs more shared memory or registers than the GPU has
            failure = str(error)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "triton":
                raise
            failure = str(error)
    if not times:
        raise MicrogliaError(f"No tile of the block kernel runs on {torch.cuda.get_device_name(device)}: {failure[:200]}")
    return _chosen.setdefault(problem, min(times, key=times.__getitem__))


def _milliseconds(call: Callable[[], object], calls: int = 8) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls
