"""The table of docs/compression.md: real networks by Deep Compression, each seed beside its own dense network.

With --runs, the sweeps below that directory (recipes/deep_compression) are first exported to results/deep_compression, one file
for each sweep. The table is then made from the files there, without the runs.

    python benchmarks/deep_compression_table.py --runs runs/deep
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from microglia.methods import Packed
from microglia.report.cells import Entry, markdown_table, of_words
from microglia.report.records import Record, export
from microglia.report.rows import Group, Row, groups
from microglia.report.write import collect
from microglia.storage.files import write_atomic

BEGIN, END = "<!-- deep compression: begin -->", "<!-- deep compression: end -->"
ROOT = Path(__file__).parents[1]
PUBLISHED = {"lenet-300-100": "40x, 98.36 -> 98.42 %", "lenet-5": "39x, 99.20 -> 99.26 %"}
"""Model -> ratio, dense and final accuracy on MNIST (Han et al. 2016, table 1)."""
TITLES = ("network", "asked", "seeds", "dense", "pruned", "final", "change", "no worse", "bytes", "smaller", "published")
WORDS = ("network", "asked", "published")


def exported(runs: Path, results: Path) -> None:
    """Writes the finished runs of each directory below ``runs`` to one file in ``results``."""
    results.mkdir(parents=True, exist_ok=True)
    for sweep in sorted(path for path in runs.iterdir() if path.is_dir() and any(path.rglob("result.json"))):
        export(collect([sweep]), results / f"{sweep.name}.json")


def table(found: list[Group]) -> list[str]:
    """Returns the lines of the table, a row for each size of a network."""
    rows = [_entries(group, row) for group in found for row in group.rows if any(map(_packed, row.records))]
    return markdown_table(TITLES, rows, WORDS)


def _packed(record: Record) -> Packed | None:
    return record.observed(Packed)


def _entries(group: Group, row: Row) -> list[Entry]:
    records = sorted((r for r in row.records if _packed(r) is not None), key=lambda record: record.recipe["seed"])
    files = [one for record in records if (one := _packed(record)) is not None]
    dense = [group.scale * record.value(record.dense) for record in records]
    pruned = [group.scale * record.value(record.before) for record in records if record.before is not None]
    final = [group.scale * record.value(record.pruned) for record in records]
    change = fmean(after - before for before, after in zip(dense, final, strict=True))
    kept = sum(after >= before for before, after in zip(dense, final, strict=True))
    ratio = min(one.dense / one.bytes for one in files)
    model = records[0].recipe["model"]
    return [
        of_words(model),
        of_words(" ".join(filter(None, (row.asked, row.settings)))),
        Entry(", ".join(str(record.recipe["seed"]) for record in records), len(records)),
        *(Entry(", ".join(f"{value:.2f}" for value in values), fmean(values or [0.0])) for values in (dense, pruned, final)),
        Entry(f"{change:+.2f}", change),
        Entry(f"{kept} of {len(records)}", kept),
        Entry(", ".join(f"{one.bytes:,}" for one in files), fmean(one.bytes for one in files)),
        Entry(f"{ratio:.1f}x", ratio),
        of_words(PUBLISHED.get(model, "") if records[0].recipe["data"] == "mnist" else ""),
    ]


def main() -> None:
    """Exports runs if there are some, and writes the table between the marks of the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "deep_compression")
    parser.add_argument("--write", type=Path, default=ROOT / "docs" / "compression.md")
    given = parser.parse_args()
    if given.runs is not None:
        exported(given.runs, given.results)
    files = sorted(given.results.glob("*.json"))
    if not files:
        raise SystemExit(f"{given.results} holds no results: run the sweeps of recipes/deep_compression, and pass --runs.")
    lines = table(groups(collect(files)))
    print("\n".join(lines))
    before, begin, rest = given.write.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{given.write} has no marks {BEGIN} and {END}.")
    write_atomic(given.write, "\n".join([f"{before}{begin}", *lines, f"{end}{after}"]))


if __name__ == "__main__":
    main()
