"""The packed file: one model, complete, without pickle; the form of Deep Compression (Han et al. 2016).

    magic       8 bytes, `MAGIC`
    version     4 bytes, this and all numbers here little-endian and unsigned
    table       4 + 4 bytes: its size as stored, and as JSON
    payload     8 bytes: its size
    check       4 bytes: CRC-32 of the 28 bytes before and of the stored table
    table       JSON under zlib: {"plan": as in plan.json, "tensors": rows}
    payload     the parts of the tensors (see `microglia.compress.tensors` and `grouped`), one after another

A row has the ``name`` of a tensor in the model's state, ``form``, ``dtype``, ``shape``, and ``size`` (bytes of its part). It
also has ``crc`` (CRC-32 of the part), the fields of its form, and ``mask``, the name of its mask, if there is one. The checks
detect damage, not manipulation.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microglia.compress.grouped import GROUPED, check_row, decode_tensor, encode_tensor
from microglia.compress.tensors import DTYPES
from microglia.core.errors import FileError
from microglia.storage.files import check_header, parse

MAGIC = b"\x89MGP\r\n\x1a\n"
VERSION = 2
"""Version of files with codebooks for groups of rows; others are of version 1."""
PREFIX = struct.Struct("<8sIIIQ")
CHECK = struct.Struct("<I")
LARGEST_TABLE = 2**26
"""Maximum bytes of the table as JSON."""
LEAST, TIMES = 2**28, 1000
"""Bytes of the decoded tensors that are always allowed, and the maximum ratio to the file for more."""


@dataclass(frozen=True)
class Container:
    """An open packed file; its tensors are decoded on request.

    Attributes:
        path: Name of the file, for errors.
        plan: Content of ``plan.json``.
        rows: Rows of its table, by name of the tensor.
        parts: Bytes of the coded tensors, by name.
        size: Bytes of the file.
    """

    path: Path
    plan: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    parts: Mapping[str, memoryview]
    size: int

    def decoded(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns a tensor, and which of its entries are kept, boolean of the same shape; all of a tensor without zeros.

        Raises:
            FileError: There is no such tensor, or its bytes are damaged.
        """
        if name not in self.rows:
            raise FileError(f"{self.path} holds no tensor {name!r}.")
        row = self.rows[name]
        if row["form"] == "same":
            return self.decoded(row["of"])
        self._check(name)
        try:
            return decode_tensor(row, self.parts[name])
        except ValueError as error:
            raise FileError(f"{self.path} is damaged: {name[:80]!r} cannot be read, because {error}.") from error

    def check(self) -> None:
        """Raises `FileError` if a part does not match its check; decodes nothing."""
        for name in self.parts:
            self._check(name)

    def _check(self, name: str) -> None:
        if zlib.crc32(self.parts[name]) != self.rows[name]["crc"]:
            raise FileError(f"{self.path} is damaged: {name[:80]!r} does not match its check.")

    def state(self) -> dict[str, Tensor]:
        """Returns all tensors of the model's state, masks too."""
        return dict(self._state())

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        read: dict[str, tuple[Tensor, Tensor]] = {}
        for name, row in self.rows.items():
            read[name] = read[row["of"]] if row["form"] == "same" else self.decoded(name)
            tensor, kept = read[name]
            yield name, tensor
            if "mask" in row:
                yield row["mask"], kept


def write_container(plan: Mapping[str, Any], state: Mapping[str, Tensor], masks: Mapping[str, str]) -> bytes:
    """Returns the bytes of a packed file; equal models give equal bytes (with the same zlib).

    Args:
        plan: Content of ``plan.json``.
        state: State of a model, masks too.
        masks: Name of a tensor -> name of the mask that is applied to it first.

    Raises:
        FileError: A tensor holds a kind of numbers that no file can hold.
    """
    rows, parts = [], []
    own: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if name in masks.values():
            continue
        mask = masks.get(name)
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), mask and state[mask].data_ptr())
        first = own.setdefault(memory, name) if tensor.numel() else name
        if first != name:
            rows.append({"name": name, "form": "same", "of": first, **({} if mask is None else {"mask": mask})})
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise FileError(f"A packed file holds no {dtype}, the kind of numbers in {name!r}: convert it first.")
        about, part = encode_tensor(tensor.detach().cpu(), None if mask is None else state[mask].detach().cpu())
        row = {"name": name, "dtype": dtype, "shape": list(tensor.shape), "size": len(part), "crc": zlib.crc32(part), **about}
        rows.append(row if mask is None else {**row, "mask": mask})
        parts.append(part)
    table = json.dumps({"plan": plan, "tensors": rows}, sort_keys=True, separators=(",", ":")).encode()
    stored, payload = zlib.compress(table, 9), b"".join(parts)
    version = VERSION if any(row["form"] == GROUPED for row in rows) else 1
    prefix = PREFIX.pack(MAGIC, version, len(stored), len(table), len(payload))
    return b"".join([prefix, CHECK.pack(zlib.crc32(stored, zlib.crc32(prefix))), stored, payload])


