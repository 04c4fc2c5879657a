"""Files that are complete or refused: atomic writes, tensors without pickle, a digest in every file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from microglia.core.errors import FileError
from microglia.storage.bits import pack, unpack

VERSION = 1
PACKED = 2
"""Version of a tensor file that holds bits; without bits the version is `VERSION`, which older libraries read."""
UMASK = os.umask(0)
os.umask(UMASK)  # the umask can only be read by setting it
ENTRY = "microglia"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Makes an `OSError` while a path is written one sentence, a `FileError`; a full disk is named as such."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise FileError(
                f"There is no room on the disk to write {path} ({error.strerror}). What was finished before is whole; "
                "free some space and start the same command again."
            ) from error
        raise FileError(f"Cannot write {path}: {error.strerror or error}.") from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: at any moment, also after a crash, it holds the old or the new content, never a part.

    Raises:
        FileError: The file cannot be written; a full disk is named as such and leaves no debris.
    """
    data = content.encode() if isinstance(content, str) else content
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), 0o666 & ~UMASK)  # mkstemp's default mode is for its creator only
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Returns a BLAKE2 digest of names, dtypes, shapes and bytes of tensors, and of a text."""
    h = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        h.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        h.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, kind: str, document: Any = None) -> str:
    """Writes a safetensors file of one kind with a JSON document and a digest in its header; returns the digest.

    Boolean tensors, such as masks, are stored as bits (see `microglia.storage.bits.pack`), their shapes in the header. The
    digest covers the given tensors.
    """
    text = json.dumps(document, sort_keys=True)
    # Shared memory (tied weights) is written once per name: safetensors has no views.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    mark = digest(plain, text)
    stored, shapes = pack(plain)
    header: dict[str, Any] = {"format": f"microglia.{kind}", "version": VERSION, "digest": mark, "document": text}
    if shapes:
        header |= {"version": max(VERSION, PACKED), "bits": shapes}
    # One entry: safetensors orders several entries differently in every process, but equal states must give equal files.
    write_atomic(path, save(stored, metadata={ENTRY: json.dumps(header)}))
    return mark


def read_tensors(path: Path, *, kind: str) -> tuple[dict[str, Tensor], Any, str]:
    """Returns (tensors, document, digest) of a file that `write_tensors` wrote.

    Raises:
        FileError: The file is missing, damaged, truncated, of another kind, or newer than this library.
    """
    if not path.is_file():
        raise FileError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = parse((file.metadata() or {}).get(ENTRY, "{}"))
            check_header(path, header, kind, newest=PACKED)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        tensors = unpack(stored, header.get("bits", {}))
        whole = digest(tensors, header["document"]) == header["digest"]
        document = parse(header["document"]) if whole else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is damaged or not a safetensors file ({error}).") from error
    if not whole:
        raise FileError(f"{path} is damaged: its content does not match its digest.")
    return tensors, document, header["digest"]


def parse(text: str) -> Any:
    """Returns the content of a JSON text.

    Raises:
        ValueError: The text is not JSON, or its nesting or its numbers exceed Python's limits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_header(path: Path, header: Mapping[str, Any], kind: str, *, newest: int = VERSION) -> None:
    """Raises `FileError` unless a header has this kind and a version up to the ``newest`` known."""
    if not isinstance(header, Mapping):
        raise FileError(f"{path} is damaged: it holds no header.")
    found = header.get("format")
    if found != f"microglia.{kind}":
        what = f"a {found} file" if found else "not a file of this library"
        raise FileError(f"{path} is {what}; expected microglia.{kind}.")
    version = header.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FileError(f"{path} does not say its version, a whole number of at least 1; it is damaged.")
    if version > newest:
        raise FileError(f"{path} has version {version}, this library reads up to {newest}: upgrade microglia to read it.")


State = Any
"""Nested dicts (string or integer keys), lists and tuples of tensors, numbers, strings and None."""


def write_state(path: Path, state: State) -> None:
    """Writes a nested state, such as a model's and its optimizer's, as one file."""
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, tensors)
    write_tensors(path, tensors, kind="state", document=tree)


def read_state(path: Path) -> State:
    """Returns the state that `write_state` wrote, bit for bit; errors as in `read_tensors`."""
    tensors, tree, _ = read_tensors(path, kind="state")
    try:
        return _unflatten(tree, tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it holds no state ({type(error).__name__}).") from error


def _flatten(value: State, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a state holds tensors, numbers, strings and None, not {type(value).__name__}")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> State:
    ((form, content),) = tree.items()
    if form == "tensor":
        return tensors[content]
    if form == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    if form == "list":
        return [_unflatten(item, tensors) for item in content]
    return content
