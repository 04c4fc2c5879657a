"""Counts bytes: the size of the model's weights on disk, without masks, plain and compressed."""

from __future__ import annotations

import re
import zlib
from dataclasses import asdict, dataclass

import safetensors.torch
import torch
from torch import Tensor, nn

from microglia.core.errors import FileError
from microglia.core.layers import effective_state
from microglia.core.modes import reading
from microglia.core.running import first_line

_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Bytes:
    """Size of a model's weights on disk, in bytes, masks multiplied in: `microglia.save` writes masks too, as bits.

    Attributes:
        raw: Its safetensors file, header included; zeros take as much space as other values.
        zipped: The same file after zlib at level 6, where zeros save space.
    """

    raw: int
    zipped: int

    def to_dict(self) -> dict[str, int]:
        """Returns both numbers, JSON-ready."""
        return asdict(self)


def bytes_on_disk(model: nn.Module) -> Bytes:
    """Measures the safetensors file of a model, in memory; nothing is written and the model stays unchanged.

    It counts the parameters and persistent buffers with the masks multiplied in (`effective_state`), each shared tensor once.

    Example:
        >>> bytes_on_disk(torch.nn.Linear(64, 64)).raw > 4 * 64 * 65
        True

    Raises:
        FileError: The model has a tensor of a kind that safetensors cannot store.
    """
    try:
        with reading(model):
            serialised = memoryview(safetensors.torch.save(_unshared(model)))
    except Exception as error:
        raise FileError(f"{type(model).__name__} cannot be written as a safetensors file: {first_line(error)}") from error
    packer = zlib.compressobj(level=6)
    zipped = sum(len(packer.compress(serialised[at : at + _CHUNK])) for at in range(0, len(serialised), _CHUNK))
    return Bytes(raw=len(serialised), zipped=zipped + len(packer.flush()))


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """Returns the effective state without the second names of shared tensors, each tensor in memory of its own.

    If only one tensor of a tied pair is masked, the pair holds two different values and stays two tensors.
    """
    stored = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners = {re.sub(r"(^|\.)parametrizations\.([^.]+)\.original$", r"\1\2", name): id(t) for name, t in stored}
    kept: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in effective_state(model).items():
        earlier = first.setdefault(owners.get(name, id(tensor)), name)
        if earlier == name or not torch.equal(kept[earlier], tensor):
            kept[name] = tensor
    storages: set[int] = set()
    for name, tensor in kept.items():
        pointer = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone(memory_format=torch.contiguous_format) if pointer in storages else tensor.contiguous()
        storages.add(pointer)
    return kept
