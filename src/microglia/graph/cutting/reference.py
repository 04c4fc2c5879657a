"""The reference: the values of the masked model, with which every value of the pruned graph is compared.

The unpruned graph runs on parameters whose removed entries are zero. For reductions over a pruned dimension (a norm, a mean, a
softmax) zero differs from absent: these run over the kept entries only. A zero can also make a value undefined, as a divisor
does, and no zeroed weight removes NaN again; so removed entries that are not finite are set to zero. Other activations are
never masked; otherwise the analysis would verify itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from microglia.graph.cutting.cut import Cut
from microglia.graph.dims.nodes import named_arguments, operator_name
from microglia.graph.dims.trace import copied

Handler = Callable[["Reference", fx.Node, dict[str, Any]], Any]

HANDLERS: dict[str, Handler] = {}
"""Operator -> its reduction over kept entries only; returns None if no reduced dimension is pruned."""


class MissingReference(Exception):
    """A reduction over a pruned dimension without a reference: it cannot be verified."""


def handler(*names: str) -> Callable[[Handler], Handler]:
    """Registers an operator's reduction over kept entries."""

    def register(function: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = function
        return function

    return register


class Reference:
    """Runs nodes of the unpruned graph on zeroed parameters."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.reduced_nodes: set[fx.Node] = set()
        """Nodes that so far ran over the kept entries only."""

    def walk(self, inputs: Sequence[Any]) -> Iterator[tuple[fx.Node, Any]]:
        """Yields every operator of the graph with its value, and the output node with the flat outputs.

        Args:
            inputs: The model's own inputs, flat. Values are dropped after their last use; the caller must copy values that
                in-place operators may change.
        """
        trace = self.cut.analysis.trace
        given = dict(zip(trace.inputs, map(copied, inputs), strict=True))
        last = {source: node for node in trace.graph.nodes for source in node.all_input_nodes}
        values: dict[fx.Node, Any] = {}
        for node in trace.graph.nodes:
            if node.op == "placeholder":
                name = trace.name_of.get(node.name)
                values[node] = given[node.name] if name is None else self.cut.zero(name, trace.tensors[name])
            elif node.op == "output":
                yield node, tuple(fx.node.map_arg(node.args[0], values.__getitem__))
            else:
                values[node] = self.run(node, values)
            if node in values:
                yield node, values[node]
            for source in node.all_input_nodes:
                if last[source] is node:
                    values.pop(source, None)

    def run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Returns a node's value from the values of its inputs."""
        return self._defined(node, self._value(node, values))

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if isinstance(node.target, torch._ops.OpOverload) and (found := HANDLERS.get(operator_name(node))):
            a = {key: fx.node.map_arg(v, values.__getitem__) for key, v in named_arguments(node).items()}
            result = found(self, node, a)
            if result is not None:
                self.reduced_nodes.add(node)
                return result
        return self.with_zeros(node, values)

    def with_zeros(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Returns a node's value computed with zeroed parameters, removed entries included."""
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _defined(self, node: fx.Node, value: Any) -> Any:
        """Returns a value in which removed entries that are not finite (x / 0, or its sine) are zero."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
            return value
        mask = self.over(node, range(value.dim()))
        if mask is None or math.isfinite(float(value.sum())):  # one pass; an overflow of the sum is handled below
            return value
        undefined = ~(value.isfinite() | mask.to(value.device))
        return value.masked_fill_(undefined, 0) if _writes(node) else value.masked_fill(undefined, 0)

    def over(self, node: Any, dims: Iterable[int]) -> Tensor | None:
        """Returns the mask of some dimensions of a node's value, shaped for broadcasting; None if all entries are kept."""
        own = self.cut.analysis.dims[node]
        out: Tensor | None = None
        for k in {k % len(own) for k in dims}:
            if self.cut.changes(own[k]):
                mask = self.cut.mask(own[k]).view([-1 if i == k else 1 for i in range(len(own))])
                out = mask if out is None else out & mask
        return out

    def reduced(self, node: fx.Node, a: dict[str, Any]) -> tuple[list[int], Tensor | None]:
        """Returns (dimensions of a reduction, their mask)."""
        rank = len(self.cut.analysis.dims[node.args[0]])  # type: ignore[index]
        dims = a.get("dim")
        dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        return dims, self.over(node.args[0], dims)


def _writes(node: fx.Node) -> bool:
    """Tells whether an operator works in place, so that views of its input hold its result too."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _moments(x: Tensor, mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean, biased variance and count over the kept entries, dimensions kept."""
    w = mask.expand_as(x).to(x.dtype)
    count = w.sum(dims, keepdim=True).clamp_min(1)
    mean = (x * w).sum(dims, keepdim=True) / count
    return mean, ((x - mean).square() * w).sum(dims, keepdim=True) / count, count


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    x = x if weight is None else x * weight.view(*shape)
    return x if bias is None else x + bias.view(*shape)


@handler("layer_norm")
def _layer_norm(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    dims = list(range(-len(a["normalized_shape"]), 0))
    if (mask := r.over(n.args[0], dims)) is None:
        return None
    mean, variance, _ = _moments(a["input"], mask, dims)
    return _affine((a["input"] - mean) / torch.sqrt(variance + a["eps"]), a["weight"], a["bias"], a["normalized_shape"])


@handler("rms_norm", "_fused_rms_norm")
def _rms_norm(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    dims = list(range(-len(a["normalized_shape"]), 0))
    if (mask := r.over(n.args[0], dims)) is None:
        return None
    x = a["input"]
    eps = torch.finfo(x.dtype).eps if a["eps"] is None else a["eps"]
    w = mask.expand_as(x).to(x.dtype)
    square = (x.square() * w).sum(dims, keepdim=True) / w.sum(dims, keepdim=True).clamp_min(1)
    y = _affine(x * torch.rsqrt(square + eps), a["weight"], None, a["normalized_shape"])
    return (y, torch.rsqrt(square + eps)) if operator_name(n) == "_fused_rms_norm" else y


@handler("group_norm")
def _group_norm(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    x = a["input"]
    if (mask := r.over(n.args[0], range(1, x.dim()))) is None:
        return None
    grouped = (x.shape[0], a["num_groups"], -1)
    mean, variance, _ = _moments(x.reshape(grouped), mask.expand_as(x).reshape(grouped), [2])
    y = ((x.reshape(grouped) - mean) / torch.sqrt(variance + a["eps"])).reshape(x.shape)
    return _affine(y, a["weight"], a["bias"], [1, -1] + [1] * (x.dim() - 2))


@handler("batch_norm", "instance_norm")
def _batch_norm(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    x, whole = a["input"], "training" in a
    dims = [0, *range(2, x.dim())] if whole else list(range(2, x.dim()))
    mask = r.over(n.args[0], dims)
    if mask is None or not a.get("training", a.get("use_input_stats")):
        return None
    mean, variance, _ = _moments(x, mask, dims)
    shape = [1, -1] + [1] * (x.dim() - 2)
    return _affine((x - mean) / torch.sqrt(variance + a["eps"]), a["weight"], a["bias"], shape)


@handler("mean")
def _mean(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    dims, mask = r.reduced(n, a)
    if mask is None:
        return None
    mean, _, _ = _moments(_input(a), mask, dims)
    return mean if a.get("keepdim") else mean.squeeze(dims)


@handler("var", "std", "var_mean", "std_mean")
def _variance(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    dims, mask = r.reduced(n, a)
    if mask is None:
        return None
    mean, variance, count = _moments(_input(a), mask, dims)
    correction = a.get("correction", int(bool(a.get("unbiased", True))))
    variance = variance * count / (count - (1 if correction is None else correction)).clamp_min(0)
    if operator_name(n).startswith("std"):
        variance = variance.sqrt()
    if not a["keepdim"]:
        variance, mean = variance.squeeze(dims), mean.squeeze(dims)
    return (variance, mean) if operator_name(n).endswith("mean") else variance


@handler("softmax", "log_softmax", "_softmax", "_log_softmax")
def _softmax(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    mask = r.over(n.args[0], [a["dim"]])
    if mask is None:
        return None
    softmax = torch.log_softmax if "log" in operator_name(n) else torch.softmax
    return softmax(_input(a).masked_fill(~mask, -math.inf), a["dim"])


@handler("amax", "amin", "logsumexp", "prod", "any", "all")
def _extreme(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    _, mask = r.reduced(n, a)
    if mask is None:
        return None
    neutral = {"amax": -math.inf, "logsumexp": -math.inf, "amin": math.inf, "prod": 1, "any": False, "all": True}
    return _again(n, a, _input(a).masked_fill(~mask, neutral[operator_name(n)]))


@handler("sum", "linalg_vector_norm", "norm")
def _sum(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    _, mask = r.reduced(n, a)
    return None if mask is None else _again(n, a, _input(a).masked_fill(~mask, 0))


@handler("matmul", "bmm", "mm", "mv", "dot")
def _matmul(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    mask = r.over(n.args[0], [-1])
    return None if mask is None else _again(n, a, _input(a).masked_fill(~mask, 0))


@handler("addmm", "baddbmm")
def _addmm(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    mask = r.over(n.args[1], [-1])
    if mask is None:
        return None
    base, first, second, *rest = a.values()
    return n.target(base, first.masked_fill(~mask, 0), second, **dict(zip(list(a)[3:], rest, strict=True)))  # type: ignore[operator]


@handler("einsum")
def _einsum(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    """Sums over contracted letters without their removed entries."""
    values = []
    for node, value in zip(n.args[1], a["tensors"], strict=True):  # type: ignore[arg-type]
        mask = r.over(node, range(value.dim()))
        values.append(value if mask is None else value.masked_fill(~mask, 0))
    return torch.einsum(a["equation"], *values)


@handler("cosine_similarity")
def _cosine_similarity(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    masks = [r.over(source, [a["dim"]]) for source in n.args[:2]]
    if masks == [None, None]:
        return None
    x, y = (v if m is None else v.masked_fill(~m, 0) for v, m in zip((a["x1"], a["x2"]), masks, strict=True))
    return torch.cosine_similarity(x, y, a["dim"], a["eps"])


@handler("max", "min")
def _refused(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    if a.get("other") is None and a.get("dim") is not None and r.over(n.args[0], [a["dim"]]) is not None:
        raise MissingReference(f"{n.name}: no reference is known for {operator_name(n)} over a pruned dimension")
    return None


@handler("scaled_dot_product_attention")
def _attention(r: Reference, n: fx.Node, a: dict[str, Any]) -> Any:
    width, keys = r.over(n.args[0], [-1]), r.over(n.args[1], [-2])
    if width is None and keys is None:
        return None
    query, key, value = a["query"], a["key"], a["value"]
    query = query if width is None else query.masked_fill(~width, 0)
    if a.get("enable_gqa"):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        keys = None if keys is None else keys.repeat_interleave(repeats, -3) if keys.shape[-3] > 1 else keys
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if a["scale"] is None else a["scale"])
    if a["is_causal"]:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -math.inf)
    if a["attn_mask"] is not None:
        boolean = a["attn_mask"].dtype == torch.bool
        scores = scores.masked_fill(~a["attn_mask"], -math.inf) if boolean else scores + a["attn_mask"]
    if keys is not None:
        scores = scores.masked_fill(~keys.transpose(-1, -2), -math.inf)
    return scores.softmax(-1) @ value


def _input(a: dict[str, Any]) -> Tensor:
    return next(iter(a.values()))  # type: ignore[no-any-return]


def _again(n: fx.Node, a: dict[str, Any], x: Tensor) -> Any:
    """Calls the operator with another first argument."""
    (first, *_) = a
    arguments = n.target._schema.arguments  # type: ignore[union-attr]
    positional = [a[arg.name] if arg.name != first else x for arg in arguments if not arg.kwarg_only]
    return n.target(*positional, **{arg.name: a[arg.name] for arg in arguments if arg.kwarg_only})  # type: ignore[operator]
