"""Trained weights for the network of a task: a checkpoint of anybody, or a run of this library."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor, nn

from microglia.storage.start import read_start
from microglia.zoo.checkpoint import load_state, read_state

Read = Callable[[str | os.PathLike[str]], dict[str, Tensor]]


def load_start(network: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Loads trained weights into a freshly built network, in place.

    Args:
        network: The network, without masks.
        checkpoint: A file that `microglia.zoo.load_checkpoint` reads, or a run of this library: see `read_start`.

    Raises:
        CheckpointError: There is no such file, it holds no weights, or they do not fit.
    """
    load_state(network, start_of(checkpoint), checkpoint)


def start_of(checkpoint: str | os.PathLike[str], foreign: Read = read_state) -> dict[str, Tensor]:
    """Returns trained weights by name; ``foreign`` reads files that this library did not write."""
    own = read_start(checkpoint)
    return foreign(checkpoint) if own is None else own
