"""The table of docs/second_order/results.md: WoodFisher and oBERT beside magnitude on ResNet-20, seed by seed.

With --runs, the sweeps below that directory (recipes/second_order) are first exported to results/second_order, one file for
each sweep. The table is then made from the files there, without the runs.

    python benchmarks/second_order_table.py --runs runs/woodfisher
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev

from microglia.report.cells import Entry, markdown_table, of_words
from microglia.report.records import Record, export
from microglia.report.write import collect
from microglia.storage.files import write_atomic

BEGIN, END = "<!-- second order: begin -->", "<!-- second order: end -->"
ROOT = Path(__file__).parents[1]
METHODS = {"oneshot": "magnitude", "gradual": "magnitude", "woodfisher": "WoodFisher", "obert": "oBERT"}
"""Method of the recipes -> its name in the table."""
BASE, *OTHERS = dict.fromkeys(METHODS.values())
TITLES = ("schedule", "density", "seeds", *(f"{name}, %" for name in (BASE, *OTHERS)), *(f"{name} - {BASE}" for name in OTHERS))
ONE_SHOT = "one shot, no training"
NOTE = (
    "Test accuracy, mean and sample deviation of the seeds. Differences are paired by seed, with two standard errors: "
    "**bold** lies beyond."
)

Accuracies = Mapping[int, float]
"""Seed -> test accuracy in percent."""


def exported(runs: Path, results: Path) -> None:
    """Writes the finished runs of each sweep below ``runs`` to one file in ``results``."""
    results.mkdir(parents=True, exist_ok=True)
    for sweep in sorted(path for path in runs.iterdir() if any(path.rglob("result.json"))):
        export(collect([sweep]), results / f"{sweep.name}.json")


def table(records: list[Record]) -> list[str]:
    """Returns the lines of the table, a row for each schedule and density."""
    found: dict[tuple[str, float], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        schedule = "gradual" if record.recipe["train"]["epochs"] else ONE_SHOT
        row = found[schedule, record.recipe["prune"]["density"]]
        row[METHODS[record.recipe["method"]]][record.recipe["seed"]] = 100 * record.value(record.pruned)
    rows = [_entries(schedule, density, own) for (schedule, density), own in sorted(found.items(), key=_order)]
    return [NOTE, "", *markdown_table(TITLES, rows, ("schedule",))]


def _order(item: tuple[tuple[str, float], object]) -> tuple[bool, float]:
    (schedule, density), _ = item
    return schedule != ONE_SHOT, -density


def _entries(schedule: str, density: float, own: Mapping[str, Accuracies]) -> list[Entry]:
    seeds = sorted(set().union(*own.values()))
    return [
        of_words(schedule),
        Entry(f"{density:g}", density),
        Entry(", ".join(map(str, seeds)), len(seeds)),
        *(_spread(list(own.get(name, {}).values())) for name in (BASE, *OTHERS)),
        *(_difference(own.get(name, {}), own.get(BASE, {})) for name in OTHERS),
    ]


def _spread(values: list[float]) -> Entry:
    if not values:
        return of_words("not run")
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return Entry(f"{fmean(values):.2f}{deviation}", fmean(values))


def _difference(one: Accuracies, other: Accuracies) -> Entry:
    pairs = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
    if not pairs:
        return of_words("")
    if len(pairs) < 2:
        return Entry(f"{pairs[0]:+.2f} (one seed)", pairs[0])
    mean, twice = fmean(pairs), 2 * stdev(pairs) / math.sqrt(len(pairs))
    text = f"{mean:+.2f} ± {twice:.2f}"
    return Entry(f"**{text}**" if abs(mean) > twice else text, mean)


def main() -> None:
    """Exports runs if there are some, and writes the table between the marks of the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "second_order")
    parser.add_argument("--write", type=Path, default=ROOT / "docs" / "second_order" / "results.md")
    given = parser.parse_args()
    if given.runs is not None:
        exported(given.runs, given.results)
    files = sorted(given.results.glob("*.json"))
    if not files:
        raise SystemExit(f"{given.results} holds no results: run the sweeps of recipes/second_order, and pass --runs.")
    lines = table(collect(files))
    print("\n".join(lines))
    before, begin, rest = given.write.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{given.write} has no marks {BEGIN} and {END}.")
    write_atomic(given.write, "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{after}"]))


if __name__ == "__main__":
    main()
