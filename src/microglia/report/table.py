"""Tables: the rows of a task as text, for the Markdown file and the page alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from statistics import fmean

from microglia.report.cells import (
    Entry,
    count_runs,
    drop_column,
    escaped,
    markdown_table,
    of_count,
    of_ratio,
    of_spread,
    of_words,
)
from microglia.report.read import Collected
from microglia.report.rows import Group, Row
from microglia.report.sections.at_init import paths_lines
from microglia.report.sections.dynamic import dynamic_lines

UNMEASURED = "not measured"
SETTINGS = (
    "checkpoint",
    "dense.epochs",
    "dense.max_batches",
    "train.epochs",
    "train.max_batches",
    "train.optimizer",
    "train.lr",
    "train.schedule",
    "train.batch_size",
    "train.weight_decay",
    "train.distill",
    "prune.exclude",
)
"""Recipe fields that a reader wants to know of all runs of a task."""
LEGEND = """\
- One row holds the *n* runs that differ in their seed alone: mean ± sample standard deviation over the seeds. Below three
  seeds the deviation says little. Of *dense*, n counts the models: a checkpoint is one, whatever the seed.
- *change*: against the dense model of the same run, in points. *compression*: all parameters over those left, biases,
  norms and layers left dense included.
- *theoretical speed-up*: multiply-accumulates of the dense model over those of the kept weights, or over those that gates
  compute on average. It is no time: beside it stands the measured one, the fastest execution of the dense model over the
  fastest of the pruned one, both timed interleaved in one process; over several seeds, the median of each.
- *bytes*: of the weights alone, masks multiplied in, as a safetensors file, and of that file after zlib. A saved run has
  its masks beside them."""


def table(group: Group) -> tuple[list[str], list[tuple[Row, list[Entry]]]]:
    """Returns the titles and the rows of a task's table, the dense models first."""
    unit, points = group.unit.strip(), " (points)" if group.unit else ""
    titled = f"{group.headline}, {unit}" if unit else group.headline
    titles = [
        "method",
        "pattern",
        "scope",
        "kept (asked)",
        "settings",
        "n",
        f"{titled}, before recovery",
        f"{titled}, after",
    ]
    titles += [f"change{points}", "compression", "theoretical speed-up", "dense, ms (execution)", "pruned, ms (execution)"]
    titles += ["measured speed-up", "bytes, raw", "bytes, zipped"]
    rows = [(row, _entries(row, group.scale)) for row in (*group.baselines, *group.rows)]
    if not any(row.settings for row, _ in rows):
        drop_column(titles, [entries for _, entries in rows], "settings")
    return titles, rows


def _entries(row: Row, scale: float) -> list[Entry]:
    words = [of_words(text) for text in (row.method, row.pattern, row.scope)]
    return [
        *words,
        Entry(row.asked, row.compression or 0.0),
        of_words(row.settings),
        Entry(str(row.after.n), row.after.n),
        of_spread(row.before, scale),
        of_spread(row.after, scale),
        of_spread(row.change, scale, signed=True),
        of_ratio(row.compression),
        of_ratio(row.theoretical),
        *_times(row),
        of_count(row.raw),
        of_count(row.zipped),
    ]


def _times(row: Row) -> list[Entry]:
    """Returns best dense time, best pruned time and their ratio, saying how many of the runs were timed."""
    dense, pruned, ratio = row.time("dense"), row.time("pruned"), row.speedup
    if dense is None or pruned is None or ratio is None:
        return [_time(None, ""), Entry("", 0.0), Entry("", 1.0)] if row.baseline else [_time(None, "")] * 3
    timed, runs = len(row.measured), len(row.records)
    note = "" if timed == runs or row.baseline else f", {timed} of {runs} runs"
    if row.machines > 1:
        low, high = min(m.speedup for m in row.measured), max(m.speedup for m in row.measured)
        several = Entry(f"{row.machines} machines{note}", 0.0)
        span = Entry(f"{low:.2f} to {high:.2f}x", ratio)
        return [several, Entry("", 0.0), Entry("", 1.0)] if row.baseline else [several, several, span]
    if row.baseline:
        return [_time(dense, note), Entry("", 0.0), Entry("1.00x", 1.0)]
    return [_time(dense, note), _time(pruned, note), of_ratio(ratio)]


def _time(best: tuple[str, float] | None, note: str) -> Entry:
    return Entry(UNMEASURED, 0.0) if best is None else Entry(f"{best[1]:.3f} ({best[0]}{note})", best[1])


