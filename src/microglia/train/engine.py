"""The engine: one Accelerate object per process, for placement and distribution; a single process works without Accelerate."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.core.optional import needs, present

if TYPE_CHECKING:
    from accelerate import Accelerator


class OneProcess:
    """The part of Accelerate that the loop uses, for one process without Accelerate: the same steps, the same bits.

    Args:
        device: Where the model is trained.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of a loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Clips the norm of all gradients together and returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Returns the model that steps call: the same one."""
        return model

    def free_memory(self) -> None:
        """Does nothing: there are no prepared models to release."""


@functools.cache
def accelerator(device: str = "cpu") -> Accelerator | OneProcess:
    """Returns the process's accelerator; under ``torchrun`` it joins the process group (gloo on CPU, NCCL on GPU).

    Args:
        device: ``cpu``, ``cuda`` or ``auto`` (a GPU if there is one).

    Raises:
        MicrogliaError: A GPU was requested and there is none.
        MissingLibraryError: Several processes train together, and Accelerate is not installed.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MicrogliaError("device 'cuda' was asked for, but torch sees no GPU here; use device 'cpu' or 'auto'.")
    if device not in ("cpu", "cuda", "auto"):
        raise MicrogliaError(f"The device is cpu, cuda or auto; got {device!r}.")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not present("accelerate") and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneProcess(torch.device("cpu" if on_cpu else "cuda"))
    needs("train", "accelerate", what="Training in several processes")
    from accelerate import Accelerator  # takes half a second, which only a training needs

    return Accelerator(cpu=on_cpu)


def rank_and_world() -> tuple[int, int]:
    """Returns (rank, number of ranks) of this process; (0, 1) without distribution."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
