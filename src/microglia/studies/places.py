"""Where a study keeps everything: beside what it looks at, or in a directory of its own under ``runs``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_of(target: str) -> Path | None:
    """Returns the run that a target is, or whose model it is; None where there is none."""
    near = (Path(target), Path(target).resolve().parent)
    exists = Path(target).exists()
    return next((path for path in near if exists and (path / "recipe.yaml").is_file()), None)


def beside(target: str, name: str, data: str | None = None) -> Path:
    """Returns the directory of a study of one target: in its run, beside a saved model, or under ``runs``.

    Args:
        target: A run, a directory that `save` wrote, or the name of a network.
        name: The study.
        data: Data set of a network by name; None for ``digits``.
    """
    run = run_of(target)
    if run is not None:
        return run / name
    if (alone := Path(target)).is_dir():
        return alone.with_name(f"{alone.resolve().name}-{name}")
    return under_runs(f"{name}-{target}-{data or 'digits'}")


def under_runs(name: str, identity: Mapping[str, Any] | None = None) -> Path:
    """Returns a directory under ``runs``: the same name and identity, the same directory.

    Args:
        name: Start of its name; what no file name may hold becomes an underscore.
        identity: Settings that tell it from others, JSON-ready; None for none.
    """
    if identity is not None:
        mark = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=3).hexdigest()
        name = f"{name}-{mark}"
    return Path("runs") / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
