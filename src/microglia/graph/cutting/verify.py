"""Verification: compares the pruned graph with the masked model, node by node, in lockstep.

The comparison of every intermediate value finds mistakes whose effect on the output is 1e-9, and names the operator. Values are
dropped after their last use, so that it needs only the memory of two running models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from microglia.core.errors import MicrogliaError
from microglia.core.progress import progress_bar
from microglia.graph.cutting.cut import Cut
from microglia.graph.cutting.reference import MissingReference, Reference
from microglia.graph.cutting.surgery import patched
from microglia.graph.dims.nodes import operator_name
from microglia.graph.dims.trace import copied


class ShrinkError(MicrogliaError):
    """A model that cannot be shrunk as requested; the text names the operator or the group."""


@dataclass(frozen=True)
class Verification:
    """The result of the comparison.

    Attributes:
        error: Maximum difference at any node, relative to the largest value there.
        node: Node of this difference.
        module: Module of this node.
        outputs: Outputs of the pruned graph, flat.
        nodes: Number of compared values.
        left_out: Operators, by module, whose result zeroed entries would change: a norm, a softmax, a sum of nonzero values.
            There the reference runs over the kept entries.
    """

    error: float
    node: str
    module: str
    outputs: tuple[Any, ...]
    nodes: int
    left_out: tuple[str, ...] = ()


@torch.no_grad()
def verify(cut: Cut, inputs: Sequence[Any] | None = None, tolerance: float = 1e-10) -> Verification:
    """Runs masked reference and pruned graph together and compares the kept entries of every value.

    Args:
        cut: The cut.
        inputs: Flat inputs; by default those of the trace.
        tolerance: Maximum relative difference; 1e-10 suits float64, 1e-4 float32.

    Raises:
        ShrinkError: A value differs because a rule is wrong; the text names the first such node.
    """
    run = _Lockstep(cut, tuple(cut.analysis.trace.example if inputs is None else inputs), tolerance)
    with progress_bar("verify", len(run.copied)) as bar:
        return run.result(bar.advance)


@torch.no_grad()
def run_patched(cut: Cut) -> Verification:
    """Runs only the pruned graph on the traced inputs, without a comparison."""
    lockstep = _Lockstep(cut, cut.analysis.trace.example, math.inf)
    lockstep.alone = True
    return lockstep.result()


class _Lockstep:
    def __init__(self, cut: Cut, inputs: tuple[Any, ...], tolerance: float) -> None:
        self.cut, self.trace, self.tolerance = cut, cut.analysis.trace, tolerance
        self.reference = Reference(cut)
        self.alone = False
        _, self.copies = patched(cut)
        self.originals = {copy: node for node, copy in self.copies.items()}
        self.inputs = dict(zip(self.trace.inputs, inputs, strict=True))
        self.wanted: dict[fx.Node, Any] = {}
        self.got: dict[fx.Node, Any] = {}
        self.placed: set[fx.Node] = set()
        self.worst, self.where, self.compared = 0.0, "", 0
        self.left_out: dict[str, None] = {}
        self.last_use = {source: node for node in self.trace.graph.nodes for source in node.all_input_nodes}
        self.copied = list(next(iter(self.copies.values())).graph.nodes)
        self.extra_use = {source: copy for copy in self.copied for source in copy.all_input_nodes}

    def result(self, each: Callable[[], None] = lambda: None) -> Verification:
        """Returns the comparison; ``each`` is called after every node."""
        outputs: tuple[Any, ...] = ()
        for copy in self.copied:
            node = self.originals.get(copy)
            if copy.op != "placeholder":
                self._place_inputs(node, copy)
            if copy.op == "output":
                outputs = tuple(fx.node.map_arg(copy.args[0], self.got.__getitem__))  # type: ignore[arg-type]
            elif copy.op != "placeholder":
                self._step(node, copy)
            each()
        return Verification(self.worst, self.where, self._module(self.where), outputs, self.compared, tuple(self.left_out))

    def _place_inputs(self, node: fx.Node | None, copy: fx.Node) -> None:
        """Makes the model's inputs and tensors that an operator is the first to read.

        Memory of a tensor that was dropped after its last use is used again: fresh memory takes more time than the copy.
        """
        own = [self.originals[c] for c in copy.all_input_nodes if c in self.originals]
        for source in own if node is None else node.all_input_nodes:
            if source.op == "placeholder" and source not in self.placed:
                self.placed.add(source)
                self._place(source, self.copies[source])

    def _place(self, node: fx.Node, copy: fx.Node) -> None:
        name = self.trace.name_of.get(node.name)
        if name is None:
            self.wanted[node], self.got[copy] = copied(self.inputs[node.name]), copied(self.inputs[node.name])
            return
        tensor = self.trace.tensors[name].detach()
        self.got[copy] = self.cut.slice(name, tensor)
        if self.got[copy] is tensor:  # an operator may overwrite it
            self.got[copy] = tensor.clone()
        if not self.alone:
            self.wanted[node] = self.cut.zero(name, tensor)

    def _step(self, node: fx.Node | None, copy: fx.Node) -> None:
        try:
            arguments = fx.node.map_arg(copy.args, self.got.__getitem__)
            self.got[copy] = copy.target(*arguments, **fx.node.map_arg(copy.kwargs, self.got.__getitem__))  # type: ignore[operator]
        except (RuntimeError, ValueError, IndexError) as error:
            raise ShrinkError(f"{copy.name} does not run after the cut ({self._module(copy.name)}): {error}") from error
        if node is not None and not self.alone:
            try:
                self.wanted[node] = self.reference.run(node, self.wanted)
            except MissingReference as error:
                raise ShrinkError(f"The cut cannot be verified: {error}.") from error
            if node in self.reference.reduced_nodes and self._zeros_count(node):
                self.left_out[f"{operator_name(node)} {self._module(node.name)}"] = None
            if _is_arbitrary(node):  # random or uninitialized: both models continue with the same values
                self.got[copy] = copied(self._kept(node, self.wanted[node]))
            self._compare(node, self.wanted[node], self.got[copy])
            self._drop(self.wanted, self.last_use, node)
        self._drop(self.got, self.extra_use, copy)

    def _zeros_count(self, node: fx.Node) -> bool:
        """Tells whether a reduction over kept entries differs from one over all entries with zeroed parameters."""
        pairs = zip(_tensors(self.reference.with_zeros(node, self.wanted)), _tensors(self.wanted[node]), strict=True)
        return any(difference(self._kept(node, zeros), self._kept(node, wanted)) > _ALIKE for zeros, wanted in pairs)

    def _drop(self, values: dict[fx.Node, Any], last: dict[fx.Node, fx.Node], node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if last.get(source) is node:
                values.pop(source, None)

    def _kept(self, node: fx.Node, value: Any) -> Any:
        """Returns the kept entries of a node's value."""
        if not isinstance(value, Tensor):
            return value
        dims = self.cut.analysis.dims[node]
        for k, dim in enumerate(dims[0] if dims and isinstance(dims[0], list) else dims):  # one of several similar values
            if self.cut.changes(dim):
                value = value.index_select(k, self.cut.mask(dim).nonzero()[:, 0].to(value.device))
        return value

    def _compare(self, node: fx.Node, wanted: Any, got: Any) -> None:
        if not isinstance(wanted, Tensor):
            return
        wanted = self._kept(node, wanted)
        self.compared += 1
        if wanted.shape != got.shape:
            shapes = f"{tuple(got.shape)} instead of {tuple(wanted.shape)}"
            raise ShrinkError(f"{node.name} has shape {shapes} after the cut ({self._module(node.name)}).")
        error = difference(got, wanted)
        if error > self.worst:
            self.worst, self.where = error, node.name
        if error > self.tolerance:
            raise ShrinkError(
                f"The pruned model would differ from the masked one by {error:.1e} at {node.name} "
                f"({self._module(node.name)}); nothing was returned. Exclude this layer's groups, and report it."
            )

    def _module(self, name: str) -> str:
        for node in self.trace.graph.nodes:
            if node.name == name:
                stack = list((node.meta.get("nn_module_stack") or {}).values())
                return f"in {stack[-1][0] or 'the model'}" if stack else "in the model"
        return "in the model"


