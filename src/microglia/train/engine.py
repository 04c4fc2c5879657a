"""The engine: one Accelerate object per process, for placement and distribution."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from microglia.core.errors import MicrogliaError

if TYPE_CHECKING:
    from accelerate import Accelerator


@functools.cache
def accelerator(device: str = "cpu") -> Accelerator:
    """Returns the process's accelerator; under ``torchrun`` it joins the process group (gloo on CPU, NCCL on GPU).

    Args:
        device: ``cpu``, ``cuda`` or ``auto`` (a GPU if there is one).

    Raises:
        MicrogliaError: A GPU was requested and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MicrogliaError("device 'cuda' was asked for, but torch sees no GPU here; use device 'cpu' or 'auto'.")
    if device not in ("cpu", "cuda", "auto"):
        raise MicrogliaError(f"The device is cpu, cuda or auto; got {device!r}.")
    from accelerate import Accelerator  # takes half a second, which only a training needs

    return Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())


def rank_and_world() -> tuple[int, int]:
    """Returns (rank, number of ranks) of this process; (0, 1) without distribution."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
