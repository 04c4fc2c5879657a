"""The verbs `pack`, `unpack` and `inspect`: a model as one small file, and back bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.compress.codebook import Initial
from microglia.compress.container import Container, read_container, write_container
from microglia.compress.sharing import shared_values
from microglia.compress.tensors import DTYPES
from microglia.core.errors import FileError
from microglia.core.layers import prunable_layers
from microglia.core.masks import Masked
from microglia.core.parametrizations import steps_of
from microglia.storage.archive import described, rebuilt
from microglia.storage.files import write_atomic

ORIGINAL, MASK = ".original", ".0.mask"


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
        table_bytes: Bytes of the codebook.
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

    @property
    def rest(self) -> int:
        """Bytes of the header and the table."""
        return self.bytes - sum(entry.bytes for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents, JSON-ready."""
        rows = [{**asdict(entry), "shape": list(entry.shape), "bytes": entry.bytes} for entry in self.entries]
        return {"bytes": self.bytes, "dense": self.dense, "ratio": self.ratio, "rest": self.rest, "entries": rows}


def encode(
    model: nn.Module,
    *,
    bits: int | Mapping[str, int] | None = None,
    initial: Initial = "linear",
    exact: bool = False,
    seed: int = 0,
) -> bytes:
    """Returns the bytes of a packed file; arguments and errors as in `pack`."""
    model, plan, _ = described(model)
    if bits is not None:
        model = _shared(model, bits, initial, exact, seed)
    return write_container(plan, model.state_dict(), _masks(model))


def pack(
    model: nn.Module,
    path: str | Path,
    *,
    bits: int | Mapping[str, int] | None = None,
    initial: Initial = "linear",
    exact: bool = False,
    seed: int = 0,
) -> Contents:
    """Writes a model as one small file: kept weights only, shared values as codes, codes and positions entropy-coded.

    Without ``bits`` nothing is rounded. A weight is stored as codes if it has at most 255 different values, as after
    `microglia.methods.WeightSharing`; otherwise its kept values are stored as they are. Weights below a mask are not stored.
    Biases, norms and other vectors are stored as they are.

    Args:
        model: Any model that `microglia.save` takes.
        path: File to write; an earlier one is replaced atomically.
        bits: Round the weights to 2^bits - 1 shared values for each layer and zero, 1 to 8 bits; one number for all layers,
            or numbers by selector, such as ``{"type:Conv?d": 8, "*": 5}``, of which the first that matches counts. The given
            model stays unchanged.
        initial: Initial centroids: ``linear``, ``density`` or ``random``.
        exact: Whether to find the best shared values by dynamic programming.
        seed: Seed of ``random``.

    Returns:
        The contents of the file.

    Raises:
        FileError: The file cannot be written, or a pruner still searches in the model.
        MicrogliaError: The bits are out of range, or a selector matches no layer.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pack(nn.Linear(256, 256), f"{folder}/model.mgpack", bits=4).ratio > 7
        True
    """
    data = encode(model, bits=bits, initial=initial, exact=exact, seed=seed)
    write_atomic(Path(path), data)
    return contents_of(read_container(data, Path(path), limit=2**63))


def measured(model: nn.Module) -> Contents:
    """Returns the contents of a model's packed file without writing it; errors as in `pack`."""
    return contents_of(read_container(encode(model), Path("model"), limit=2**63))


def unpack(path: str | Path, model: nn.Module | None = None, *, trust: bool = False, limit: int | None = None) -> nn.Module:
    """Returns the model of a packed file, bit for bit as it was packed.

    Args:
        path: File that `pack` wrote.
        model: A freshly built model to load into; see `microglia.load`.
        trust: Whether the file may name any model to build; see `microglia.load`.
        limit: Maximum bytes of the decoded tensors. By default it is 256 MB, or a thousand times the file if that is more.

    Raises:
        FileError: The file is missing, damaged, truncated, foreign, newer than this library, or larger than the limit when
            decoded; or the model does not fit, or the file may not name it.
    """
    container = open_packed(path, limit=limit)
    return rebuilt(container.path, container.plan, container.state(), model, trust=trust)


def inspect(path: str | Path, *, limit: int | None = None) -> Contents:
    """Returns the contents of a packed file, from its table; the parts are checked, but not decoded.

    Args:
        path: File that `pack` wrote.
        limit: See `unpack`.

    Raises:
        FileError: See `unpack`.
    """
    container = open_packed(path, limit=limit)
    container.check()
    return contents_of(container)


def open_packed(path: str | Path, *, limit: int | None = None) -> Container:
    """Returns an open packed file, whose tensors are decoded one by one on request; arguments and errors as in `unpack`."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror}.") from error
    return read_container(data, path, limit=limit)


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
        entries.append(Entry(_plain(name), row["form"], row["dtype"], tuple(row["shape"]), kept, **_sizes(row)))
    return Contents(container.size, dense, tuple(entries))


def _sizes(row: Mapping[str, Any]) -> dict[str, int]:
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


def _masks(model: nn.Module) -> dict[str, str]:
    """Returns tensor -> mask, by their names in a model's state, for masks that are applied to the tensor itself."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList) or not parametrize.is_parametrized(module):
            continue
        for attribute in module.parametrizations:  # type: ignore[union-attr]
            if isinstance(steps_of(module, attribute)[0], Masked):
                prefix = f"{path}.parametrizations.{attribute}".removeprefix(".")
                found[prefix + ORIGINAL] = prefix + MASK
    return found


@torch.no_grad()
def _shared(model: nn.Module, bits: int | Mapping[str, int], initial: Initial, exact: bool, seed: int) -> nn.Module:
    """Returns a copy of a model with shared weights."""
    model = copy.deepcopy(model)
    layers = prunable_layers(model)
    for name, (codes, table) in shared_values(layers, bits, initial=initial, exact=exact, seed=seed).items():
        layers[name].raw.copy_(_read(table, codes))
    return model


def _read(table: Tensor, codes: Tensor) -> Tensor:
    return table[codes.long()]
