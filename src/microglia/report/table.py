"""Tables: the rows of a task as text, for the Markdown file and the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from microglia.report.cells import (
    Entry,
    count_runs,
    escaped,
    of_count,
    of_ratio,
    of_spread,
    of_words,
)
from microglia.report.read import Collected
from microglia.report.rows import Group, Row, speedup_of
from microglia.report.section import Table, pictures_of, tables_of
from microglia.storage.run import flatten

WORDS = ("method", "pattern", "scope", "kept (asked)", "settings")
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
"""Recipe fields that the table gives for all runs of a task."""
LEGEND = """\
- One row holds the *n* runs that differ only in their seed: mean ± sample standard deviation over the seeds. With fewer than
  three seeds the deviation is not reliable. For *dense*, n counts models: a checkpoint is one model for all seeds.
- *change*: difference to the dense model of the same run, in points. *compression*: all parameters divided by the remaining
  ones, including biases, norms and dense layers.
- *theoretical speed-up*: multiply-accumulates of the dense model divided by those of the kept weights (or by the mean of the
  computed ones, if they depend on the input). It is not a time. The measured speed-up is beside it: the fastest execution of
  the dense model against the fastest of the pruned one, timed interleaved in one process; over several seeds, the median of
  each.
- *bytes*: size of the weights alone, masks multiplied in, as a safetensors file, and of that file after zlib. A saved run also
  holds its masks."""


def table(group: Group) -> Table:
    """Returns the main table of a task, the dense models first."""
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
    return Table(titles, rows, WORDS).without_empty("settings")


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
    """Returns best dense time, best pruned time and their ratio, with the number of timed runs."""
    dense, pruned, ratio = row.time("dense"), row.time("pruned"), row.speedup
    if dense is None or pruned is None or ratio is None:
        return [_time(None, ""), Entry("", 0.0), Entry("", 1.0)] if row.baseline else [_time(None, "")] * 3
    timed, runs = len(row.measured), len(row.records)
    note = "" if timed == runs or row.baseline else f", {timed} of {runs} runs"
    if row.machines > 1:
        low, high = min(map(speedup_of, row.measured)), max(map(speedup_of, row.measured))
        several = Entry(f"{row.machines} machines{note}", 0.0)
        span = Entry(f"{low:.2f} to {high:.2f}x", ratio)
        return [several, Entry("", 0.0), Entry("", 1.0)] if row.baseline else [several, several, span]
    if row.baseline:
        return [_time(dense, note), Entry("", 0.0), Entry("1.00x", 1.0)]
    return [_time(dense, note), _time(pruned, note), of_ratio(ratio)]


def _time(best: tuple[str, float] | None, note: str) -> Entry:
    return Entry(UNMEASURED, 0.0) if best is None else Entry(f"{best[1]:.3f} ({best[0]}{note})", best[1])


def what_ran(group: Group) -> list[str]:
    """Returns sentences about machines and versions, as far as the runs recorded them."""
    records = group.records
    loaded = all(record.recipe.get("checkpoint") for record in records)
    options = sorted({key for record in records for key in flatten(record.recipe) if key.startswith("model_options.")})
    common = group.common(*options, *(key for key in SETTINGS if not (loaded and key.startswith("dense."))))
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


def markdown(found: Collected, tasks: Sequence[Group], figures: Iterable[PurePath]) -> str:
    """Returns ``results.md``: the same records, the same bytes.

    Args:
        found: The collected records.
        tasks: The groups of records.
        figures: Paths of the pictures relative to the file, named after the task's slug and the picture.
    """
    written = {figure.name: figure for figure in figures}
    lines = [
        "# Results",
        "",
        "Generated by `microglia report`; do not edit. The files it was made from are listed at the end.",
        "",
    ]
    lines += [LEGEND, ""]
    for group in tasks:
        lines += [f"## {escaped(group.title)}", "", *(f"- {escaped(sentence)}" for sentence in what_ran(group)), ""]
        first, *others = (table.markdown() for table in tables_of(group))
        lines += first
        for picture in sorted(pictures_of(group), key=lambda picture: picture.name):
            if (path := written.get(f"{group.slug}-{picture.name}.png")) is not None:
                lines += [f"![{picture.caption}]({path.as_posix()})", ""]
        lines += [line for other in others for line in other]
    if found.left_out:
        lines += ["## Left out", "", *(f"- {escaped(line)}" for line in found.left_out), ""]
    sources = Counter(record.source.partition("#")[0] for record in found.records)
    lines += ["## Made from", "", *(f"- `{name}` ({count_runs(count)})" for name, count in sorted(sources.items()))]
    return "\n".join(lines) + "\n"