def what_ran(group: Group) -> list[str]:
    """Returns sentences on what ran on what; nothing that the runs did not record."""
    records = group.records
    loaded = all(record.recipe.get("checkpoint") for record in records)
    common = group.common(*(key for key in SETTINGS if not (loaded and key.startswith("dense."))))
    sentences = [f"Recipe: {common}."] if common else []
    for environment, count in sorted(
        Counter(r.environment for r in records).items(), key=lambda item: (-item[1], str(item[0]))
    ):
        e = environment
        cores = f"{e.cores} cores, " if e.cores else ""
        gpu = f", {e.gpu}" if e.gpu else ""
        sentences.append(
            f"{count_runs(count)} on {e.processor}{gpu} ({cores}{e.threads} threads): torch {e.torch}, Python {e.python}, "
            f"microglia {e.microglia}, {e.platform}."
        )
    timed = [record.latency for record in records if record.latency is not None]
    kinds = sorted({name for latency in timed for model in latency.timings.values() for name in model})
    for batch, device, threads in sorted({(latency.batch, latency.device, latency.threads) for latency in timed}):
        sentences.append(f"Timed on {device}, {threads} threads, batch {batch}, best of: {', '.join(kinds)}.")
    notes = Counter(note for latency in timed for note in latency.notes)
    return [*sentences, *(f"{note} ({count_runs(count)})" for note, count in sorted(notes.items()))]


OTHER = {
    "layers": "density of each layer",
    "search": "masks and temperature over the search",
    "flops": "the metric against FLOPs reduction, dynamic and static",
    "collapse": "weights on a path, emptied layers and the least density against compression, of masks made before training",
    "gates": "kept and core filters of each layer",
}
"""What the pictures that are no ratio show."""


def freeze_lines(group: Group) -> list[str]:
    """Returns the table of what making the masks exact changed, empty where no method learned any."""
    rows = [(row, [r.search.freeze for r in row.records if r.search is not None and r.search.freeze]) for row in group.rows]
    rows = [(row, found) for row, found in rows if found and any(freeze.soft and freeze.softens for freeze in found)]
    if not rows:
        return []
    titles = ["method", "pattern", "kept (asked)", "units", "undecided", "mean |f - mask|", "soft", "exact"]
    lines = [
        f"The freeze, when soft masks become exact, means over the runs; {group.headline} on the validation split with the "
        f"soft and with the exact masks.{group.seen and f' {group.seen}'}",
        "",
        f"| {' | '.join(escaped(title) for title in titles)} |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, found in rows:
        soft, hard = (
            fmean(getattr(f, moment).get(group.headline, math.nan) * group.scale for f in found) for moment in ("soft", "hard")
        )
        cells = [row.method, row.pattern, row.asked, f"{found[0].units:,}", f"{fmean(f.undecided for f in found):,.1f}"]
        cells += [f"{fmean(f.mean for f in found):.2g}", f"{soft:.2f}{group.unit}", f"{hard:.2f}{group.unit}"]
        lines.append(f"| {' | '.join(escaped(text) for text in cells)} |")
    return [*lines, ""]


def markdown(found: Collected, tasks: Sequence[Group], figures: Iterable[PurePath]) -> str:
    """Returns ``results.md``: the same records, the same bytes.

    Args:
        found: What was read.
        tasks: The groups of its records.
        figures: Paths of the pictures relative to the file; those of a task begin with its slug.
    """
    pictures = sorted(figure for figure in figures if figure.suffix == ".png")
    lines = [
        "# Results",
        "",
        "Generated by `microglia report`; do not edit. The files it was made from are listed at the end.",
        "",
    ]
    lines += [LEGEND, ""]
    for group in tasks:
        lines += [f"## {escaped(group.title)}", "", *(f"- {escaped(sentence)}" for sentence in what_ran(group)), ""]
        lines += [*_table_lines(group), ""]
        for picture in pictures:
            if picture.name.rpartition("-")[0] == group.slug:
                kind = picture.stem.rpartition("-")[2]
                lines += [f"![{OTHER.get(kind, f'{group.headline} against {kind}')}]({picture.as_posix()})", ""]
        lines += [*freeze_lines(group), *dynamic_lines(group), *paths_lines(group)]
    if found.left_out:
        lines += ["## Left out", "", *(f"- {escaped(line)}" for line in found.left_out), ""]
    sources = Counter(record.source.partition("#")[0] for record in found.records)
    lines += ["## Made from", "", *(f"- `{name}` ({count_runs(count)})" for name, count in sorted(sources.items()))]
    return "\n".join(lines) + "\n"


def _table_lines(group: Group) -> list[str]:
    titles, rows = table(group)
    return markdown_table(titles, [entries for _, entries in rows], ("method", "pattern", "scope", "kept (asked)", "settings"))
