"""Tensors whose groups of rows have codebooks of their own: the form ``grouped`` of a packed file.

A tensor is cut along its first dimension (output channels) into groups of equal size. Each group is stored in its own smallest
form (see `microglia.compress.tensors`), with codes and tables of its own. No setting says how many groups there are: the groups
are found again from the weights, as the largest number of groups no two of which share a value. So a file that is read and
written again has the same bytes.

    groups    rows of the groups: form, ``size``, and the fields of the form
    kept      entries that are stored in all of them
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microglia.compress import tensors
from microglia.compress.tensors import FEW, FLOATS, VALUES, Bits, Part, check_form

GROUPED = "grouped"
LARGEST = 64
"""Maximum number of groups."""
SEVERAL = 2
"""Minimum mean number of kept weights for each entry of the codebooks; with fewer, values are not shared."""
FIRST = 16 * FEW
"""Entries of the first two groups that are looked at first: values that they share tell that there are no groups."""
INNER = ("raw", "sparse", "shared")
"""Forms of a group."""


def encode_tensor(tensor: Tensor, mask: Tensor | None = None) -> Part:
    """Returns a tensor in its smallest form, as a whole or in groups; arguments as in `microglia.compress.tensors`."""
    whole = tensors.encode_tensor(tensor, mask)
    count = groups_in(tensor, mask)
    if count == 1:
        return whole
    parts = [tensors.encode_tensor(*pair) for pair in _cut(tensor, mask, count)]
    payload = b"".join(part for _, part in parts)
    if len(payload) >= len(whole[1]):
        return whole
    rows = [{**about, "size": len(part)} for about, part in parts]
    kept = sum(row.get("kept", tensor.numel() // count) for row in rows)
    return {"form": GROUPED, "groups": rows, "kept": kept}, payload


def stored_bytes(tensor: Tensor, mask: Tensor | None = None) -> int:
    """Returns the bytes of a floating-point tensor in its smallest form; see `microglia.compress.tensors.stored_bytes`."""
    whole = tensors.stored_bytes(tensor, mask)
    count = groups_in(tensor, mask)
    return whole if count == 1 else min(whole, sum(tensors.stored_bytes(*pair) for pair in _cut(tensor, mask, count)))


def groups_in(tensor: Tensor, mask: Tensor | None = None) -> int:
    """Returns the largest number of groups of rows no two of which share a value; 1 if there are none, or no codebooks.

    Args:
        tensor: A tensor on the CPU.
        mask: Its mask, if it has one.
    """
    if tensor.dtype not in FLOATS or tensor.ndim < 2 or not tensor.numel():
        return 1
    bits, kept = tensors.kept_bits(tensor, mask)
    kept = kept & (bits != 0)  # a kept zero may be in every group
    rows, found = tensor.shape[0], 1
    for count in range(2, min(rows, LARGEST) + 1):
        if rows % count == 0 and _apart(bits.reshape(count, -1), kept.reshape(count, -1)):
            found = count
    return found


def _apart(bits: Bits, kept: Bits) -> bool:
    """Tells whether the rows of an array have small codebooks, with room for a zero, no two of which share a value."""
    first, second = (np.unique(bits[row, :FIRST][kept[row, :FIRST]]) for row in range(2))
    if max(first.size, second.size) >= VALUES or np.intersect1d(first, second, assume_unique=True).size:
        return False
    books = [np.unique(bits[row][kept[row]]) for row in range(bits.shape[0])]
    total = sum(book.size for book in books)
    if not total or max(book.size for book in books) >= VALUES or SEVERAL * total > np.count_nonzero(kept):
        return False
    return bool(np.unique(np.concatenate(books)).size == total)


def _cut(tensor: Tensor, mask: Tensor | None, count: int) -> list[tuple[Tensor, Tensor | None]]:
    masks = [None] * count if mask is None else mask.contiguous().chunk(count)
    return list(zip(tensor.contiguous().chunk(count), masks, strict=True))


def decode_tensor(about: Mapping[str, Any], part: memoryview) -> tuple[Tensor, Tensor]:
    """Returns a tensor and which of its entries are kept; arguments and errors as in `microglia.compress.tensors`."""
    if about["form"] != GROUPED:
        return tensors.decode_tensor(about, part)
    shape, count = _shape(about), len(about["groups"])
    tensor = torch.empty(about["shape"], dtype=tensors.DTYPES[about["dtype"]])
    kept = torch.empty(about["shape"], dtype=torch.bool)
    at = 0
    places = zip(about["groups"], tensor.chunk(count), kept.chunk(count), strict=True)
    for row, values, places_kept in places:
        found = tensors.decode_tensor({**row, "dtype": about["dtype"], "shape": shape}, part[at : at + row["size"]])
        values.copy_(found[0])
        places_kept.copy_(found[1])
        at += row["size"]
    if int(kept.sum()) != about["kept"]:
        raise ValueError("its number of kept entries is another one")
    return tensor, kept


def _shape(about: Mapping[str, Any]) -> list[int]:
    """Returns the shape of one group."""
    return [about["shape"][0] // len(about["groups"]), *about["shape"][1:]]


def check_row(about: Any) -> None:
    """Raises `ValueError` unless a row of a file's table describes a tensor; see `microglia.compress.tensors.check_form`."""
    if not isinstance(about, Mapping) or about.get("form") != GROUPED:
        check_form(about)
        return
    check_form({**{key: value for key, value in about.items() if key != "mask"}, "form": "raw"})
    name, groups, shape = about["name"][:80], about.get("groups"), about["shape"]
    if not isinstance(about.get("mask", ""), str) or tensors.DTYPES[about["dtype"]] not in FLOATS or len(shape) < 2:
        raise ValueError(f"the form of {name!r} does not fit its mask or its kind of numbers")
    if not isinstance(groups, list) or not 2 <= len(groups) <= LARGEST or not shape[0] or shape[0] % len(groups):
        raise ValueError(f"the groups of {name!r} do not fit its shape")
    for row in groups:
        if not isinstance(row, Mapping) or row.get("form") not in INNER or "mask" in row:
            raise ValueError(f"a group of {name!r} has no form")
        check_form({**row, "name": name, "dtype": about["dtype"], "shape": _shape(about), "crc": 0})
    if sum(row["size"] for row in groups) != about["size"]:
        raise ValueError(f"the groups of {name!r} do not add up to its size")
    if type(about.get("kept")) is not int:
        raise ValueError(f"the kept of {name!r} is not a whole number in its range")
