"""The verbs `pack`, `unpack` and `inspect`: a model as one small file, and back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from microglia.compress.bit_budget import Rounding, choices, fitting_bits, second_order
from microglia.compress.codebook import Initial, looked_up
from microglia.compress.container import Container, read_container, write_container
from microglia.compress.contents import ORIGINAL, Contents, contents_of
from microglia.compress.sharing import shared_values
from microglia.compress.stored import Stored, fill
from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, FileError
from microglia.core.layers import Layer, prunable_layers
from microglia.core.masks import Masked, masks_of
from microglia.core.parametrizations import steps_of
from microglia.scores import Evidence
from microglia.storage.archive import described, rebuilt
from microglia.storage.files import write_atomic

MASK = ".0.mask"


def encode(
    model: nn.Module,
    *,
    bits: int | Mapping[str, int] | None = None,
    budget: Budget | None = None,
    evidence: Evidence | None = None,
    initial: Initial = "linear",
    exact: bool = False,
    seed: int = 0,
    codebook_groups: int = 1,
) -> bytes:
    """Returns the bytes of a packed file; arguments and errors as in `pack`."""
    if budget is not None:
        if bits is not None:
            raise BudgetError(f"A budget of bytes chooses the bits: leave bits out; got bits={bits!r} and budget={budget}.")
        bits = bits_for(model, budget, evidence=evidence, rounding=Rounding(initial, exact, seed, codebook_groups))
    model, plan, _ = described(model)
    if bits is not None:
        model = rounded(model, bits, rounding=Rounding(initial, exact, seed, codebook_groups))
    return write_container(plan, model.state_dict(), _masks(model))


def bits_for(
    model: nn.Module,
    budget: Budget,
    *,
    evidence: Evidence | None = None,
    rounding: Rounding | None = None,
    layers: Mapping[str, Layer] | None = None,
    trained: bool = False,
) -> dict[str, int]:
    """Returns the bits of each layer for a file of a number of bytes; see `microglia.compress.bit_budget`.

    Args:
        model: Any model that `microglia.save` takes; it stays unchanged.
        budget: ``Budget(bytes=...)`` alone.
        evidence: Batches and loss for the second-order error; without them the error is the squared change of the weights.
        rounding: How weights are rounded.
        layers: Layers to round; None for all. The others are stored as they are.
        trained: Whether the shared values are trained later, for which a few bytes stay free.

    Raises:
        BudgetError: The budget has no bytes, or other terms, or no file of this model is as small.
    """
    if budget.bytes is None or str(budget) != str(Budget(bytes=budget.bytes)):
        raise BudgetError(f"A packed file takes a budget of bytes alone, such as Budget(bytes=20_000); got {budget}.")
    how = rounding or Rounding()
    layers = dict(prunable_layers(model)) if layers is None else layers
    saliency = None if evidence is None else second_order(model, layers, evidence)
    curves = choices(layers, masks_of(model), saliency=saliency, rounding=how)

    def size_of(bits: Mapping[str, int]) -> int:
        own: dict[str, Any] = {"initial": how.initial, "exact": how.exact, "seed": how.seed}
        return len(encode(model, bits=bits, codebook_groups=how.groups, **own))

    return fitting_bits(curves, budget.bytes, size_of, trained=trained)


def pack(
    model: nn.Module,
    path: str | Path,
    *,
    bits: int | Mapping[str, int] | None = None,
    budget: Budget | None = None,
    evidence: Evidence | None = None,
    initial: Initial = "linear",
    exact: bool = False,
    seed: int = 0,
    codebook_groups: int = 1,
) -> Contents:
    """Writes a model as one small file: kept weights only, shared values as codes, codes and positions entropy-coded.

    Without ``bits`` nothing is rounded. A weight is stored as codes if it has at most 255 different values, as after
    `microglia.methods.WeightSharing`; otherwise its kept values are stored as they are. Weights below a mask are not stored.
    Biases, norms and other vectors are stored as they are.

    Args:
        model: Any model that `microglia.save` takes.
        path: File to write; an earlier one is replaced atomically.
        bits: Round the weights to 2^bits - 1 shared values for each layer and zero, 1 to 8 bits; one number for all layers,
            or numbers by selector, such as ``{"type:Conv?d": 8, "*": 5}``, of which the first that matches counts. The given
            model stays unchanged.
        budget: ``Budget(bytes=...)`` instead of bits: the bits of each layer are chosen for a file of at most that size.
        evidence: Batches and loss for this choice, `microglia.Evidence`; without it, it sees the weights alone.
        initial: Initial centroids: ``linear``, ``density`` or ``random``.
        exact: Whether to find the best shared values by dynamic programming.
        seed: Seed of ``random``.
        codebook_groups: Codebooks of each layer, one for each group of output channels (rows of the weight). A layer whose
            rows are no multiple of it has as many as their greatest common divisor. More codebooks round better, and take
            more bytes for their tables.

    Returns:
        The contents of the file.

    Raises:
        FileError: The file cannot be written, or a pruner still searches in the model.
        BudgetError: No file of this model is as small, or the budget has other terms than bytes.
        MicrogliaError: The bits are out of range, or a selector matches no layer.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pack(nn.Linear(256, 256), f"{folder}/model.mgpack", bits=4).ratio > 7
        True
    """
    how: dict[str, Any] = {"budget": budget, "evidence": evidence, "initial": initial, "exact": exact, "seed": seed}
    how["codebook_groups"] = codebook_groups
    data = encode(model, bits=bits, **how)
    write_atomic(Path(path), data)
    return contents_of(read_container(data, Path(path), limit=2**63))


def measured(model: nn.Module) -> Contents:
    """Returns the contents of a model's packed file without writing it; errors as in `pack`."""
    return contents_of(read_container(encode(model), Path("model"), limit=2**63))


