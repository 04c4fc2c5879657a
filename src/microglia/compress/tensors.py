"""Tensors in a packed file: each in the smallest of a few exact forms.

    raw      its bytes
    bits     a boolean tensor, eight entries in a byte
    sparse   which entries are kept, as Huffman-coded bytes of a bitmap, and the values of these
    shared   a codebook, Huffman-coded codes, and Huffman-coded gaps between the kept entries (or a code for every entry)
    same     another name of an earlier tensor

Entries are in C order, numbers little-endian, values exact to the bit. Entries that are not kept are +0. Where a tensor has a
mask, the mask tells which entries are kept, and is part of the form. A kept zero is then a value like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microglia.compress import entropy
from microglia.compress.relative_index import BITS, decode_gaps, encode_gaps, gap_counts

Form = Literal["raw", "bits", "sparse", "shared", "same"]
FORMS = get_args(Form)
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
"""Kinds of numbers by their name in a file."""
FLOATS = {torch.float64: (np.uint64, torch.int64), torch.float32: (np.uint32, torch.int32),
          torch.float16: (np.uint16, torch.int16), torch.bfloat16: (np.uint16, torch.int16)}  # fmt: skip
"""Kinds of numbers that can be coded, each with the integers (NumPy's and torch's) that hold its bits."""
VALUES = 255
"""Maximum number of entries of a codebook, without its zero."""
FEW = 4096
"""Number of entries that are looked at first: with more than `VALUES` values, a tensor is not shared."""
Bits = npt.NDArray[Any]
Part = tuple[dict[str, Any], bytes]
"""The form of a tensor, JSON-ready, and its bytes."""


def encode_tensor(tensor: Tensor, mask: Tensor | None = None) -> Part:
    """Returns a tensor, and its mask if it has one, in its smallest form.

    Args:
        tensor: A tensor on the CPU; entries outside the mask are not stored.
        mask: Boolean, of the same shape; only for floating-point tensors.
    """
    if tensor.dtype == torch.bool:
        return {"form": "bits"}, np.packbits(tensor.reshape(-1).numpy()).tobytes()
    if tensor.dtype not in FLOATS or (mask is None and tensor.ndim < 2):
        return {"form": "raw"}, _raw(tensor)
    bits, kept = kept_bits(tensor, mask)
    sizes, book, gap = _forms(bits, kept, mask is None)
    form = min(sizes, key=lambda name: (sizes[name], FORMS.index(name)))
    if form == "raw":
        return {"form": "raw"}, _raw(tensor)
    if form == "sparse":
        coded, values = entropy.encode(np.packbits(kept), 256), bits[kept]
        return {"form": "sparse", "index": len(coded), "kept": values.size}, coded + values.tobytes()
    return _shared(bits[kept], cast(Bits, book), kept, gap)


def stored_bytes(tensor: Tensor, mask: Tensor | None = None) -> int:
    """Returns the bytes of a floating-point matrix in its smallest form, to within the padding; it codes nothing.

    Args:
        tensor: As in `encode_tensor`.
        mask: As in `encode_tensor`.
    """
    bits, kept = kept_bits(tensor, mask)
    return min(_forms(bits, kept, mask is None)[0].values())


def kept_bits(tensor: Tensor, mask: Tensor | None) -> tuple[Bits, npt.NDArray[np.bool_]]:
    """Returns the bits of all entries, as unsigned integers, and which of them are stored."""
    unsigned, signed = FLOATS[tensor.dtype]
    bits: Bits = tensor.contiguous().reshape(-1).view(signed).numpy().view(unsigned)
    return bits, (bits != 0) if mask is None else mask.contiguous().reshape(-1).numpy()


def _forms(bits: Bits, kept: npt.NDArray[np.bool_], raw: bool) -> tuple[dict[Form, int], Bits | None, int]:
    """Returns the bytes of each form that a tensor can have, its codebook if it has one, and the bits of its gaps."""
    values = bits[kept]
    index = entropy.stored_size(np.bincount(np.packbits(kept), minlength=256))
    sizes: dict[Form, int] = {"sparse": index + values.nbytes}
    if raw:
        sizes["raw"] = bits.nbytes
    book, gap = _book(values), 0
    if book is not None:
        gap, sizes["shared"] = _cheapest(values, book, np.flatnonzero(kept), bits.size)
    return sizes, book, gap


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _book(values: Bits) -> Bits | None:
    """Returns the different values, ascending as unsigned integers, or None if they are too many."""
    if np.unique(values[:FEW]).size > VALUES:
        return None
    book: Bits = np.unique(values)
    return book if book.size <= VALUES else None


def _cheapest(values: Bits, book: Bits, positions: npt.NDArray[np.int64], size: int) -> tuple[int, int]:
    """Returns the bits of a gap code, 0 for a code of every entry, and the bytes of the form."""
    counts = np.bincount(np.searchsorted(book, values) + 1, minlength=book.size + 1)
    counts[0] = size - values.size
    found = {0: entropy.stored_size(counts)}
    for gap in range(BITS[0], BITS[1] + 1):
        gaps = gap_counts(positions, gap)
        counts[0] = gaps.sum() - values.size
        found[gap] = entropy.stored_size(counts) + entropy.stored_size(gaps)
    best = min(found, key=lambda gap: (found[gap], gap))
    return best, found[best] + book.nbytes


def _shared(values: Bits, book: Bits, kept: npt.NDArray[np.bool_], gap: int) -> Part:
    codes = (np.searchsorted(book, values) + 1).astype(np.uint8)
    index = b""
    if gap:
        gaps, entries = encode_gaps(np.flatnonzero(kept), gap)
        symbols = np.zeros(gaps.size, dtype=np.uint8)
        symbols[entries] = codes
        index = entropy.encode(gaps, 1 << gap)
    else:
        symbols = np.zeros(kept.size, dtype=np.uint8)
        symbols[kept] = codes
    coded = entropy.encode(symbols, book.size + 1)
    about = {
        "form": "shared",
        "values": book.size,
        "kept": values.size,
        "entries": symbols.size,
        "gap": gap,
        "codes": len(coded),
    }
    return about, book.tobytes() + coded + index


def decode_tensor(about: Mapping[str, Any], part: memoryview) -> tuple[Tensor, Tensor]:
    """Returns a tensor and which of its entries are kept, boolean of the same shape.

    Args:
        about: Form, ``dtype`` and ``shape``, as `check_form` accepts them.
        part: Its bytes.

    Raises:
        ValueError: The bytes do not fit the form.
    """
    dtype, shape, form = DTYPES[about["dtype"]], about["shape"], about["form"]
    size = math.prod(shape)
    if form == "bits":
        return _bits(part, size, shape)
    if form == "raw":
        if len(part) != size * dtype.itemsize:
            raise ValueError("its bytes do not fit its shape")
        raw = torch.frombuffer(bytearray(part), dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return raw.reshape(shape), torch.ones(shape, dtype=torch.bool)
    unsigned, signed = FLOATS[dtype]
    read = _read_sparse if form == "sparse" else _read_shared
    bits, kept = read(about, part, size, np.dtype(unsigned).newbyteorder("<"))
    native = torch.from_numpy(bits.astype(unsigned, copy=False).view(np.dtype(str(signed).removeprefix("torch."))))
    return native.view(dtype).reshape(shape), torch.from_numpy(kept).reshape(shape)


def _bits(part: memoryview, size: int, shape: list[int]) -> tuple[Tensor, Tensor]:
    packed = np.frombuffer(part, dtype=np.uint8)
    if packed.size != -(-size // 8):
        raise ValueError("its bits do not fit its shape")
    flat = np.unpackbits(packed)
    if flat[size:].any():
        raise ValueError("its bits go on behind its last entry")
    found = torch.from_numpy(flat[:size].astype(np.bool_)).reshape(shape)
    return found, torch.ones_like(found)


def _read_sparse(about: Mapping[str, Any], part: memoryview, size: int, kind: np.dtype[Any]) -> tuple[Bits, Bits]:
    bitmap = np.unpackbits(entropy.decode(part[: about["index"]], -(-size // 8), 256))
    values = part[about["index"] :]
    kept = bitmap[:size].astype(np.bool_)
    if bitmap[size:].any() or int(kept.sum()) != about["kept"] or len(values) != about["kept"] * kind.itemsize:
        raise ValueError("its values do not fit its bitmap")
    bits = np.zeros(size, dtype=kind)
    bits[kept] = np.frombuffer(values, dtype=kind)
    return bits, kept


def _read_shared(about: Mapping[str, Any], part: memoryview, size: int, kind: np.dtype[Any]) -> tuple[Bits, Bits]:
    end = about["values"] * kind.itemsize
    if len(part) < end + about["codes"]:
        raise ValueError("its codes are cut off")
    table = np.concatenate([np.zeros(1, dtype=kind), np.frombuffer(part[:end], dtype=kind)])
    codes = entropy.decode(part[end : end + about["codes"]], about["entries"], about["values"] + 1)
    rest = part[end + about["codes"] :]
    if np.count_nonzero(codes) != about["kept"]:
        raise ValueError("its number of kept entries is another one")
    if not about["gap"]:
        if len(rest) or codes.size != size:
            raise ValueError("its codes do not fit its shape")
        return table[codes], codes != 0
    positions = decode_gaps(entropy.decode(rest, about["entries"], 1 << about["gap"]))
    if positions.size and positions[-1] >= size:
        raise ValueError("its gaps lead behind its last entry")
    bits, kept = np.zeros(size, dtype=kind), np.zeros(size, dtype=np.bool_)
    bits[positions], kept[positions] = table[codes], codes != 0
    return bits, kept


def check_form(about: Any) -> None:
    """Raises `ValueError` unless a row of a file's table describes a tensor; its counts fit its shape."""
    if not isinstance(about, Mapping) or not isinstance(about.get("name"), str) or about.get("form") not in FORMS:
        raise ValueError("a row of its table describes no tensor")
    name, form = about["name"][:80], about["form"]
    if "mask" in about and (form not in ("sparse", "shared", "same") or not isinstance(about["mask"], str)):
        raise ValueError(f"the mask of {name!r} has no name")
    if form == "same":
        if not isinstance(about.get("of"), str):
            raise ValueError(f"{name!r} does not say which tensor it is")
        return
    shape, dtype = about.get("shape"), DTYPES.get(str(about.get("dtype")))
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape) or len(shape) > 64:
        raise ValueError(f"the shape of {name!r} is no list of sizes")
    size = math.prod(shape)
    coded = form in ("sparse", "shared")
    if dtype is None or (form == "bits") != (dtype == torch.bool) or (coded and dtype not in FLOATS):
        raise ValueError(f"the form of {name!r} does not fit its kind of numbers")
    limits = {"size": 2**48, "crc": 2**32 - 1}
    if form == "shared":
        limits |= {"values": VALUES, "kept": size, "entries": size, "gap": BITS[1], "codes": 2**48}
    elif form == "sparse":
        limits |= {"kept": size, "index": 2**48}
    for key, most in limits.items():
        if type(about.get(key)) is not int or not 0 <= about[key] <= most:
            raise ValueError(f"the {key} of {name!r} is not a whole number in its range")
