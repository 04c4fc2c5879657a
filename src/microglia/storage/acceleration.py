"""The kernels of an accelerated model in a file of their own, beside its weights; older versions ignore it."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from microglia.core.errors import FileError, MicrogliaError
from microglia.runtime.accelerated import Accelerated
from microglia.runtime.record import Record, read_record
from microglia.runtime.reload import KERNELS, Kernels, reaccelerated
from microglia.storage.files import VERSION, check_header, explained, write_atomic
from microglia.storage.run import read_json

ACCELERATION = "acceleration.json"


def remove_kernels(directory: Path) -> None:
    """Removes the record of an earlier model, before other weights are written: at no moment does it stand beside these."""
    with explained(directory / ACCELERATION):
        (directory / ACCELERATION).unlink(missing_ok=True)


def write_kernels(directory: Path, model: nn.Module, weights: str) -> None:
    """Writes the record of an accelerated model's kernels; of another model nothing.

    Args:
        directory: Where the weights of its dense model were written.
        model: Any model. A warning says why where no file can hold the record of an accelerated one.
        weights: Digest of the file of the weights.
    """
    record = model.record() if isinstance(model, Accelerated) else None
    if isinstance(record, str):
        warnings.warn(f"The model is saved without its kernels, so accelerate it again after loading: {record}.", stacklevel=3)
    if isinstance(record, Record):
        content = record.to_dict()
        head = {"format": "microglia.acceleration", "version": VERSION, "weights": weights, "digest": _digest(content)}
        write_atomic(directory / ACCELERATION, json.dumps({**head, "record": content}) + "\n")


def with_kernels(directory: Path, model: nn.Module, weights: str, kernels: Kernels) -> nn.Module:
    """Returns a loaded model accelerated as the record beside its weights says; the model itself without a record.

    Args:
        directory: Where the model was read.
        model: The loaded model.
        weights: Digest of the file of the weights.
        kernels: See `microglia.runtime.reload.Kernels`.

    Raises:
        FileError: The record is damaged, foreign, newer than this library, of other weights, or does not fit the model.
    """
    path = directory / ACCELERATION
    if kernels not in KERNELS:
        raise FileError(f"The kernels of a loaded model are {', '.join(KERNELS)}; got {kernels!r}.")
    if kernels == "none" or not path.is_file():
        return model
    header = read_json(path)
    check_header(path, header, "acceleration")
    try:
        if header.get("digest") != _digest(header.get("record")):
            raise MicrogliaError("Its content does not match its digest.")
        if header.get("weights") != weights:
            raise MicrogliaError("It is of other weights.")
        return reaccelerated(model, read_record(json.dumps(header["record"])), kernels)
    except MicrogliaError as error:
        raise FileError(f'{path} is refused; load(..., kernels="none") reads the model without it. {error}') from error


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