def unpack(path: str | Path, model: nn.Module | None = None, *, trust: bool = False, limit: int | None = None) -> nn.Module:
    """Returns the model of a packed file, bit for bit as it was packed.

    The model is built first, and its tensors are then filled one by one: beside the model there is never more than the file and
    one decoded tensor. A model with a loading of its own, such as hooks, gets all tensors at once.

    Args:
        path: File that `pack` wrote.
        model: A freshly built model to load into; see `microglia.load`.
        trust: Whether the file may name any model to build; see `microglia.load`.
        limit: Maximum bytes of the decoded tensors. By default it is 256 MB, or a thousand times the file if that is more.

    Raises:
        FileError: The file is missing, damaged, truncated, foreign, newer than this library, or larger than the limit when
            decoded; or the model does not fit, or the file may not name it.
    """
    container = open_packed(path, limit=limit)
    container.check()
    state = Stored(container)
    how: dict[str, Any] = {"outline": state.outline(), "fill": fill}
    return rebuilt(container.path, container.plan, state, model, trust=trust, **how)


def inspect(path: str | Path, *, limit: int | None = None) -> Contents:
    """Returns the contents of a packed file, from its table; the parts are checked, but not decoded.

    Args:
        path: File that `pack` wrote.
        limit: See `unpack`.

    Raises:
        FileError: See `unpack`.
    """
    container = open_packed(path, limit=limit)
    container.check()
    return contents_of(container)


def open_packed(path: str | Path, *, limit: int | None = None) -> Container:
    """Returns an open packed file, whose tensors are decoded one by one on request; arguments and errors as in `unpack`."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror}.") from error
    return read_container(data, path, limit=limit)


def _masks(model: nn.Module) -> dict[str, str]:
    """Returns tensor -> mask, by their names in a model's state, for masks that are applied to the tensor itself."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList) or not parametrize.is_parametrized(module):
            continue
        for attribute in module.parametrizations:  # type: ignore[union-attr]
            if isinstance(steps_of(module, attribute)[0], Masked):
                prefix = f"{path}.parametrizations.{attribute}".removeprefix(".")
                found[prefix + ORIGINAL] = prefix + MASK
    return found


@torch.no_grad()
def rounded(model: nn.Module, bits: int | Mapping[str, int], *, rounding: Rounding | None = None) -> nn.Module:
    """Returns a copy of a model with shared weights; bits as in `pack`."""
    model = copy.deepcopy(model)
    layers, how = prunable_layers(model), rounding or Rounding()
    for name, (codes, tables) in shared_values(layers, bits, **asdict(how)).items():
        layers[name].raw.copy_(looked_up(codes, tables))
    return model
