"""A cache of layer times, in one small file per machine, so that nothing is measured twice."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from microglia.core.errors import MicrogliaError
from microglia.core.timing import processor_name
from microglia.runtime.dense.fusion import Site
from microglia.runtime.operators import level

Times = dict[str, float]
"""Name of a candidate -> milliseconds."""


def default_cache() -> Path:
    """Returns the folder of measured times: ``MICROGLIA_CACHE``, or ``microglia`` in the user's cache folder."""
    given = os.environ.get("MICROGLIA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "microglia"


class Choices:
    """Times of layers by all that they depend on, kept in a file of this machine.

    A damaged file counts as empty, because the times can be measured again. A file that cannot be written is no error.

    Args:
        folder: Folder of the file; None keeps nothing.
        where: The machine for which the times are valid; None for the CPU, `machine`.
    """

    def __init__(self, folder: Path | None, where: dict[str, Any] | None = None) -> None:
        self.file = None if folder is None else folder / f"times-{_digest(where or machine())[:16]}.json"
        self._times: dict[str, Times] = {}
        if self.file is not None and self.file.is_file():
            try:
                self._times = {k: _sound(v) for k, v in json.loads(self.file.read_text()).items()}
            except (ValueError, AttributeError, TypeError, OSError):
                self._times = {}

    def get(self, site: Site, names: list[str]) -> Times | None:
        """Returns the times of an equal layer, if each of these candidates was measured."""
        found = self._times.get(_key(site))
        return {name: found[name] for name in names} if found is not None and set(names) <= set(found) else None

    def put(self, site: Site, times: Times) -> None:
        """Keeps the times of a layer."""
        self._times.setdefault(_key(site), {}).update(times)

    def save(self) -> None:
        """Writes the file atomically: another process reads either the old file or the new one."""
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False) as file:
                json.dump(self._times, file)
            try:
                Path(file.name).replace(self.file)
            finally:
                Path(file.name).unlink(missing_ok=True)
        except OSError:
            return


def machine() -> dict[str, Any]:
    """Returns all that times depend on besides the layer: processor, kernels, threads and versions."""
    return {
        "processor": processor_name(),
        "level": level(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": _kernels(),
    }


@functools.cache
def _kernels() -> str:
    """Returns a digest of the compiled kernels, so that changed kernels are measured anew."""
    built = sorted(Path(__file__).parent.glob("_kernels*.so"))
    return hashlib.sha256(built[0].read_bytes()).hexdigest()[:16] if built else ""


def _key(site: Site) -> str:
    """Returns a digest of all that a layer's times depend on: its shapes and the positions of zeros, not the values."""
    if site.weight.numel() == 0:
        raise MicrogliaError(f"The layer {site.name!r} has no weights.")
    mask = (site.weight != 0).flatten().to(torch.uint8).cpu().numpy().tobytes()
    shapes = (site.kind, site.input_shape, tuple(site.weight.shape), site.stride, site.padding, site.dilation, site.groups)
    half = [] if site.weight.dtype == torch.float32 else [str(site.weight.dtype)]
    return _digest([*map(str, shapes), str(site.activation), site.residual, hashlib.sha256(mask).hexdigest(), *half])


def _sound(times: dict[str, Any]) -> Times:
    found = {name: float(time) for name, time in times.items()}
    if not all(math.isfinite(time) and time > 0 for time in found.values()):
        raise ValueError("a time is no time")
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
