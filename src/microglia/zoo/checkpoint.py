"""Loads published weights into a model, strictly; a mismatch is described in one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from microglia.core.errors import CheckpointError
from microglia.zoo.builder import build, model_names

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel / DistributedDataParallel and of torch.compile
_PLACES = ("state_dict", "model", "model_state_dict", "net")
_SHOWN = 5


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, prefix: str | None = None) -> None:
    """Loads the weights of a file into ``model``, in place; after an error the model is unchanged.

    Every tensor has to match by name and shape; only BatchNorm's ``num_batches_tracked`` may be missing, because old files do
    not have it. No code of the file runs: it is read by ``torch.load(weights_only=True)`` or by safetensors.

    Args:
        model: Any module without masks.
        path: A ``.safetensors`` file, or a file of ``torch.save``: ``.pt``, ``.pth``, ``.th``, ``.bin``. The state
            dictionary is the file itself or its entry ``state_dict``, ``model``, ``model_state_dict`` or ``net``.
        prefix: Load only the entries whose names begin with this, and remove it. By default the prefixes of DataParallel and
            torch.compile (``module.``, ``_orig_mod.``) are removed automatically.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or holds objects that would run code; or names or
            shapes do not fit. The text lists up to five of each kind and guesses the kind of the file.
    """
    load_state(model, read_state(path), path, prefix=prefix)


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by name, without running code of the file.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or holds objects that would run code.
    """
    return _state_dictionary(_read(Path(path)), path)


def load_state(model: nn.Module, state: dict[str, Tensor], path: object, *, prefix: str | None = None) -> None:
    """Loads tensors by name into ``model`` as `load_checkpoint` does; ``path`` is for messages.

    Raises:
        CheckpointError: Names or shapes do not fit, or a weight is not finite.
    """
    if prefix is not None:
        dotted = prefix.rstrip(".") + "."
        under = {name.removeprefix(dotted): tensor for name, tensor in state.items() if name.startswith(dotted)}
        if not under:
            raise CheckpointError(f"No entry of {path} begins with {dotted!r}; it has {_some(list(state))}.")
        state = under
    own = model.state_dict()
    ours, theirs = _wrapper(own), _wrapper(state)
    state = {ours + name[len(theirs) :]: tensor for name, tensor in state.items()}
    problems = _differences(own, state)
    if problems:
        guess = _guess(own, {name[len(ours) :]: tensor for name, tensor in state.items()})
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}.{guess}")
    broken = [name for name, _ in model.named_parameters() if name in state and not _finite(state[name])]
    if broken:
        raise CheckpointError(f"{path} holds weights that are infinite or not a number: {_some(broken)}; take another file.")
    model.load_state_dict(state)


def _read(path: Path) -> Any:
    """Returns the content of the file, on the CPU."""
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint {path}.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory without a saved model; name the checkpoint file in it.")
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types, KeyError included, on a foreign file
        code = re.search(r"GLOBAL:?\s+(?:GLOBAL\s+)?([\w.]+)", str(error), flags=re.IGNORECASE)
        if code:
            reason = (
                f"holds a Python object ({code[1]}) that would have to run code to load, which is refused. Save the weights "
                "alone, torch.save(model.state_dict(), path), where you trust the file"
            )
        elif "TorchScript" in str(error):
            reason = "is a TorchScript archive; save its state_dict() instead"
        elif isinstance(error, PermissionError):
            reason = "may not be read (permission denied)"
        else:
            reason = "cannot be read: it is damaged, cut short, or no file of torch.save or safetensors"
        raise CheckpointError(f"{path} {reason}.") from error


def _state_dictionary(content: Any, path: object) -> dict[str, Tensor]:
    """Returns the mapping of names to tensors, from the file itself or one of the usual entries."""
    places = [content] + ([content.get(place) for place in _PLACES] if isinstance(content, Mapping) else [])
    for place in places:
        if isinstance(place, Mapping) and place and all(isinstance(value, Tensor) for value in place.values()):
            return {str(name): tensor for name, tensor in place.items()}
    kind = f"a mapping with {_some(list(map(str, content)))}" if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(
        f"{path} holds no weights: expected tensors by name, alone or under {', '.join(_PLACES)}; found {kind}."
    )


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _wrapper(names: Iterable[str]) -> str:
    """Returns the prefix that wrappers add to every name, such as ``"module._orig_mod."``, or nothing."""
    names, found = list(names), ""
    while names and (more := next((w for w in _WRAPPERS if all(n.startswith(found + w) for n in names)), "")):
        found += more
    return found


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"{len(names)} {kind}: {_some(names)}" for kind, names in parts if names]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _guess(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Returns a sentence about the likely content of the file, or an empty text."""
    if any(".parametrizations." in name for name in own):
        return " The model carries masks: load the checkpoint first, then prune."
    differing = [name for name in own if name in state and state[name].shape != own[name].shape]
    if _names(own) == _names(state):
        last = list(own)[-1].rpartition(".")[0]
        if all(name.rpartition(".")[0] == last for name in differing):
            return f" Only the last layer differs: the file seems to have {len(state[list(own)[-1]])} classes."
        return " The names agree: the file seems to hold the same architecture with another width or input."
    similar = [name for name in model_names() if _fits(name, state)]
    if similar:
        return f" The file looks like another architecture: {' or '.join(similar)}."
    return " The file looks like another architecture." if len(_names(own) & _names(state)) < len(own) / 2 else ""


def _names(state: Iterable[str]) -> set[str]:
    return {name for name in state if not name.endswith("num_batches_tracked")}


def _fits(name: str, state: Mapping[str, Tensor]) -> bool:
    """Tells whether a model of the zoo has the names of ``state`` and, inside the network, its shapes."""
    with torch.device("meta"):
        own = build(name).state_dict()
    if _names(own) != _names(state):
        return False
    inside = [key for key in own if key in state and own[key].ndim == 4][1:]  # the first convolution depends on the input
    return all(own[key].shape == state[key].shape for key in inside)
