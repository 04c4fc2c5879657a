"""A table of measured times of candidate widths, kept on disk: a budget in milliseconds uses real times, not FLOPs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from microglia.measure import measure_latency

Build = Callable[[Mapping[int, int]], nn.Module]

TIMED_BY = ("eager", "packed")
"""The executions whose fastest counts, unless others are asked for."""

TIMING = 2
"""Version of the timing method of kept times; 2: a turn begins with a call that is not timed."""


class LatencyTable:
    """Milliseconds of one example batch at given widths, measured once per machine, thread count and torch version.

    Args:
        example_inputs: The example batch.
        build: Returns the model with given widths.
        path: Path of the table; None for the user's cache.
        executions: Ways to run the candidates; the fastest counts.
    """

    def __init__(
        self, example_inputs: Any, build: Build, path: Path | None = None, executions: Sequence[str] = TIMED_BY
    ) -> None:
        self.example, self.build, self.executions = example_inputs, build, tuple(executions)
        self.path = path or _default_path()
        self.times: dict[str, float] = _read(self.path)

    def __call__(self, counts: Mapping[int, int]) -> float:
        """Returns the milliseconds at these widths."""
        model = self.build(counts).eval()
        key = self._key(model)
        if key not in self.times:
            report = measure_latency({"model": model}, self.example, executions=self.executions, rounds=9, max_seconds=10)
            self.times[key] = report.best("model")[1].median
            _write(self.path, self.times)
        return self.times[key]

    def _key(self, model: nn.Module) -> str:
        shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        inputs = [(tuple(v.shape), str(v.dtype), str(v.device)) for v in torch.utils._pytree.tree_leaves(self.example)]
        here = (TIMING, torch.__version__, torch.get_num_threads(), os.uname().nodename, self.executions)
        return hashlib.sha256(repr((type(model).__name__, shapes, inputs, here)).encode()).hexdigest()[:32]


def _default_path() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "microglia" / "latency.json"


def _read(path: Path) -> dict[str, float]:
    """Returns the table, or an empty one: a cache never causes an error."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: float(v) for k, v in content.items()} if isinstance(content, dict) else {}


def _write(path: Path, times: Mapping[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(dict(times), file)
        os.replace(name, path)
    except OSError:
        return
