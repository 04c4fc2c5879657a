"""Tables of an accelerated model: how its layers run, the times of the whole, and whether predictions agree."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from microglia.runtime.int8.agreement import Agreement
from microglia.runtime.report import is_dense

Json = dict[str, Any]


def acceleration_tables(record: Json) -> list[Any]:
    """Returns tables for a reader: the executions of layers, the times of the whole model, and the agreement."""
    ways: dict[str, list[Json]] = {}
    for layer in record["layers"]:
        ways.setdefault(layer["chosen"], []).append(layer)
    layers = Table("layers run as", "how many", "ms", "dense, ms", title="Accelerated")
    for way, own in sorted(ways.items()):
        dense = sum(min(time for name, time in layer["times"].items() if is_dense(name)) for layer in own)
        layers.add_row(way, str(len(own)), f"{sum(layer['times'][way] for layer in own):.3f}", f"{dense:.3f}")
    how = f"{record.get('precision', 'float32')}, batch {record['batch']}, {record['threads']} thread(s)"
    title = f"The whole model, {how}, kernels: {record['level']}"
    whole = Table("execution", "ms", "", title=title)
    for name, time in sorted(record["times"].items(), key=lambda item: item[1]):
        mark = f"chosen: {record['speedup']:.2f}x the best dense ({record['best_dense']})" if name == record["chosen"] else ""
        whole.add_row(name, f"{time:.3f}", mark)
    rounding = record.get("rounding")
    rounded = [] if rounding is None else [str(Agreement(**rounding))]
    return [layers, whole, *record["notes"], *rounded, *_agreed(record["agreement"])]


def _agreed(found: Json | None) -> list[str]:
    if found is None:
        return []
    if found["correct"] is None:
        return [
            f"The same prediction on {found['equal']:,} of {found['images']:,} in the test split; outputs differ by "
            f"{found['difference']:.1e} at most."
        ]
    accuracy = [f"{100 * count / found['images']:.2f} %" for count in found["correct"]]
    return [
        f"The same class on {found['equal']:,} of {found['images']:,} test images; accuracy {accuracy[0]} before and "
        f"{accuracy[1]} accelerated; outputs differ by {found['difference']:.1e} at most."
    ]
