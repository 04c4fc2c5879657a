"""The table of a packed file: layers, density, bits of each part, codebook, share of the file."""

from __future__ import annotations

from rich.table import Table

from microglia.compress import Contents, Entry


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
        str(entry.values) if entry.values else "-",
    )


def _share(bytes_: int, contents: Contents) -> str:
    return f"{100 * bytes_ / contents.bytes:.1f}"
