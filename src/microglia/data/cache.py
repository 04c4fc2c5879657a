"""Decoded images kept on disk, for data sets that are slow to decode. A failure of the cache is never an error."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


def fingerprint(files: Iterable[Path], *options: object) -> str:
    """Returns a hash of the files' paths, sizes and times of change, and of the decoding options."""
    digest = hashlib.sha256(repr(options).encode())
    for path in files:
        status = path.stat()
        digest.update(f"\0{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def cache_path(key: str) -> Path | None:
    """Returns the path of the images with this fingerprint, or None on a machine without a home directory."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / "microglia" / f"decoded-{key[:32]}.safetensors"


def read_cache(path: Path) -> dict[str, Tensor] | None:
    """Returns the tensors in a file that ``write_cache`` wrote, or None when it is absent or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            expected = (file.metadata() or {}).get("crc32")
    except (OSError, SafetensorError):
        return None
    return tensors if expected == _checksum(tensors) else None


def write_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the tensors atomically; gives up if the disk cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file(tensors, scratch, metadata={"crc32": _checksum(tensors)})
        os.replace(scratch, path)
    except (OSError, SafetensorError):
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Returns a checksum of names, shapes and contents of uint8 tensors: it detects damage, not manipulation."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(f"{name}{list(tensors[name].shape)}".encode(), value)
        value = zlib.crc32(tensors[name].numpy().data, value)
    return f"{value:08x}"
