"""The tables of a packed file: its layers and their bytes, and what they cost on EIE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from microglia.compress import Contents, Entry
from microglia.compress.engine_rows import Machine


def packed_table(contents: Contents, title: str) -> Table:
    """Returns the table of a packed file; plain tensors (biases, norms) are summed up in one row.

    Bits are those of a kept weight: of its code or value, and of its position.

    Args:
        contents: Contents of the file.
        title: Title of the table.
    """
    table = Table("layer", title=title)
    for column in ("shape", "as", "density", "code bits", "index bits", "values", "bytes", "%"):
        table.add_column(column, justify="right")
    plain = [entry for entry in contents.entries if entry.form in ("raw", "bits", "same")]
    for entry in contents.entries:
        if entry not in plain:
            table.add_row(*_row(entry), f"{entry.bytes:,}", _share(entry.bytes, contents))
    rest = sum(entry.bytes for entry in plain)
    table.add_row(f"{len(plain)} plain", "", "raw", "", "", "", "", f"{rest:,}", _share(rest, contents))
    table.add_row("names and plan", "", "", "", "", "", "", f"{contents.rest:,}", _share(contents.rest, contents))
    table.caption = f"{contents.bytes:,} bytes, {contents.ratio:.2f}x smaller than the same tensors without coding."
    return table


def _row(entry: Entry) -> tuple[str, ...]:
    kept = max(1, entry.kept)
    return (
        entry.name,
        "x".join(map(str, entry.shape)),
        entry.form,
        f"{entry.kept / max(1, entry.size):.3g}",
        f"{8 * entry.code_bytes / kept:.2f}",
        f"{8 * entry.index_bytes / kept:.2f}",
        (f"{len(entry.groups)} x " if entry.groups else "") + (str(entry.values) if entry.values else "-"),
    )


def _share(bytes_: int, contents: Contents) -> str:
    return f"{100 * bytes_ / contents.bytes:.1f}"


def engine_table(layers: Sequence[Mapping[str, Any]], machine: Machine, title: str) -> Table:
    """Returns the table of a packed file on EIE, from the result of `microglia.compress.engine_rows.engine_rows`."""
    table = Table("layer", title=title)
    for column in ("entries", "cycles", "ideal", "balance", "frames/s", "uJ", "dense, uJ"):
        table.add_column(column, justify="right")
    for row in layers:
        table.add_row(
            row["layer"],
            f"{row['entries']:,}",
            f"{row['cycles']:,}",
            f"{row['ideal']:,.0f}",
            f"{row['balance']:.2f}",
            f"{row['frames']:.3g}",
            f"{row['energy']:.3g}",
            f"{row['dense_energy']:.3g}",
        )
    table.caption = (
        f"{machine.elements} elements at {machine.clock:g} MHz, queues of {machine.depth}, {100 * machine.activations:g} % of "
        "the inputs not zero: a model of the hardware, not a measurement."
    )
    return table
