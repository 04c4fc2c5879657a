"""Ten thousand packed files changed at random, with right and wrong checks: one sentence, or a model as the file says."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.compress import encode
from microglia.compress.container import CHECK, PREFIX, read_container
from microglia.core.errors import FileError

HEAD = PREFIX.size + CHECK.size
NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    255,
    256,
    10**6,
    2**31,
    2**40,
    2**62,
    10**30,
    1.5,
    True,
    None,
    "x",
    [],
    {},
    [0],
    [2**20] * 3,
]
MEMORY = 16 * 2**20
"""Bytes that a small file may take for a moment: Python's own objects, tables of codes, and the limit below."""
LIMIT = 2**20


def grouped() -> Tensor:
    """A weight whose two groups of rows have codebooks of their own."""
    values = torch.tensor([[0.0, 1, 2, 3], [0.0, 5, 6, 7]])
    return values.gather(1, torch.randint(4, (2, 60))).reshape(4, 30)


def packed() -> bytes:
    """A file with every form in it, a few hundred entries: short streams, which are decoded in a moment."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(25, 30), nn.Linear(30, 2, bias=False), nn.Linear(2, 5), nn.Linear(2, 5), nn.BatchNorm1d(5))
    model[1].weight.data = torch.randint(-2, 3, (2, 30)).float()
    model[3].weight = model[2].weight
    mg.mask(model, {"0.weight": torch.rand(30, 25) > 0.5, "1.weight": torch.rand(2, 30) > 0.7})
    model.register_buffer("two", grouped())
    model.register_buffer("flags", torch.rand(11) > 0.5)
    return encode(model)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    _, _, stored, _, _ = PREFIX.unpack_from(data)
    return json.loads(zlib.decompress(data[HEAD : HEAD + stored])), data[HEAD + stored :]


def joined(table: Any, payload: bytes, *, declared: int | None = None) -> bytes:
    """A file whose checks are right, as an attacker writes it."""
    text = json.dumps(table).encode()
    stored = zlib.compress(text, 1)
    prefix = PREFIX.pack(b"\x89MGP\r\n\x1a\n", 1, len(stored), len(text) if declared is None else declared, len(payload))
    return prefix + CHECK.pack(zlib.crc32(stored, zlib.crc32(prefix))) + stored + payload


def read(data: bytes) -> dict[str, Tensor] | None:
    """The tensors of a file; None if it is refused."""
    try:
        return read_container(data, Path("file"), limit=LIMIT).state()
    except FileError:
        return None


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, splice, or a huge number in the header."""
    kind = draw.randrange(4)
    if kind == 0:
        return flipped(data, draw)
    if kind == 1:
        return data[: draw.randrange(len(data))]
    if kind == 2:
        first, second = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
        return data[:first] + data[second:] + data[first:second]
    place = draw.randrange(8, HEAD - 3)
    return data[:place] + struct.pack("<I", draw.choice((0, 1, 2**16, 2**31, 2**32 - 1))) + data[place + 4 :]


def forged(table: dict[str, Any], payload: bytes, draw: random.Random) -> bytes:
    """A change of the table or of the parts, under checks that are right again."""
    table = json.loads(json.dumps(table))
    rows = table["tensors"]
    row = draw.choice(rows)
    kind = draw.randrange(3)
    if kind == 0:
        row[draw.choice(sorted(row))] = draw.choice(NUMBERS)
    elif kind == 1 and isinstance(row.get("shape"), list):
        row["shape"] = [draw.choice(NUMBERS) for _ in range(draw.randrange(4))]
    else:
        payload = flipped(payload, draw)
        at = 0
        for one in rows:
            if "size" in one:
                one["crc"] = zlib.crc32(payload[at : at + one["size"]])
                at += one["size"]
    return joined(table, payload)


@pytest.fixture(scope="module")
def original() -> tuple[bytes, dict[str, Tensor]]:
    data = packed()
    state = read(data)
    assert state is not None
    return data, state


