"""Rules of the operators with weights: linear, convolution, products, norms, attention, embedding, recurrent nets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from microglia.graph.dims.atoms import UNIT, Dim
from microglia.graph.dims.nodes import operator_name, shape_of
from microglia.graph.dims.rules import rule

if TYPE_CHECKING:
    from microglia.graph.dims.analysis import Analysis, Arguments, Dims


@rule("linear")
def linear(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Weight (out, in)."""
    x, w = s.of(a.input), s.of(a.weight)
    s.unify(x[-1], w[1], n)
    if a.bias is not None:
        s.unify(w[0], s.of(a.bias)[0], n)
    s.weighted(n, a.weight, 0, 1, a.input, len(x) - 1)
    s.macs[n] = [*x, w[0]]
    return [*x[:-1], w[0]]


@rule("bilinear")
def bilinear(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Weight (out, in1, in2)."""
    x, y, w = s.of(a.input1), s.of(a.input2), s.of(a.weight)
    s.unify(x[-1], w[1], n)
    s.unify(y[-1], w[2], n)
    if a.bias is not None:
        s.unify(w[0], s.of(a.bias)[0], n)
    s.made.append(w[0])
    rows = s.broadcast([x[:-1], y[:-1]], n)
    s.macs[n] = [*rows, *w]
    return [*rows, w[0]]


@rule("conv1d", "conv2d", "conv3d")
def convolution(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Weight (groups x out per group, in per group, kernel); as many channels are removed from every group."""
    algebra, x, w = s.algebra, s.of(a.input), s.of(a.weight)
    batch, x = _batched(s, x, len(w))
    groups = algebra.fresh(a.groups)
    s.unify(x[1], algebra.product(groups, w[1]), n)
    s.unify(w[0], algebra.product(groups, algebra.fresh(shape_of(a.weight)[0] // a.groups)), n)
    if a.bias is not None:
        s.unify(w[0], s.of(a.bias)[0], n)
    s.weighted(n, a.weight, 0, 1, a.input, int(batch))
    s.per_group(n, a.weight, 1, groups)
    return _convolved(s, n, batch, x, w, w[0], groups)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Weight (groups x in per group, out per group, kernel)."""
    algebra, x, w = s.algebra, s.of(a.input), s.of(a.weight)
    batch, x = _batched(s, x, len(w))
    groups = algebra.fresh(a.groups)
    s.unify(w[0], algebra.product(groups, algebra.fresh(shape_of(a.weight)[0] // a.groups)), n)
    s.unify(x[1], w[0], n)
    out = algebra.product(groups, w[1])
    if a.bias is not None:
        s.unify(s.of(a.bias)[0], out, n)
    s.weighted(n, a.weight, 1, 0, a.input, int(batch))
    s.per_group(n, a.weight, 1, groups)
    return _convolved(s, n, batch, x, w, out, groups)


def _batched(s: Analysis, x: Dims, rank: int) -> tuple[bool, Dims]:
    return (True, x) if len(x) == rank else (False, [UNIT, *x])


def _convolved(s: Analysis, n: fx.Node, batch: bool, x: Dims, w: Dims, out: Dim, groups: Dim) -> Dims:
    s.algebra.freeze(*x[2:], *w[2:], why=f"{n.name}: positions of a convolution")
    s.notes[n] = {"groups": groups}
    spatial = [s.algebra.fresh(k, f"{n.name}: positions") for k in shape_of(n)[len(x) - len(w[2:]) - (not batch) :]]
    positions = x[2:] if "transpose" in operator_name(n) else spatial
    s.macs[n] = [x[0], *w, *positions]
    return [x[0], out, *spatial] if batch else [out, *spatial]


@rule("batch_norm", "instance_norm")
def batch_norm(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """One weight per channel; statistics taken from the input run over all the other dimensions."""
    x = s.of(a.input)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a[name] is not None:
            s.unify(x[1], s.of(a[name])[0], n)
    if operator_name(a.input) == "index_select" and a.input.args[2] in s.chosen and a.weight is not None:
        s.producers.add((s.trace.name_of[a.weight.name], 0))  # nothing else tells which channels a selection still gives
    if operator_name(n) == "instance_norm":
        s.algebra.renormalize(*(x[2:] if a.use_input_stats else []))
    elif a.training:
        s.algebra.renormalize(x[0], *x[2:])
    return x


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Statistics over the trailing dimensions."""
    x, k = s.of(a.input), len(a.normalized_shape)
    for affine in (a.get("weight"), a.get("bias")):
        if affine is not None:
            for left, right in zip(x[-k:], s.of(affine), strict=True):
                s.unify(left, right, n)
    s.algebra.renormalize(*x[-k:])
    if operator_name(n) == "_fused_rms_norm":  # and the reciprocal root mean square
        return [x, [*x[:-k], *[UNIT] * k]]
    return x


@rule("group_norm")
def group_norm(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Statistics per group: a whole group may go without renormalization."""
    algebra, x = s.algebra, s.of(a.input)
    groups, inside = algebra.fresh(a.num_groups), algebra.fresh(shape_of(a.input)[1] // a.num_groups)
    s.unify(x[1], algebra.product(groups, inside), n)
    algebra.renormalize(inside, *x[2:])
    for affine in (a.weight, a.bias):
        if affine is not None:
            s.unify(x[1], s.of(affine)[0], n)
    s.notes[n] = {"groups": groups}
    return x


@rule("matmul", "bmm", "mm", "mv", "dot")
def matmul(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Contracts the last dimension of the first with the last but one of the second."""
    x, y = s.of(n.args[0]), s.of(n.args[1])  # type: ignore[arg-type]
    row, column = len(x) > 1, len(y) > 1
    x, y = x if row else [UNIT, *x], y if column else [*y, UNIT]
    s.unify(x[-1], y[-2], n)
    batch = s.broadcast([x[:-2], y[:-2]], n) if x[:-2] or y[:-2] else []
    s.macs[n] = [*batch, x[-2], x[-1], y[-1]]
    _product_weight(s, n, n.args[0], n.args[1], len(x) - 1)
    return batch + ([x[-2]] if row else []) + ([y[-1]] if column else [])


@rule("addmm", "baddbmm")
def addmm(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """A product plus a broadcast term."""
    x, y = s.of(n.args[1]), s.of(n.args[2])  # type: ignore[arg-type]
    s.unify(x[-1], y[-2], n)
    s.macs[n] = [*x, y[-1]]
    _product_weight(s, n, n.args[1], n.args[2], len(x) - 1)
    return s.broadcast([[*x[:-1], y[-1]], s.of(n.args[0])], n)  # type: ignore[arg-type]


def _product_weight(s: Analysis, n: fx.Node, source: Any, weight: Any, at: int) -> None:
    """A matrix that is a parameter, or a parameter transposed, makes channels."""
    below = weight
    while below.op == "call_function" and operator_name(below) in ("t", "transpose", "numpy_T", "permute", "mT", "to"):
        below = below.args[0]
    if below.name in s.trace.name_of:
        s.made.append(s.dims[weight][-1])
        if below is weight and len(s.dims[weight]) == 2:
            s.weighted(n, weight, 1, 0, source, at)


@rule("einsum")
def einsum(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """One Dim per letter; the ellipsis broadcasts."""
    terms, out = _einsum_terms(str(n.args[0]))
    letters: dict[str, Dim] = {}
    rest: list[Dims] = []
    for term, x in zip(terms, n.args[1], strict=True):  # type: ignore[arg-type]
        dims = s.of(x)  # type: ignore[arg-type]
        if "..." in term:
            at = term.index("...")
            end = at + len(dims) - (len(term) - 3)
            rest.append(dims[at:end])
            dims = dims[:at] + dims[end:]
        for letter, dim in zip(term.replace("...", ""), dims, strict=True):
            if letter not in letters or s.algebra.size(s.algebra.normal(letters[letter])) == 1:
                letters[letter] = dim
            elif s.algebra.size(dim) != 1:
                s.unify(letters[letter], dim, n)
    before, dots, after = out.partition("...")
    middle = s.broadcast(rest, n) if dots and rest else []
    s.macs[n] = [*letters.values(), *middle]
    for x in n.args[1]:  # type: ignore[union-attr]
        if x.name in s.trace.name_of:  # type: ignore[union-attr,operator]
            s.made += s.of(x)  # type: ignore[arg-type]
    return [*(letters[c] for c in before), *middle, *(letters[c] for c in after)]


def _einsum_terms(equation: str) -> tuple[list[str], str]:
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:  # implicit output: letters that occur once, in alphabetical order
        plain = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    return left.split(","), right


@rule("scaled_dot_product_attention")
def attention(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """softmax(q k^T) v; the softmax runs over the keys. With grouped queries each key head serves several query heads."""
    q, k, v = s.of(a.query), s.of(a.key), s.of(a.value)
    s.unify(q[-1], k[-1], n)
    s.unify(k[-2], v[-2], n)
    heads, key_heads = (shape_of(x)[-3] if len(shape_of(x)) > 2 else 1 for x in (a.query, a.key))
    if a.get("enable_gqa") and heads != key_heads:
        repeats = s.algebra.fresh(heads // key_heads, f"{n.name}: queries per key head")
        s.unify(q[-3], s.algebra.product(k[-3], repeats), n)
        s.unify(k[-3], v[-3], n)
        batch = [*s.broadcast([q[:-3], k[:-3], v[:-3]], n), q[-3]]
    else:
        batch = s.broadcast([q[:-2], k[:-2], v[:-2]], n)
    if a.attn_mask is not None:
        s.broadcast([[*batch, q[-2], k[-2]], s.of(a.attn_mask)], n)
    s.algebra.renormalize(k[-2])
    s.macs[n] = [*batch, q[-2], k[-2], s.algebra.sum(q[-1], v[-1])]
    if a.is_causal:  # the mask is by position
        s.algebra.freeze(q[-2], k[-2], why=f"{n.name}: causal")
    return [*batch, q[-2], v[-1]]


@rule("embedding")
def embedding(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Rows are looked up by number: frozen."""
    w, i = s.of(a.weight), s.of(a.indices)
    s.algebra.freeze(w[0], *i, why=f"{n.name}: rows of an embedding")
    s.made.append(w[1])
    return [*i, w[1]]


@rule("prelu")
def prelu(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """The weight aligns with dimension 1, not with the last."""
    x = s.of(n.args[0])  # type: ignore[arg-type]
    if shape_of(a.weight)[0] != 1:
        s.unify(x[1], s.of(a.weight)[0], n)
    return x


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Gates x hidden units. All layers and directions lose the same units: the kernel takes one hidden size.

    A removed unit stays exactly 0 from a zero state: its candidate is tanh(0) for all values of its gates.
    """
    name = operator_name(n)
    if "batch_sizes" in a or not isinstance(a.params, list | tuple):
        return s.freeze_around(n, f"a packed sequence into {name}")
    per_layer = 4 if a.has_biases else 2
    directions = 2 if a.bidirectional else 1
    if len(a.params) != per_layer * a.num_layers * directions:
        return s.freeze_around(n, "an LSTM with projections")
    states = list(a.hx) if isinstance(a.hx, list | tuple) else [a.hx]
    hidden = s.of(a.params[1])[1]
    x = s.of(a.input)
    products: list[Dim] = []
    for layer in range(a.num_layers):
        for direction in range(directions):
            at = (layer * directions + direction) * per_layer
            products += _recurrent_weights(s, n, a.params[at : at + per_layer], x[-1], hidden)
        x = [*x[:-1], s.algebra.sum(*[hidden] * directions)]
    for state in states:
        s.unify(s.of(state)[-1], hidden, n)
        s.algebra.freeze(*s.of(state)[:-1], why=f"{n.name}: layers of a recurrent net")
    s.made.append(hidden)
    s.macs[n] = [*s.of(a.input)[:-1], s.algebra.sum(*products)]
    length = s.of(a.input)[1 if a.batch_first else 0]
    s.algebra.freeze(length, why=f"{n.name}: positions of a sequence")
    return [x, *([*s.of(state)[:-1], hidden] for state in states)]


def _recurrent_weights(s: Analysis, n: fx.Node, weights: Any, entering: Dim, hidden: Dim) -> list[Dim]:
    inner, own = s.of(weights[0]), s.of(weights[1])
    size = s.algebra.size(s.algebra.normal(hidden))
    gates = s.algebra.fresh(shape_of(weights[1])[0] // size, f"{n.name}: gates")
    s.unify(inner[1], entering, n)
    s.unify(own[1], hidden, n)
    for weight in weights:
        s.unify(s.of(weight)[0], s.algebra.product(gates, hidden), n)
    return [s.algebra.product(inner[0], inner[1]), s.algebra.product(own[0], own[1])]
