"""`permute_channels`: the same network with channels reordered so that blocks keep more of its weights.

The order of channels is arbitrary: a permutation of a group of coupled channels, in all tensors that hold them, does not change
the function. It is a cut that keeps every channel in another order, so the same surgery makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError, MicrogliaError, PatternError
from microglia.core.layers import oriented, prunable_layers
from microglia.core.masks import masks_of
from microglia.core.patterns import Block, Pattern
from microglia.graph.channels.groups import ChannelGroup
from microglia.graph.cutting.modules import cut_module
from microglia.graph.cutting.parts import Part
from microglia.graph.cutting.remove import EXACT, SINGLE, Subject, noise, outputs_difference, outputs_of
from microglia.graph.cutting.verify import ShrinkError
from microglia.graph.order.order_search import Stripes, best_mass, find_order
from microglia.graph.order.permutable import movable, shared_dims, stripes, tensor_orders, tensors_of, unmoved
from microglia.storage.changes import Change, register_change

PERMUTATION = "microglia_permutation"
"""Attribute of a permuted model that holds its `Permutation`."""
PASSES = 3
"""Number of passes over groups if layers hold channels of several groups, because gains depend on each other."""


@dataclass(frozen=True)
class LayerMass:
    """Score of one layer.

    Attributes:
        density: Fraction of the weights that the blocks keep.
        total: Score of all weights.
        before: Score of the weights that the best blocks keep, in the original order.
        after: The same, permuted.
    """

    density: float
    total: float
    before: float
    after: float


@dataclass(frozen=True)
class Permutation:
    """The permutation of a model, and its gain.

    Attributes:
        layers: Score kept in each layer that the pattern divides.
        orders: Tensor name -> dimension -> the old index at each new one.
        left: Layers whose output channels stay in place -> the reason.
        error: Maximum relative difference of the outputs, in float64.
    """

    layers: dict[str, LayerMass]
    orders: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    error: float = 0.0

    @property
    def before(self) -> float:
        """Fraction of the score that blocks keep over all layers, in the original order."""
        return sum(m.before for m in self.layers.values()) / max(1e-30, sum(m.total for m in self.layers.values()))

    @property
    def after(self) -> float:
        """The same, permuted."""
        return sum(m.after for m in self.layers.values()) / max(1e-30, sum(m.total for m in self.layers.values()))

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary, JSON-ready, without the orders, which are visible in the weights."""
        told = {k: v for k, v in asdict(self).items() if k != "orders"}
        return {"before": self.before, "after": self.after, **told}

    @staticmethod
    def from_dict(source: Mapping[str, Any]) -> Permutation:
        """Returns the permutation that `to_dict` wrote, without the orders.

        Raises:
            TypeError, KeyError, ValueError: The value is malformed.
        """
        layers = {str(name): LayerMass(**{k: float(v) for k, v in mass.items()}) for name, mass in source["layers"].items()}
        left = {str(name): str(reason) for name, reason in source["left"].items()}
        return Permutation(layers, left=left, error=float(source["error"]))


def permutation_of(model: nn.Module) -> Permutation:
    """Returns the permutation that `permute_channels` made of a model.

    Raises:
        MicrogliaError: The model was not permuted.
    """
    found = getattr(model, PERMUTATION, None)
    if not isinstance(found, Permutation):
        raise MicrogliaError(f"This {type(model).__name__} was not permuted. See permute_channels.")
    return found


def check_permutable(pattern: Pattern, model: nn.Module, example_inputs: Any) -> None:
    """Raises unless the order of channels matters for a pattern, and the model can be traced.

    Raises:
        PatternError: The order of channels does not matter for the pattern.
        TraceError: The model cannot be traced.
    """
    _block(pattern)
    Subject.of(model, example_inputs)


def _block(pattern: Pattern) -> Block:
    if isinstance(pattern, Block) and max(pattern.out, pattern.in_) > 1:
        return pattern
    raise PatternError(
        f"Channels are permuted for blocks of several, such as block:16x1; {pattern} does not ask which are neighbours, or "
        "in another way. Leave permute out, or take a block."
    )


