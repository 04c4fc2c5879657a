"""The state of a packed file, decoded on request, and its loading into a model one tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from microglia.compress.container import Container
from microglia.compress.tensors import DTYPES
from microglia.core.restore import match_masks, restore

MASK = ".mask"


class Stored(Mapping[str, Tensor]):
    """The tensors of an open packed file by their names in the model's state, masks too; each is decoded when it is read.

    Args:
        container: An open packed file.
    """

    def __init__(self, container: Container) -> None:
        self.container = container
        self.masks = {row["mask"]: name for name, row in container.rows.items() if "mask" in row}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.masks:
            return self.container.decoded(self.masks[name])[1]
        if name not in self.container.rows:
            raise KeyError(name)
        return self.container.decoded(name)[0]

    def __iter__(self) -> Iterator[str]:
        for name, row in self.container.rows.items():
            yield name
            if "mask" in row:
                yield row["mask"]

    def __len__(self) -> int:
        return len(self.container.rows) + len(self.masks)

    def outline(self) -> dict[str, Tensor]:
        """Returns tensors of the same names, shapes and kinds of numbers that take no memory; booleans are true."""
        rows = self.container.rows
        found: dict[str, Tensor] = {}
        for name in self:
            row = rows[self.masks.get(name, name)]
            row = rows[row["of"]] if row["form"] == "same" else row
            dtype = torch.bool if name in self.masks else DTYPES[row["dtype"]]
            if dtype == torch.bool:  # it may be a mask, which is attached before it is filled
                found[name] = torch.ones((), dtype=dtype).expand(row["shape"])
            else:
                found[name] = torch.empty(row["shape"], dtype=dtype, device="meta")
        return found


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Loads a packed file into a model, one tensor at a time, and returns it, changed in place.

    Args:
        model: A model with the changes of the file, but for masks.
        state: A `Stored` state; any other one, and one that the model does not take name by name, is loaded as a whole.

    Raises:
        RuntimeError: The state does not fit the model.
    """
    if not isinstance(state, Stored):
        return restore(model, state)
    outline = state.outline()
    if _own_loading(model) or _several_masks(outline):
        return restore(model, state)
    match_masks(model, outline)
    places = _places(model, outline)
    if places is None:
        return restore(model, state)
    for name, row in state.container.rows.items():
        if row["form"] != "same":
            _fill_one(state.container, name, places)
    return model


@torch.no_grad()
def _fill_one(container: Container, name: str, places: Mapping[str, Tensor]) -> None:
    """Decodes one tensor into all its places in the model."""
    tensor, kept = container.decoded(name)
    for other, row in container.rows.items():
        if other == name or row.get("of") == name:
            places[other].copy_(tensor)
            if "mask" in row:
                places[row["mask"]].copy_(kept)


def _own_loading(model: nn.Module) -> bool:
    """Tells whether a module of a model loads its state in another way than torch's own modules."""
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or not type(module)._load_from_state_dict.__module__.startswith("torch.nn.")
        for module in model.modules()
    )


def _several_masks(outline: Mapping[str, Tensor]) -> bool:
    """Tells whether a tensor has two masks, one in a parametrization of the user's own, which values alone tell apart."""
    found = Counter(name.removesuffix(MASK).rpartition(".")[0] for name in outline if name.endswith(MASK))
    return any(count > 1 for count in found.values())


def _places(model: nn.Module, outline: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Returns the model's own tensors by name, or None unless they are those of the state in name, shape and kind."""
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    names = model.state_dict().keys()
    if names != outline.keys() or not names <= own.keys():
        return None
    same = all(own[name].shape == one.shape and own[name].dtype == one.dtype for name, one in outline.items())
    return {name: own[name] for name in outline} if same else None
