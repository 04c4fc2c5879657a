"""What a benchmark measured, as a file that `speed_document.py` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from microglia.measure.latency import processor_name
from microglia.runtime import level


def write(file: Path | None, kind: str, **measured: Any) -> None:
    """Writes what was measured and on what; nothing without a file."""
    if file is not None:
        where = {"kind": kind, "processor": processor_name(), "level": level(), "torch": torch.__version__}
        file.write_text(json.dumps({**where, **measured}, indent=1) + "\n")