def permute_channels(
    model: nn.Module,
    example_inputs: Any,
    pattern: Pattern = Block(16, 1),  # noqa: B008 # a frozen value
    *,
    density: float | Mapping[str, float],
    score: Mapping[str, Tensor] | None = None,
    layers: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    starts: int = 1,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Returns an equal model with its channels reordered so that blocks keep more score.

    The objective is the score in the blocks that each layer keeps by itself (scope ``layer``): those with the best mean score.
    The search for a group's order uses the sum over all layers that hold its channels, because a residual stream has one order
    in many layers. Layers do not compete, so the sum over the model never falls. For another scope give its densities by layer.
    For blocks of one input only the order of outputs matters; for wider blocks columns are ordered too. Channels that cannot
    move, such as the classes of a classifier, stay; `permutation_of` gives the reasons.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> same = permute_channels(model, torch.zeros(1, 8), Block(4, 1), density=0.3)
        >>> permutation_of(same).after > permutation_of(same).before
        True

    Args:
        model: Any model that `torch.export` can trace; it stays unchanged.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        pattern: The block.
        density: Fraction of the weights kept in each layer, or by layer name; other layers do not count.
        score: One value per weight by layer name, not negative; by default the magnitude.
        layers: Selectors of the layers that count; all coupled ones are permuted with them.
        exclude: Selectors of layers that do not count.
        starts: Number of initial orders of each search: the current one, then random ones.
        generator: Draws the random orders; by default seeded with 0.

    Returns:
        The permuted model, of the same class and in the same mode, carrying its `Permutation`.

    Raises:
        PatternError: The order of channels does not matter for the pattern.
        ShrinkError: The permuted model's outputs would differ; nothing is returned.
        TraceError: The model cannot be traced.
    """
    block = _block(pattern)
    if masks_of(model):
        raise MicrogliaError("Channels are permuted before masks are attached; fold the masks into the weights first.")
    weights = prunable_layers(model, layers, exclude)
    scores = {n: (score[n] if score is not None else w.weight).detach().abs().float().cpu() for n, w in weights.items()}
    scores = oriented(weights, scores)
    keep = {
        n: round(_density(density, n) * scores[n].numel()) for n in scores if not isinstance(density, Mapping) or n in density
    }
    search = _Search(Subject.of(model, example_inputs), block, scores, keep)
    search.run(generator or torch.Generator().manual_seed(0), starts)
    return search.result()


def _density(density: float | Mapping[str, float], name: str) -> float:
    value = density[name] if isinstance(density, Mapping) else density
    if not 0 <= value <= 1:
        raise BudgetError(f"A density is a fraction in [0, 1]; got {value} for {name}.")
    return value


class _Search:
    """Searches orders of a model's groups one by one, with the others fixed."""

    def __init__(self, subject: Subject, block: Block, scores: Mapping[str, Tensor], keep: Mapping[str, int]) -> None:
        self.subject, self.block, self.scores, self.keep = subject, block, scores, keep
        found = [(part, group, why) for part in subject.parts for group, why in movable(part)]
        self.free = [(part, group) for part, group, why in found if not why]
        self.held = {group.atom: why for _, group, why in found if why}
        self.orders: dict[int, Tensor] = {}
        self.notes: dict[int, str] = {}

    def run(self, generator: torch.Generator, starts: int) -> None:
        """Finds orders, in several passes if layers hold channels of several groups."""
        due = self.free
        for _ in range(PASSES):
            changed = set()
            for part, group in due:
                layers = [s for name in tensors_of(part, group) if name in self.keep for s in self._stripes(part, group, name)]
                if not layers:
                    continue
                order = find_order(layers, generator, starts)
                if not torch.equal(order, torch.arange(group.size)):
                    self.orders[group.atom] = self.orders.get(group.atom, torch.arange(group.size))[order]
                    changed.add(group.atom)
            layered = {group.atom: set(shared_dims(part, group, self.block)) for part, group in due}
            moved = {place: {a for a in changed if place in layered[a]} for places in layered.values() for place in places}
            due = [(part, g) for part, g in due if any(moved[place] - {g.atom} for place in layered[g.atom])]

    def _stripes(self, part: Part, group: ChannelGroup, name: str) -> list[Stripes]:
        score = self._ordered(part, name, self.orders)
        return stripes(part, group, self.block, name, score=score, keep=self.keep[name])

    def _ordered(self, part: Part, name: str, orders: Mapping[int, Tensor]) -> Tensor:
        score = self.scores[name]
        for k, dim in enumerate(part.dims_of(name)):
            score = score.index_select(k, part.analysis.algebra.order(dim, orders))
        return score

    def result(self) -> nn.Module:
        """Returns the permuted model, without orders that would change its outputs."""
        permuted, error = self._verified()
        masses = self._masses()
        if sum(m.after for m in masses.values()) < sum(m.before for m in masses.values()):  # only if some orders were left out
            self.orders.clear()
            permuted, error = self._permuted(self.orders), 0.0
            masses = self._masses()
        left = {name: why for part in self.subject.parts for name, why in self._left(part).items()}
        found = Permutation(masses, self._named(self.orders), left, error)
        return _note(permuted, found)

    def _verified(self) -> tuple[nn.Module, float]:
        permuted = self._permuted(self.orders)
        error, limit = self._error(permuted), self._limit()
        if error <= limit:
            return permuted, error
        for atom in list(self.orders):
            one = self._error(self._permuted({atom: self.orders[atom]}))
            if one > limit:
                self.notes[atom] = f"in another order the outputs would differ by {one:.1e}"
                del self.orders[atom]
        permuted = self._permuted(self.orders)
        if (error := self._error(permuted)) > limit:
            raise ShrinkError(f"The permuted model would differ from the given one by {error:.1e}; nothing was returned.")
        return permuted, error

    def _limit(self) -> float:
        return SINGLE / 10 if any(part.narrow for part in self.subject.parts) else EXACT

    def _named(self, orders: Mapping[int, Tensor]) -> dict[str, dict[str, list[int]]]:
        return {name: by_dim for part in self.subject.parts for name, by_dim in tensor_orders(part, orders).items()}

    def _permuted(self, orders: Mapping[int, Tensor]) -> nn.Module:
        return cut_module(self.subject.model, self._named(orders), {})

    def _error(self, permuted: nn.Module) -> float:
        """Returns the maximum difference of the parts' outputs, in float64, on the example and on random inputs."""
        worst = 0.0
        for part in self.subject.parts:
            trace, generator = part.analysis.trace, torch.Generator().manual_seed(0)
            for given in (trace.example, tuple(noise(v, generator) for v in trace.example)):
                wanted = outputs_of(part.module, trace, given)
                got = outputs_of(permuted.get_submodule(part.path), trace, given)
                worst = max(worst, outputs_difference(got, wanted))
        return worst

    def _masses(self) -> dict[str, LayerMass]:
        found = {}
        for name, keep in self.keep.items():
            part = next((p for p in self.subject.parts if any(p.name(n) == name for n in p.analysis.parameter_dims)), None)
            before, total = self.scores[name], float(self.scores[name].sum(dtype=torch.float64))
            after = before if part is None else self._ordered(part, name, self.orders)
            kept = (best_mass(self.block, values, keep) for values in (before, after))
            found[name] = LayerMass(keep / before.numel(), total, *kept)
        return found

    def _left(self, part: Part) -> dict[str, str]:
        moved = set(self.orders)
        reasons = self.held | self.notes
        return unmoved(part, [n for n in self.keep if len(self.scores[n]) > self.block.out], moved, reasons)


def _note(model: nn.Module, permutation: Permutation) -> nn.Module:
    """Records the permutation on a model; the order itself is in the weights."""
    object.__setattr__(model, PERMUTATION, permutation)
    return model


register_change(
    "permuted",
    Change(
        of=lambda model: getattr(model, PERMUTATION, None),
        encode=Permutation.to_dict,
        decode=lambda written, state: Permutation.from_dict(written),
        replay=_note,
        binds=False,
    ),
)
