"""A table of the modules whose weights can be masked: their tensors, the layout of these, the meaning of their rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Kind:
    """The maskable weights of a class of modules.

    Attributes:
        weights: Their attributes, or globs of them, such as ``weight_ih_l*``.
        swapped: Whether a weight is laid out (in, out), as for y = x W, and not (out, in, *kernel).
        gates: Whether rows are gates of a unit, so that removing a row removes no output channel.
        inputs: Dimension of the input channels in the module's input; None if the weights read another tensor than that input.
    """

    weights: tuple[str, ...] = ("weight",)
    swapped: bool = False
    gates: bool = False
    inputs: int | None = 1


PRUNABLE: dict[type[nn.Module] | str, Kind] = {
    nn.Linear: Kind(inputs=-1),
    nn.Conv1d: Kind(),
    nn.Conv2d: Kind(),
    nn.Conv3d: Kind(),
    nn.MultiheadAttention: Kind(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), inputs=None),
    nn.RNNBase: Kind(("weight_ih_l*", "weight_hh_l*", "weight_hr_l*"), gates=True, inputs=None),
    nn.RNNCellBase: Kind(("weight_ih", "weight_hh"), gates=True, inputs=None),
    "transformers.Conv1D": Kind(swapped=True, inputs=-1),
}
"""Class -> its weights; a class of an optional library by package and name. The *prunable set* of the survey, section 0.2."""


def kind_of(module: nn.Module) -> Kind | None:
    """Returns a module's entry in the table, by its class or its nearest base class; None without an entry."""
    for base in type(module).__mro__:
        found = PRUNABLE.get(base) or PRUNABLE.get(f"{base.__module__.partition('.')[0]}.{base.__name__}")
        if found is not None:
            return found
    return None
