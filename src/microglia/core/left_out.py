"""Warnings about weights that a choice of layers leaves out: the density then holds for fewer weights than expected."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn.utils import parametrize

from microglia.core.auxiliary import auxiliary_paths, is_auxiliary
from microglia.core.errors import SelectorError
from microglia.core.layers import Layer, check_selectors, matches, prunable_layers

MATRIX = 2
"""Minimum number of dimensions of a weight; biases and the scales of norms have one."""
SHOWN = 6
TIED: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)
"""Modules whose weights are looked up by row. An output layer that shares such a weight stays dense unless it is named."""


def chosen_layers(model: nn.Module, layers: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> dict[str, Layer]:
    """Returns the layers that a mask method works on: the selected layers, without those tied to an embedding.

    Masking the output layer of a language model would mask its token embedding too. A selector that matches only tied layers,
    such as ``lm_head``, selects them on purpose. A selector may also name a weight that cannot be masked.

    Args:
        model: Any module, masked or not.
        layers: Selectors of the layers to take (see `microglia.core.layers.matches`).
        exclude: Selectors of the layers to leave out.

    Raises:
        SelectorError: A selector matches no layer of this model, or no layer remains.
    """
    everything = prunable_layers(model)
    reaching = [s for s in exclude if s == "*" or _meets(s, everything)]
    taken = [s for s in layers if not s.startswith("!") or s == "!*" or _meets(s, everything)]
    if len(reaching) < len(exclude) or len(taken) < len(layers):
        unreachable = {name: Layer(name, ((module, name.rpartition(".")[2]),)) for name, module, _ in unmaskable(model)}
        check_selectors({**everything, **unreachable}, [*exclude, *(s for s in layers if s.startswith("!"))])
    chosen = prunable_layers(model, taken, reaching)
    tied = set(tied_layers(chosen))
    named = {n for s in layers if not s.startswith("!") and s != "*" and (met := _met(s, everything)) <= tied for n in met}
    left = {name: layer for name, layer in chosen.items() if name not in tied or name in named}
    if not left:
        raise SelectorError(
            f"No layer is left to prune: {_names(sorted(tied))} shares its weight with an embedding; name it in layers= to "
            "prune both on purpose."
        )
    return left


def unmaskable(model: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Returns (name, module, weights) of every weight matrix that no mask reaches, except embeddings, norms, auxiliary parts.

    Examples: transposed convolutions, bilinear layers, layers under ``weight_norm`` or ``torch.nn.utils.prune``.
    """
    reached = {id(layer.raw) for layer in prunable_layers(model).values()}
    found, auxiliary = [], auxiliary_paths(model)
    for path, module in model.named_modules():
        if isinstance(module, (*TIED, parametrize.ParametrizationList)) or ".parametrizations." in f".{path}.":
            continue
        if is_auxiliary(path, auxiliary):
            continue
        found += [(f"{path}.{n}".removeprefix("."), module, size) for n, size in _matrices(module, reached)]
    return found


def announce(model: nn.Module, layers: Mapping[str, Layer], chosen: Sequence[str], exclude: Sequence[str]) -> None:
    """Warns once, by name, about selected weights that no mask reaches, and about tied embeddings."""
    left = [
        (name, size)
        for name, module, size in unmaskable(model)
        if matches(name, module, chosen) and not (exclude and matches(name, module, exclude))
    ]
    if left:
        size, total = sum(s for _, s in left), sum(layer.raw.numel() for layer in layers.values())
        warnings.warn(
            f"No mask reaches {_names(n for n, _ in left)} ({size:,} of {size + total:,} weights), so they are left out, and "
            "the density holds for the others: remove weight_norm or torch.nn.utils.prune first, or exclude these by name.",
            stacklevel=4,
        )
    meant = {name: layer for name, layer in prunable_layers(model).items() if matches(name, layer.module, chosen)}
    excluded = {name for name, layer in meant.items() if exclude and matches(name, layer.module, exclude)}
    if tied := [name for name in tied_layers(meant) if name not in layers and name not in excluded]:
        warnings.warn(
            f"An embedding shares the weight of {_names(tied)}, so it is left out: name it in layers= to prune both, or in "
            "exclude= to hide this warning.",
            stacklevel=4,
        )


def _matrices(module: nn.Module, reached: set[int]) -> list[tuple[str, int]]:
    """Returns (attribute, weights) of a module's own matrices that no mask reaches."""
    own = {n: p for n, p in module._parameters.items() if p is not None}
    found = []
    for name, parameter in own.items():
        if id(parameter) in reached or parameter.ndim < MATRIX or parameter.shape[0] == 1:
            continue
        if name.endswith("_g") and f"{name[:-2]}_v" in own:  # the lengths that old weight_norm stores beside the directions
            continue
        found.append((_plain_name(module, name), parameter.numel()))
    if parametrize.is_parametrized(module):
        lists = module.parametrizations.items()  # type: ignore[union-attr,operator]
        found += [(n, getattr(module, n).numel()) for n, below in lists if not hasattr(below, "original")]
    return found


def _plain_name(module: nn.Module, name: str) -> str:
    """Returns the attribute behind a tensor: old weight_norm stores it as _g and _v, torch's pruning as _orig."""
    if name.endswith("_v") and f"{name[:-2]}_g" in module._parameters:
        return name[:-2]
    return name.removesuffix("_orig") if f"{name.removesuffix('_orig')}_mask" in module._buffers else name


def _meets(selector: str, layers: Mapping[str, Layer]) -> bool:
    return bool(_met(selector.removeprefix("!"), layers))


def _met(selector: str, layers: Mapping[str, Layer]) -> set[str]:
    return {name for name, layer in layers.items() if matches(name, layer.module, [selector])}


def tied_layers(layers: Mapping[str, Layer]) -> list[str]:
    """Returns the names of the layers that share their weight with an embedding."""
    return [n for n, layer in layers.items() if any(isinstance(m, TIED) for m, _ in layer.holders)]


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    more = f", ... ({len(listed)} in all)" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
