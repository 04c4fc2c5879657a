"""Saving and loading a pruned model: safetensors and a JSON plan, no pickle anywhere."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core import masks as core_masks
from microglia.core.errors import FileError, MicrogliaError
from microglia.core.house import ALWAYS
from microglia.core.masks import parametrized, unfinished
from microglia.core.restore import restore
from microglia.core.sharded import one_writer, plain_name, refuse_shards, whole
from microglia.runtime.accelerated import Accelerated
from microglia.runtime.reload import Kernels
from microglia.storage import hub
from microglia.storage.acceleration import remove_kernels, with_kernels, write_kernels
from microglia.storage.changes import SOURCE, changes, changes_of, decode, replay, written_changes
from microglia.storage.files import VERSION, check_header, read_tensors, write_atomic, write_tensors
from microglia.storage.run import read_json
from microglia.zoo import build
from microglia.zoo.trust import require_known, trusting

PLAN, WEIGHTS = "plan.json", "model.safetensors"
SIDE = 4096
"""Maximum channels, height and width that a file may request; larger models must be passed by the caller."""
DEPTH = 1000
"""Layers that any name may ask for."""
TIMES, LEAST = 1000, 2**26
"""Maximum ratio of a dense model's size to its saved weights, and the size that is always allowed."""


def save(model: nn.Module, directory: str | Path, *, fold: bool = False) -> Path:
    """Writes ``model.safetensors`` (weights, buffers, masks) and ``plan.json`` (how to build the model, and its changes).

    Args:
        model: Any module, with any changes of `changes_of`. A model of `microglia.tasks.build` can be loaded from its directory
            alone. An accelerated model is written in its original form, with masks as zeros of the weights, and on the CPU with
            ``acceleration.json``: the kernel of each layer, the machine, and the shapes of the example (the values of
            whole numbers, such as token ids, too).
        directory: Created if it does not exist; an earlier model there is replaced, weights and plan each atomically.
        fold: Whether to write the masks as zeros of the weights (see `microglia.fold`). Otherwise masks are stored beside them,
            an eighth of a byte for each weight. The model itself keeps its masks; the loaded model has none.

    Sharded parameters (FSDP2) are gathered: all ranks call this function, rank 0 writes, and the files are those of the
    unsharded model. No copy of a sharded model can be folded; fold the loaded one.

    Returns:
        The directory.

    Raises:
        FileError: The files cannot be written, or a pruner still searches in the model.
    """
    directory = Path(directory)
    _require_finished(model)
    given = model
    if fold:
        refuse_shards(model, "save(fold=True)")
    model, content, long = described(core_masks.fold(copy.deepcopy(original(model))) if fold else model)
    with one_writer(model) as writes:
        state = _gathered(model, keep=writes)
        if not writes:
            return directory
        remove_kernels(directory)
        # The weights' header holds a digest of the binding changes, so that no other change is replayed for these weights.
        content["digest"] = write_tensors(directory / WEIGHTS, state, kind="weights", document=_mark(content))
        write_atomic(directory / PLAN, json.dumps(content, indent=None if long else 2) + "\n")
        write_kernels(directory, given, content["digest"])
    return directory


def load(
    directory: str | Path, model: nn.Module | None = None, *, trust: bool = False, kernels: Kernels = "timed"
) -> nn.Module:
    """Returns the saved model, bit for bit; code that its files name is imported or run only on request.

    Args:
        directory: The directory that `save` wrote; or ``hub:OWNER/NAME``, which is fetched from the Hugging Face hub.
        model: A freshly built model of the same architecture to load into; dense even if the saved one was shrunk. It is needed
            if the saved model was not made by `microglia.tasks.build`.
        trust: Whether the files may name any model to build, such as ``package.module:function``, which is then imported
            and called. Otherwise only the library's own are built, and those of timm, torchvision and transformers by
            plain name.
        kernels: How an accelerated model comes back. ``timed``: by its stored kernels, without timing; on another machine it is
            timed anew, and a warning says so. ``stored``: the same, but on another machine the plain model is returned.
            ``none``: always the plain model, to train or to prune further.

    Raises:
        FileError: A file is missing, damaged, truncated, foreign, or newer than this library; or the model does not fit, or the
            file may not name it.
    """
    directory = hub.fetched(str(directory)) if str(directory).startswith(hub.PREFIX) else Path(directory)
    plan, state = _read(directory)
    return with_kernels(directory, rebuilt(directory, plan, state, model, trust=trust), plan["digest"], kernels)