def read_container(data: bytes, path: Path, *, limit: int | None = None) -> Container:
    """Returns a packed file, checked: its table, its sizes, and the memory that its tensors take.

    Args:
        data: Bytes of the file.
        path: Name of the file, for errors.
        limit: Maximum bytes of all tensors together. By default it is 256 MB, or a thousand times the file if that is more.

    Raises:
        FileError: The file is foreign, damaged, truncated, newer than this library, or larger than the limit when decoded.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise FileError(f"{path} is not a packed model (microglia pack makes one).")
    head = PREFIX.size + CHECK.size
    if len(data) < head:
        raise FileError(f"{path} is damaged: it ends within its header.")
    _, version, stored_size, table_size, payload_size = PREFIX.unpack_from(data)
    if version > VERSION:
        raise FileError(f"{path} has version {version}, this library reads up to {VERSION}: upgrade microglia to read it.")
    if version < 1 or len(data) != head + stored_size + payload_size or table_size > LARGEST_TABLE:
        raise FileError(f"{path} is damaged: its size is not the one that its header declares.")
    view = memoryview(data)
    stored = view[head : head + stored_size]
    if CHECK.unpack_from(data, PREFIX.size)[0] != zlib.crc32(stored, zlib.crc32(view[: PREFIX.size])):
        raise FileError(f"{path} is damaged: its table does not match its check.")
    try:
        plan, rows = _table(stored, table_size)
        parts = _parts(rows, view[head + stored_size :])
        _check_memory(rows, max(LEAST, TIMES * len(data)) if limit is None else limit)
    except (ValueError, zlib.error) as error:
        raise FileError(f"{path} is damaged or too large: {error}.") from error
    check_header(path, plan, "model")
    return Container(path, plan, rows, parts, len(data))


def _table(stored: memoryview, size: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    reader = zlib.decompressobj()
    text = reader.decompress(stored, size) if size else b""
    if len(text) != size or not reader.eof or reader.unused_data:
        raise ValueError("its table does not have its declared size")
    table = parse(text.decode())
    if not isinstance(table, dict) or not isinstance(table.get("plan"), dict) or not isinstance(table.get("tensors"), list):
        raise ValueError("its table holds no plan and no tensors")
    rows: dict[str, dict[str, Any]] = {}
    names: set[str] = set()
    for row in table["tensors"]:
        check_row(row)
        own = {row["name"], row["mask"]} if "mask" in row else {row["name"]}
        if names & own or len(own) != 1 + ("mask" in row):
            raise ValueError(f"it holds two tensors of the name {row['name'][:80]!r}")
        if row["form"] == "same" and (row["of"] not in rows or rows[row["of"]]["form"] == "same"):
            raise ValueError(f"{row['name'][:80]!r} is the same as a tensor that is not there")
        names |= own
        rows[row["name"]] = row
    return table["plan"], rows


def _parts(rows: Mapping[str, Mapping[str, Any]], payload: memoryview) -> dict[str, memoryview]:
    coded = {name: row["size"] for name, row in rows.items() if row["form"] != "same"}
    if sum(coded.values()) != len(payload):
        raise ValueError("the sizes of its tensors do not add up to its payload")
    parts, at = {}, 0
    for name, size in coded.items():
        parts[name] = payload[at : at + size]
        at += size
    return parts


def _check_memory(rows: Mapping[str, Mapping[str, Any]], limit: int) -> None:
    """Raises `ValueError` if the tensors of a file take more memory than the limit."""
    needed = sum(math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize for row in rows.values() if row["form"] != "same")
    if needed > limit:
        raise ValueError(
            f"its tensors take {needed:,} bytes, above the limit of {limit:,}; pass limit= if you expect a model of that size"
        )


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Returns the bytes of tensors, without masks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values() if tensor.dtype != torch.bool)