def test_the_original_has_every_form(original: tuple[bytes, dict[str, Tensor]]) -> None:
    table, payload = split(original[0])
    assert {row["form"] for row in table["tensors"]} == {"raw", "bits", "sparse", "shared", "same", "grouped"}
    again = read(joined(table, payload))
    assert again is not None
    assert all(torch.equal(again[name], tensor) for name, tensor in original[1].items())


def test_damage_is_found_or_does_no_harm(original: tuple[bytes, dict[str, Tensor]]) -> None:
    data, state = original
    draw, found = random.Random(0), 0
    for _ in range(7000):
        changed = mutated(data, draw)
        read_ = read(changed)
        found += read_ is None
        if read_ is not None:
            assert all(torch.equal(read_[name], tensor) for name, tensor in state.items()), "damage was not found"
    assert found > 6500


def test_a_forged_file_is_refused_or_holds_what_its_table_says(original: tuple[bytes, dict[str, Tensor]]) -> None:
    table, payload = split(original[0])
    draw, outcomes = random.Random(1), [0, 0]
    for _ in range(3000):
        state = read(forged(table, payload, draw))
        outcomes[state is None] += 1
        if state is not None:
            assert sum(t.numel() * t.element_size() for t in state.values()) <= 2 * LIMIT
    assert min(outcomes) > 300


def test_a_forged_file_takes_no_more_memory_than_the_limit(original: tuple[bytes, dict[str, Tensor]]) -> None:
    table, payload = split(original[0])
    draw = random.Random(2)
    files = [forged(table, payload, draw) for _ in range(300)]
    tracemalloc.start()  # it slows Python down, so that fewer files are read
    for data in files:
        read(data)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < MEMORY


@pytest.mark.parametrize("declared", [0, 1, 2**26, 2**32 - 1])
def test_a_table_of_another_size_is_refused(original: tuple[bytes, dict[str, Tensor]], declared: int) -> None:
    table, payload = split(original[0])
    assert read(joined(table, payload, declared=declared)) is None


def test_a_bomb_is_refused_before_it_unfolds(original: tuple[bytes, dict[str, Tensor]]) -> None:
    """A table of a hundred megabytes of spaces, and a tensor of zeros that needs a terabyte."""
    table, _ = split(original[0])
    stored = zlib.compress(b" " * 10**8, 9)
    prefix = PREFIX.pack(b"\x89MGP\r\n\x1a\n", 1, len(stored), 1000, 0)
    tracemalloc.start()
    assert read(prefix + CHECK.pack(zlib.crc32(stored, zlib.crc32(prefix))) + stored) is None
    table["tensors"] = [{"name": "w", "dtype": "float32", "shape": [2**19, 2**19], "form": "shared", "values": 0, "kept": 0,
                         "entries": 0, "gap": 1, "codes": 1, "size": 2, "crc": zlib.crc32(b"\0\0")}]  # fmt: skip
    assert read(joined(table, b"\0\0")) is None
    table["tensors"][0]["shape"] = [2**9, 2**9]
    assert read(joined(table, b"\0\0")) is not None  # the same form at a size that the limit allows
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < MEMORY


@pytest.mark.parametrize(
    "table", [[], {}, {"plan": {}, "tensors": 3}, {"plan": [], "tensors": []}, {"plan": {}, "tensors": [3]}]
)
def test_a_table_of_another_kind_is_refused(table: Any) -> None:
    assert read(joined(table, b"")) is None


def test_deep_nesting_is_refused() -> None:
    text = b"[" * 10**5
    stored = zlib.compress(text)
    prefix = PREFIX.pack(b"\x89MGP\r\n\x1a\n", 1, len(stored), len(text), 0)
    assert read(prefix + CHECK.pack(zlib.crc32(stored, zlib.crc32(prefix))) + stored) is None