def _gathered(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Returns the whole tensors of a model on the CPU; a rank that does not keep them only takes part in the gathering."""
    gathered = ((name, whole(value)) for name, value in model.state_dict().items())
    return {name: value.cpu() for name, value in gathered if keep}


def described(model: nn.Module) -> tuple[nn.Module, dict[str, Any], bool]:
    """Returns the model to write, the content of its ``plan.json``, and whether this content is long.

    Args:
        model: Any module, with any changes of `changes_of`.

    Returns:
        (model, content, long): an accelerated model is replaced by its original. The content lacks the digest of the weights.

    Raises:
        FileError: A pruner still searches in the model.
    """
    _require_finished(model)
    model = original(model)
    found = changes_of(model)
    written = {key: done.kind.encode(done.value) for key, done in found.items()}
    content = {
        "format": "microglia.model",
        "version": VERSION,
        # A build makes plain weights: with other parametrizations only the user can make the model to load into.
        "source": getattr(model, SOURCE, None) if not parametrized(model) else None,
        "class": next((name for d in found.values() if (name := d.kind.was(d.value))), plain_name(model)),
        **{key: written.get(key, ALWAYS.get(key)) for key in dict.fromkeys((*ALWAYS, *written))},
    }
    return model, content, any(done.kind.cuts for done in found.values())  # indices by the thousand


def rebuilt(
    place: Path,
    plan: Mapping[str, Any],
    state: Mapping[str, Tensor],
    model: nn.Module | None = None,
    *,
    trust: bool = False,
    outline: Mapping[str, Tensor] | None = None,
    fill: Callable[[nn.Module, Mapping[str, Tensor]], nn.Module] = restore,
) -> nn.Module:
    """Returns the model of a plan and a state, which any kind of file may hold.

    Args:
        place: Name of the file or directory, for errors.
        plan: Content of `described`, checked to be of this kind and version.
        state: The stored tensors; they may be read on request.
        model: See `load`.
        trust: See `load`.
        outline: Tensors with the stored shapes, whose values do not count; None for the state itself.
        fill: Loads the state into the model and returns it.

    Raises:
        FileError: See `load`.
    """
    done = decode(plan, state)
    if model is None:
        with trusting(trust):
            model = _build(place, plan, state if outline is None else outline)
    cut = next((key for key, before in changes_of(model).items() if before.kind.cuts), None)
    if cut is not None:
        raise FileError(f"Pass a freshly built, dense {type(model).__name__} to load {place} into, not a {cut} one.")
    model = replay(model, done)
    try:
        return fill(model, state)
    except (RuntimeError, MicrogliaError) as error:
        raise FileError(f"The weights in {place} do not fit {type(model).__name__}: {error}") from error


def _require_finished(model: nn.Module) -> None:
    if unfinished(model):
        raise FileError(
            "A pruner still searches in this model, whose soft masks no file holds: call pruner.finish() before save."
        )


def original(model: nn.Module) -> nn.Module:
    """Returns the model behind an accelerated one, or the model itself."""
    return model.dense if isinstance(model, Accelerated) else model


def saved_bytes(target: str | Path) -> int | None:
    """Returns the size of the file with a target's weights and masks, as it was written; None for a model's name."""
    places = (Path(target) / "model" / WEIGHTS, Path(target) / WEIGHTS)
    return next((path.stat().st_size for path in places if path.is_file()), None)


def check_whole(directory: Path) -> None:
    """Raises `FileError` unless a saved model's two files exist, are undamaged and belong together; builds nothing."""
    _read(directory)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the plan and the tensors of a saved model."""
    if not (directory / PLAN).is_file():
        raise FileError(f"{directory} holds no saved model: there is no {PLAN}.")
    plan = read_json(directory / PLAN)
    check_header(directory / PLAN, plan, "model")
    state, bound, mark = read_tensors(directory / WEIGHTS, kind="weights")
    if mark != plan.get("digest") or bound != _mark(plan):
        raise FileError(f"{directory}: {WEIGHTS} and {PLAN} do not belong together; one of them was replaced.")
    return plan, state


def _mark(plan: Mapping[str, Any]) -> str | None:
    """Returns a digest of the changes of a ``plan.json`` that bind its weights, or None."""
    bound = {key: value for key, (kind, value) in written_changes(plan).items() if kind.binds}
    if not bound:
        return None
    alone = [key for key in bound if changes[key].alone]
    marked = bound[alone[0]] if len(bound) == 1 and alone else bound
    return hashlib.blake2b(json.dumps(marked, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check_size(source: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> None:
    """Raises unless a model of these classes, shape and options can have the saved weights; builds nothing.

    The numbers of classes and channels must be sizes of some tensor. Depth and width must have weights of their own. The dense
    model, built without memory, must be at most a thousand times as large as the saved weights.
    """
    sizes = {size for tensor in state.values() for size in tensor.shape}
    entries = sum(tensor.numel() for tensor in state.values())
    classes, shape = source["classes"], source["shape"]
    whole = isinstance(shape, list) and all(type(n) is int for n in [classes, *shape]) and len(shape) == 3
    if not whole or classes not in sizes or not 1 <= min(shape) <= max(shape) <= SIDE or shape[0] > entries:
        raise FileError(
            f"{path} does not fit its weights: they are not of {_brief(classes)} classes and inputs of {_brief(shape)}."
        )
    name, options = source["name"], source["options"]
    largest = max((abs(v) for v in options.values() if type(v) is int), default=0)
    fits = largest <= max(SIDE, entries)
    if fits and ":" not in name:  # a library's models have fixed sizes, and some cannot be built without memory
        depth = max(map(int, re.findall(r"\d{1,9}", name)), default=0)
        fits = depth <= max(DEPTH, 4 * len(state)) and _dense(source, path) <= max(LEAST, TIMES * entries)
    if not fits:
        raise FileError(f"{path} does not fit its weights: {name[:80]!r} is far larger than they are.")


def _dense(source: Mapping[str, Any], path: Path) -> int:
    """Returns the parameters of the dense model that a file names; the model is built without memory."""
    try:
        with torch.device("meta"):
            dense = build(source["name"], classes=source["classes"], shape=tuple(source["shape"]), **source["options"])
    except (MicrogliaError, RuntimeError, OverflowError) as error:
        raise FileError(f"{path} names a model that cannot be built: {error}") from error
    return sum(parameter.numel() for parameter in dense.parameters())


def _brief(value: Any) -> str:
    return repr(value)[:60]


def _build(place: Path, plan: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    source = plan.get("source")
    if not isinstance(source, dict) or not {"name", "classes", "shape", "options"} <= source.keys():
        raise FileError(
            f"{place} does not say how to build its {plan.get('class', 'model')}: pass a freshly built one, "
            f"{'load(directory, model)' if place.is_dir() else 'unpack(path, model)'}."
        )
    path = place / PLAN if place.is_dir() else place
    require_known(source["name"], source["options"], path)
    _check_size(source, state, path)
    model = build(source["name"], classes=source["classes"], shape=tuple(source["shape"]), **source["options"])
    setattr(model, SOURCE, source)
    return model
