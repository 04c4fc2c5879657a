"""What a benchmark measured, as a file that `speed_document.py` reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from microglia.core.timing import processor_name
from microglia.runtime import level


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def scaling(runs: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Returns, for each run of layers after the first, its threads -> case -> how many times as fast as the first run's."""
    first, *others = runs
    found: dict[int, dict[str, float]] = {}
    for run in others:
        pairs = list(zip(first["rows"], run["rows"], strict=True))
        found[run["threads"]] = {"dense": geometric_mean([one["dense"] / more["dense"] for one, more in pairs])}
        for case in first["means"]:
            ratios = [one["times"][case] / more["times"][case] for one, more in pairs]
            found[run["threads"]][case] = geometric_mean(ratios)
    return found


def write(file: Path | None, kind: str, **measured: Any) -> None:
    """Writes what was measured and on what; nothing without a file."""
    if file is not None:
        where = {"kind": kind, "processor": processor_name(), "level": level(), "torch": torch.__version__}
        if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):  # oneDNN's own, which OpenVINO obeys too
            where["engines_limited_to"] = limit
        file.write_text(json.dumps({**where, **measured}, indent=1) + "\n")
