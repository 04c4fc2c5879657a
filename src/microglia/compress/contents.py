"""The contents of a packed file: its tensors, their bytes by part, and the bytes after each step of Deep Compression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from microglia.compress.container import Container
from microglia.compress.grouped import GROUPED
from microglia.compress.tensors import DTYPES

ORIGINAL = ".original"
"""End of the name of a tensor below a mask."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a packed file.

    Attributes:
        name: Name of the tensor in a model without masks.
        form: Form, see `microglia.compress.tensors`.
        dtype: Kind of its numbers.
        shape: Its shape.
        kept: Entries that are stored.
        symbols: Codes that are stored, fillers included; 0 if it is not shared.
        values: Entries of its codebook, the zero included; 0 if it is not shared.
        gap_bits: Bits of a gap before the entropy coding; 0 where every entry has a code.
        code_bytes: Bytes of the codes or the plain values.
        index_bytes: Bytes of the gaps or the bitmap.
        table_bytes: Bytes of the codebooks.
        groups: Its groups of rows, if they have codebooks of their own; the numbers above are their sums (of ``values`` and
            ``gap_bits`` the largest ones).
    """

    name: str
    form: str
    dtype: str
    shape: tuple[int, ...]
    kept: int
    symbols: int = 0
    values: int = 0
    gap_bits: int = 0
    code_bytes: int = 0
    index_bytes: int = 0
    table_bytes: int = 0
    groups: tuple[Entry, ...] = ()

    @property
    def size(self) -> int:
        """Number of entries of the tensor."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file, without the row of the table."""
        return self.code_bytes + self.index_bytes + self.table_bytes


@dataclass(frozen=True)
class Contents:
    """The contents of a packed file.

    Attributes:
        bytes: Bytes of the file.
        dense: Bytes of the same tensors without any coding; masks are not counted.
        entries: Its tensors.
    """

    bytes: int
    dense: int
    entries: tuple[Entry, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the tensors without coding."""
        return self.dense / self.bytes

    def steps(self) -> dict[str, int]:
        """Returns the bytes of the model after each step of Deep Compression; its names and plan are in none but the last.

        ``pruned``: kept weights as they are, and positions of a fixed number of bits (a bitmap where every entry has a code).
        ``shared``: codes of a fixed number of bits instead, and codebooks. ``coded``: the file, all of it entropy-coded.
        """
        pruned = shared = 0
        for entry in (part for whole in self.entries for part in whole.groups or (whole,)):
            if entry.form != "shared":
                pruned, shared = pruned + entry.bytes, shared + entry.bytes
                continue
            index = entry.symbols * entry.gap_bits or entry.size
            value = 8 * DTYPES[entry.dtype].itemsize
            codes = (entry.symbols if entry.gap_bits else entry.kept) * (entry.values - 1).bit_length()
            pruned += -(-(entry.kept * value + index) // 8)
            shared += -(-(codes + index) // 8) + entry.table_bytes
        return {"dense": self.dense, "pruned": pruned, "shared": shared, "coded": self.bytes}

    @property
    def rest(self) -> int:
        """Bytes of the header and the table."""
        return self.bytes - sum(entry.bytes for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents, JSON-ready."""
        rows = [
            {**asdict(entry), "shape": list(entry.shape), "bytes": entry.bytes, "groups": max(1, len(entry.groups))}
            for entry in self.entries
        ]
        return {"bytes": self.bytes, "dense": self.dense, "ratio": self.ratio, "rest": self.rest, "entries": rows}


def contents_of(container: Container) -> Contents:
    """Returns the contents of an open packed file, from its table."""
    entries, dense = [], 0
    for name, row in container.rows.items():
        if row["form"] == "same":
            of = container.rows[row["of"]]
            entries.append(Entry(_plain(name), "same", of["dtype"], tuple(of["shape"]), kept=0))
            continue
        size = math.prod(row["shape"])
        kept = row.get("kept", size)
        if row["form"] != "bits":
            dense += size * DTYPES[row["dtype"]].itemsize
        about = _plain(name), row["form"], row["dtype"], tuple(row["shape"]), kept
        entries.append(Entry(*about, **_sizes(row)) if row["form"] != GROUPED else _grouped(Entry(*about), row))
    return Contents(container.size, dense, tuple(entries))


def _grouped(entry: Entry, row: Mapping[str, Any]) -> Entry:
    """Returns the entry of a tensor in groups, with the sums of these."""
    shape = (entry.shape[0] // len(row["groups"]), *entry.shape[1:])
    groups = tuple(
        Entry(
            entry.name,
            one["form"],
            entry.dtype,
            shape,
            one.get("kept", math.prod(shape)),
            **_sizes({**one, "dtype": entry.dtype}),
        )
        for one in row["groups"]
    )
    sums = {key: sum(getattr(one, key) for one in groups) for key in ("symbols", "code_bytes", "index_bytes", "table_bytes")}
    most = {key: max(getattr(one, key) for one in groups) for key in ("values", "gap_bits")}
    return replace(entry, groups=groups, **sums, **most)


def _sizes(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the numbers of a row by part."""
    if row["form"] == "sparse":
        return {"index_bytes": row["index"], "code_bytes": row["size"] - row["index"]}
    if row["form"] != "shared":
        return {"code_bytes": row["size"]}
    table = row["values"] * DTYPES[row["dtype"]].itemsize
    return {
        "symbols": row["entries"],
        "values": row["values"] + 1,
        "gap_bits": row["gap"],
        "table_bytes": table,
        "code_bytes": row["codes"],
        "index_bytes": row["size"] - table - row["codes"],
    }


def _plain(name: str) -> str:
    return name.replace("parametrizations.", "", 1).removesuffix(ORIGINAL) if name.endswith(ORIGINAL) else name
