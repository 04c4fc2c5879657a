"""Plans: the removals of a shrunk model, as JSON; replayed on a freshly built model they give the same smaller one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from microglia.core.errors import FileError, MicrogliaError
from microglia.core.masks import bake
from microglia.core.shown import html_table
from microglia.graph.cutting.cut import by_group
from microglia.graph.cutting.graph_model import graph_model
from microglia.graph.cutting.hugging_face import set_fields
from microglia.graph.cutting.modules import cut_module
from microglia.graph.cutting.plan_check import check_form, check_names

PLAN = "microglia_plan"
"""Attribute of a shrunk model that holds its plan."""

Kind = Literal["module", "graph"]


@dataclass(frozen=True)
class Plan:
    """The removals from a model, with measurements.

    Attributes:
        kind: ``module``: the user's own classes, cut; ``graph``: the traced graph, because sizes are written into a forward.
        kept: Tensor name -> dimension -> kept indices; if the groups of a convolution keep different channels of a weight, a
            list for each remaining group.
        attributes: Module name -> attribute -> new value.
        biases: Linear layers and convolutions that got a bias for the constants of removed channels.
        graphs: Part of the model that became a graph (empty name: the model itself) -> shapes of its example inputs, to trace
            it again.
        dynamic: Free dimensions of the inputs.
        shapes: Tensor name -> (shape before, shape after).
        parameters: Number of parameters before and after.
        macs: Multiply-accumulates of the example batch, before and after.
        error: Maximum relative difference to the masked model at any node, in float64. Norms, softmax and other reductions of
            the masked model run over the kept entries; the notes name those in which zeros would count.
        found: Number of channel groups that could lose units.
        pruned: Number of channel groups that lost units.
        asked: The budget.
        got: Reached values of the budget.
        notes: Deviations from the request, with the reasons.
        config: Models of transformers within the model -> fields of their configurations -> new value; transformers cannot save
            other models.
        model: Class of the model that was cut; for a graph its origin.
    """

    kind: Kind
    kept: dict[str, dict[str, list[Any]]]
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    graphs: dict[str, Any] = field(default_factory=dict)
    dynamic: tuple[int, ...] = (0,)
    shapes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    error: float = 0.0
    found: int = 0
    pruned: int = 0
    asked: dict[str, float] = field(default_factory=dict)
    got: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: str = ""

    def __repr__(self) -> str:
        (before, after), (dense, left) = self.parameters, self.macs
        got = "".join(f", {name} {value:.4g}" for name, value in self.got.items())
        counts = f"{before:,} to {after:,} parameters, {dense:,} to {left:,} MACs"
        return f"Plan({self.kind}, {self.pruned} of {self.found} groups, {counts}{got}, error {self.error:.1e})"

    def _repr_html_(self) -> str:
        shapes = [(name, *(" x ".join(map(str, shape)) for shape in pair)) for name, pair in self.shapes.items()]
        return html_table(repr(self), ("tensor", "before", "after"), shapes, self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return asdict(self)

    @staticmethod
    def from_dict(source: Mapping[str, Any]) -> Plan:
        """Returns the plan that `to_dict` wrote.

        Raises:
            FileError: The value is not a plan.
        """
        if not isinstance(source, Mapping):
            raise FileError("The plan of the shrunk model is damaged: what was removed is no plan.")
        known = {f.name for f in fields(Plan)}
        if not isinstance(source.get("kept"), dict) or not {"kind", "kept"} <= source.keys() <= known:
            raise FileError("The plan of the shrunk model is not one that this version understands.")
        check_form(source)
        tuples = {k: tuple(source[k]) for k in ("biases", "dynamic", "parameters", "macs", "notes") if k in source}
        return Plan(**{**source, **tuples})


def plan_of(model: nn.Module) -> Plan:
    """Returns the plan of a shrunk model.

    Raises:
        MicrogliaError: The model was not shrunk.
    """
    plan = getattr(model, PLAN, None)
    if not isinstance(plan, Plan):
        raise MicrogliaError(f"This {type(model).__name__} was not shrunk: it carries no plan. See shrink and prune_channels.")
    return plan


def refuse_graph(model: nn.Module) -> None:
    """Raises if a model already became a graph: its parts are no longer the model's own."""
    first = getattr(model, PLAN, None)
    if isinstance(first, Plan) and first.graphs:
        raise MicrogliaError(
            "A model that came back as a graph cannot be shrunk again: cut the dense model once, by the whole budget, or with "
            "keep_class=True first."
        )


def after(model: nn.Module, second: Plan) -> Plan:
    """Returns the plan of a cut of this model; if the model was cut before, the plan of both cuts together."""
    first = getattr(model, PLAN, None)
    return compose(first, second) if isinstance(first, Plan) else second


