"""Files that count as written only once they were verified: a folder beside them, then one move."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from microglia.core.errors import ExportError
from microglia.storage.files import NO_ROOM, explained


@contextmanager
def replacing(path: Path, size: int) -> Iterator[Path]:
    """Yields a path to write to, in an empty folder beside ``path``; all that is there at the end takes its place.

    An error leaves what was there before, and nothing else. Content beside the file (weights in a file of their own)
    moves first, after the file before it was removed: at any moment the file is there with its own weights, or it is not there.

    Args:
        path: File or directory to replace.
        size: Bytes that the file needs at least; where writing fails and they are not free, the error says so.

    Raises:
        FileError: It cannot be written.
    """
    made = _missing(path.parent)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".writing"))
        try:
            yield folder / path.name
            _move(folder, path)
        except BaseException as error:
            full = None if isinstance(error, OSError) else _no_room(folder, size)
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made:  # only those that are still empty
                with suppress(OSError):
                    parent.rmdir()
            if full is not None:
                raise full from error
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _missing(folder: Path) -> list[Path]:
    """Returns the folders that have to be made, the innermost first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def _no_room(folder: Path, size: int) -> OSError | None:
    """Returns the error that a file of this size gets; libraries that write do not tell why they could not."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return None
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        return error if error.errno in NO_ROOM else None
    return None


def _move(folder: Path, path: Path) -> None:
    """Puts what lies in a folder in its place: what belongs beside the path first, the path last."""
    if not (folder / path.name).exists():
        raise ExportError(f"The engine wrote no file {path.name}: try another target, and report it.")
    beside = sorted(entry for entry in folder.iterdir() if entry.name != path.name)
    for entry in (*beside, folder / path.name):
        _to_disk(entry)
    if path.is_dir():
        path.rename(folder / f"{path.name}.before")
    elif beside:
        path.unlink(missing_ok=True)
    for entry in beside:
        os.replace(entry, path.parent / entry.name)
    os.replace(folder / path.name, path)


def _to_disk(entry: Path) -> None:
    for file in entry.rglob("*") if entry.is_dir() else (entry,):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
