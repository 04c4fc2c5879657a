"""The rows of `structured_table.py`: their files, and the document made of these."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from microglia.report.cells import Entry, markdown_table, of_spread, of_words
from microglia.report.spread import Spread

TITLES = (
    "method", "n", "before recovery, %", "after, %", "MACs, exact", "MACs, papers' count", "parameters", "ms", "epochs",
    "seconds",
)  # fmt: skip
PUBLISHED = (
    ("L1", "93.06", "90.90 M"), ("HRank", "93.52", "88.72 M"), ("HRank", "93.17", "62.72 M"), ("HRank", "90.72", "32.52 M"),
    ("GAL", "92.98", "78.3 M"), ("GAL", "90.36", "49.99 M"), ("He et al.", "90.80", "62.0 M"), ("NISP", "93.01", "81.0 M"),
    ("polarization", "93.83", "-47 %"), ("FPGM", "93.49", "-53 %"), ("SFP", "93.35", "-51 %"), ("slimming", "93.27", "-48 %"),
    ("DCP", "about 93.5", "-50 %"), ("group norm", "93.77", "-53 %"),
)  # fmt: skip
"""Method, accuracy and multiply-accumulates of ResNet-56 on CIFAR-10, as the papers print them."""
REACH = (
    "The dense network has 125.49 M multiply-accumulates by both counts. The published rows take 100 to 400 epochs, HRank 30 "
    "for each of 55 layers. A few epochs compare methods at one short budget, and can come near the rows of L1, NISP and HRank "
    "at about 90 M. They do not reach the rows at half of the operations: these wait for a GPU and --epochs of their length."
)


@dataclass(frozen=True)
class Row:
    """One method on one seed.

    Attributes:
        name: Name of the row.
        seed: Seed of the run.
        before: Accuracy after the cut, without recovery; None if the method has no such moment.
        after: Accuracy in the end.
        macs: Multiply-accumulates, exact.
        published: The same by the papers' count.
        parameters: All parameters.
        ms: Median milliseconds of the fastest execution of one image; None if it was not timed.
        epochs: Epochs of all trainings after the dense network.
        seconds: Duration of the run.
        refused: Sentence of a method that does not take the network; the numbers are 0 then.
    """

    name: str
    seed: int = 0
    before: float | None = None
    after: float = 0.0
    macs: int = 0
    published: int = 0
    parameters: int = 0
    ms: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    refused: str = ""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context that one process at a time is in; a killed process leaves it."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read(file: Path) -> tuple[dict[str, Any], list[Row]]:
    """Returns the setting and the rows of a file."""
    found = json.loads(file.read_text())
    return found["setting"], [Row(**row) for row in found["rows"]]


def tables_in(results: Path) -> list[tuple[dict[str, Any], list[Row]]]:
    """Returns the tables of a directory, larger networks first, the claims of other files aside."""
    found = [read(file) for file in sorted(results.glob("*.json")) if "setting" in json.loads(file.read_text())]
    return sorted(found, key=lambda table: (-int("".join(filter(str.isdigit, table[0]["model"])) or 0), -table[0]["flops"]))


def claims_in(results: Path) -> list[dict[str, Any]]:
    """Returns what `hrank_claims.py` measured."""
    found = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    return [one for one in found if "verdicts" in one]


def document(tables: Sequence[tuple[Mapping[str, Any], Sequence[Row]]], claims: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns the document of all rows so far.

    Args:
        tables: Setting and rows of each table.
        claims: Results of `hrank_claims.py`.
    """
    lines = [
        "# Removing channels: every method on one bench",
        "",
        "All rows of a table start from the same weights and keep the same fraction of the multiply-accumulates. All recover "
        "with the same settings, in the same order of the data. A method that trains before its cut has as many epochs for it; "
        "one that removes channels while it trains has the recovery alone. The exact count is that of the "
        "smaller model; the papers' count leaves out that layers read fewer channels. The milliseconds are the fastest "
        "execution of one image. Written by `benchmarks/structured_table.py`.",
        "",
    ]
    for setting, rows in tables:
        lines += _table(setting, rows)
    for one in claims:
        lines += [f"## HRank's claims on {one['asked']['model']} and {one['asked']['data']}", ""]
        lines += [*(f"- {sentence}." for sentence in one["verdicts"]), ""]
    if any(setting["model"] == "resnet56" for setting, _ in tables):
        published = [list(map(of_words, row)) for row in PUBLISHED]
        titles = ("method", "accuracy, %", "MACs, papers' count")
        lines += ["## ResNet-56 as published", "", REACH, "", *markdown_table(titles, published, titles[:1]), ""]
    return "\n".join(lines)


def _table(setting: Mapping[str, Any], found: Sequence[Row]) -> list[str]:
    by_name: dict[str, list[Row]] = {}
    for row in found:
        by_name.setdefault(row.name, []).append(row)
    kept = [rows for rows in by_name.values() if not rows[0].refused]
    kept.sort(key=lambda rows: -sum(row.after for row in rows) / len(rows))
    lines = [
        f"## {setting['model']} on {setting['data']}, {100 * setting['flops']:g} % of the multiply-accumulates",
        "",
        f"{setting['epochs']} epochs of recovery at a learning rate of {setting['lr']:g}. "
        f"Trainings are in {setting['precision']}, measurements in float32.",
        "",
    ]
    if setting["limit"] is not None:
        lines += [
            f"**A trial of {setting['limit']} batches in each epoch shows that the bench works; the numbers mean nothing.**",
            "",
        ]
    lines += [*markdown_table(TITLES, map(_entries, kept), TITLES[:1]), ""]
    refused = [rows[0] for rows in by_name.values() if rows[0].refused]
    return lines + [f"- `{row.name}`: {row.refused}" for row in refused] + ([""] if refused else [])


def _entries(rows: Sequence[Row]) -> list[Entry]:
    before = [row.before for row in rows if row.before is not None]
    times = [row.ms for row in rows if row.ms is not None]
    mean = {
        name: sum(getattr(row, name) for row in rows) / len(rows) for name in ("macs", "published", "parameters", "seconds")
    }
    return [
        of_words(rows[0].name),
        Entry(str(len(rows)), len(rows)),
        of_spread(Spread.of(before) if before else None, 100),
        of_spread(Spread.of(row.after for row in rows), 100),
        *(Entry(f"{mean[name] / 1e6:.2f} M", mean[name]) for name in ("macs", "published")),
        Entry(f"{mean['parameters'] / 1e6:.3f} M", mean["parameters"]),
        Entry(f"{median(times):.2f}" if times else "", median(times) if times else 0.0),
        Entry(str(rows[0].epochs), rows[0].epochs),
        Entry(f"{mean['seconds']:,.0f}", mean["seconds"]),
    ]