def compose(first: Plan, second: Plan) -> Plan:
    """Returns the plan of two consecutive cuts, relative to the model before the first."""
    kept = {name: dict(by_dim) for name, by_dim in first.kept.items()}
    for name, by_dim in second.kept.items():
        own = kept.setdefault(name, {})
        left = range(first.shapes[name][1][0]) if name in first.shapes else []
        for dim, places in own.items():
            own[dim] = _of_groups(places, len(left), by_dim.get("0", left))
        for dim, stay in by_dim.items():
            own[dim] = _one_after_another(own[dim], stay) if dim in own else stay
    attributes = {**first.attributes}
    for path, values in second.attributes.items():
        attributes[path] = {**attributes.get(path, {}), **values}
    shapes = {**first.shapes, **{n: (first.shapes.get(n, (old,))[0], new) for n, (old, new) in second.shapes.items()}}
    return replace(
        second,
        kept=kept,
        attributes=attributes,
        biases=tuple(dict.fromkeys((*first.biases, *second.biases))),
        shapes=shapes,
        parameters=(first.parameters[0], second.parameters[1]),
        macs=(first.macs[0], second.macs[1]),
        error=max(first.error, second.error),
        config={path: {**first.config.get(path, {}), **fields} for path, fields in second.config.items()},
    )


def _of_groups(places: list[Any], rows: int, stay: Sequence[int]) -> list[Any]:
    """Returns the indices of the groups of a convolution with remaining rows of the weight."""
    if not by_group(places):
        return places
    return [places[group] for group in dict.fromkeys(i // (rows // len(places)) for i in stay)]


def _one_after_another(first: list[Any], second: list[Any]) -> list[Any]:
    """Returns the indices that two consecutive selections leave, each a list or a list for each group."""
    if by_group(first):
        each = second if by_group(second) else [second] * len(first)
        return [_one_after_another(one, other) for one, other in zip(first, each, strict=True)]
    return [_one_after_another(first, own) for own in second] if by_group(second) else [first[i] for i in second]


def attach(model: nn.Module, plan: Plan) -> nn.Module:
    """Records the plan on the model; returns the model."""
    object.__setattr__(model, PLAN, plan)
    return model


def replay(model: nn.Module, plan: Plan) -> nn.Module:
    """Returns a freshly built model cut by the plan; it keeps its fresh weights.

    Raises:
        FileError: The plan does not fit the model.
    """
    try:
        bake(model)
        give_biases(model, plan.biases)
        small = _replayed(model, plan)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise FileError(f"The plan does not fit this {type(model).__name__}: {error}") from error
    set_fields(small, plan.config)
    return attach(small, plan)


def _replayed(model: nn.Module, plan: Plan) -> nn.Module:
    small = cut_module(model, plan.kept, plan.attributes)
    for path, example in plan.graphs.items():
        whole = model.get_submodule(path)
        prefix = f"{path}." if path else ""
        kept = {name.removeprefix(prefix): by_dim for name, by_dim in plan.kept.items() if name.startswith(prefix)}
        check_names(example["kwargs"], whole)
        part = graph_model(whole, read_example(example, model), kept, plan.dynamic, (model, path))
        small = place(small, path, part)
    return small


def place(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """Returns the model with a part in place of its submodule, or the part itself if it is the whole model."""
    if not path:
        return part
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, part)
    return model


def give_biases(model: nn.Module, names: tuple[str, ...]) -> None:
    """Adds a zero bias to layers without one."""
    for name in names:
        layer: Any = model.get_submodule(name)
        if layer.bias is None:
            outputs = getattr(layer, "out_channels", None) or layer.out_features
            layer.bias = nn.Parameter(layer.weight.new_zeros(outputs))


# -------------------------------------------------------------------------------------------------------------- examples
def write_example(example: Any) -> Any:
    """Returns the shapes of example inputs, (args, kwargs), as JSON."""
    args, kwargs = example
    return {"args": [_write(v) for v in args], "kwargs": {k: _write(v) for k, v in kwargs.items()}}


def _write(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return [_write(v) for v in value]
    if isinstance(value, dict):
        return {"items": {k: _write(v) for k, v in value.items()}}
    return value


def read_example(written: Any, model: nn.Module) -> Any:
    """Returns inputs (args, kwargs) of the written shapes, all ones, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args = tuple(_read(v, device) for v in written["args"])
    kwargs = {k: _read(v, device) for k, v in written["kwargs"].items()}
    return args, kwargs


def _read(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict) and "shape" in value:
        return torch.ones(value["shape"], dtype=getattr(torch, value["dtype"]), device=device)
    if isinstance(value, dict):
        return {k: _read(v, device) for k, v in value["items"].items()}
    return [_read(v, device) for v in value] if isinstance(value, list) else value


def shapes(before: nn.Module, after: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
    """Returns the shape of every changed tensor before and after, under each of its names."""
    old, new = (
        {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers(remove_duplicate=False))}
        for m in (before, after)
    )
    return {
        name: (list(tensor.shape), list(new[name].shape))
        for name, tensor in old.items()
        if name in new and new[name].shape != tensor.shape
    }