_ALIKE = 1e-9
"""Relative difference up to which two values of one reduction count as equal."""


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [v for v in value if isinstance(v, Tensor)]


_ARBITRARY = (
    "empty", "empty_like", "new_empty", "rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "bernoulli",
    "normal", "uniform", "exponential",
)  # fmt: skip
"""Operators whose values are random or uninitialized in each call."""


def _is_arbitrary(node: fx.Node) -> bool:
    return operator_name(node).rstrip("_") in _ARBITRARY


def difference(got: Tensor, wanted: Tensor) -> float:
    """Returns the maximum difference of finite entries, relative to the largest; 1.0 if other properties differ."""
    if not wanted.is_floating_point() or not wanted.numel():
        return 0.0 if torch.equal(got, wanted) else 1.0
    error, largest = _largest(got - wanted), _largest(wanted)
    if math.isfinite(error) and math.isfinite(largest):
        return error / max(largest, 1e-30)
    finite = torch.isfinite(wanted)  # masks hold -inf
    if not torch.equal(finite, torch.isfinite(got)):
        return 1.0
    if not bool(finite.any()):
        return 0.0
    return float((got - wanted)[finite].abs().max()) / max(float(wanted[finite].abs().max()), 1e-30)


def _largest(value: Tensor) -> float:
    """Returns the largest absolute entry in one pass; NaN if any entry is NaN."""
    low, high = value.aminmax()
    return max(-float(low), float(high))
