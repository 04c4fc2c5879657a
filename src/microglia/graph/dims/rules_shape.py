"""Rules of operators that rearrange: reshape, permute, expand, concatenate, split, windows, shuffles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import fx

from microglia.graph.dims.atoms import UNIT, Dim
from microglia.graph.dims.nodes import concrete, operator_name, shape_of, split_dim
from microglia.graph.dims.rules import rule

if TYPE_CHECKING:
    from microglia.graph.dims.analysis import Analysis, Arguments, Dims


def _first(s: Analysis, n: fx.Node) -> Dims:
    return s.of(n.args[0])  # type: ignore[arg-type]


@rule("reshape", "view", "_unsafe_view", "flatten", "unflatten", "reshape_as", "view_as")
def reshape(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Row-major regrouping."""
    if operator_name(n) == "view" and "dtype" in a:
        return s.freeze_around(n, "a view as another type")
    out, lost = s.algebra.regroup(_first(s, n), shape_of(n), n.name)
    s.losses += [(f"{n.name}: {shape_of(n.args[0])} to {shape_of(n)}", (d,)) for d in lost]  # type: ignore[arg-type]
    if operator_name(n).endswith("_as"):  # at run time the shape comes from the other tensor
        for mine, theirs in zip(out, s.of(n.args[1]), strict=True):  # type: ignore[arg-type]
            s.unify(mine, theirs, n)
    return out


@rule("permute")
def permute(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Reorders."""
    x = _first(s, n)
    return [x[i] for i in a.dims]


@rule("transpose", "swapaxes", "swapdims")
def transpose(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Swaps two dimensions."""
    x, (i, j) = _first(s, n), n.args[1:3]
    x[i], x[j] = x[j], x[i]  # type: ignore[index,call-overload]
    return x


@rule("t", "numpy_T", "mT", "adjoint", "matrix_H")
def t(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Swaps the last two dimensions."""
    x = _first(s, n)
    return x[::-1] if operator_name(n) == "numpy_T" else x[:-2] + x[-2:][::-1]


@rule("movedim", "moveaxis")
def movedim(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Moves dimensions to new positions; the others keep their order."""
    x = _first(s, n)
    sources, targets = ([v] if isinstance(v, int) else list(v) for v in (a.source, a.destination))
    sources, targets = [k % len(x) for k in sources], [k % len(x) for k in targets]
    order = [k for k in range(len(x)) if k not in sources]
    for source, target in sorted(zip(sources, targets, strict=True), key=lambda pair: pair[1]):
        order.insert(target, source)
    return [x[k] for k in order]


@rule("unsqueeze")
def unsqueeze(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """A dimension of size 1."""
    x = _first(s, n)
    x.insert(a.dim if a.dim >= 0 else len(x) + 1 + a.dim, UNIT)
    return x


@rule("squeeze")
def squeeze(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Drops dimensions of size 1."""
    x, shape = _first(s, n), shape_of(n.args[0])  # type: ignore[arg-type]
    dims = a.get("dim")
    dims = range(len(x)) if dims is None else [dims] if isinstance(dims, int) else dims
    drop = {i % len(x) for i in dims if shape[i] == 1}
    return [d for i, d in enumerate(x) if i not in drop]


@rule("expand", "expand_as", "broadcast_to")
def expand(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """A broadcast copy is the same at every index: free until it meets another Dim."""
    x, out = _first(s, n), shape_of(n)
    shape = [1] * (len(out) - len(x)) + shape_of(n.args[0])  # type: ignore[arg-type]
    x = [UNIT] * (len(out) - len(x)) + x
    dims = [d if p == q else s.algebra.fresh(q) for d, p, q in zip(x, shape, out, strict=True)]
    if operator_name(n) == "expand_as":
        s.broadcast([dims, s.of(n.args[1])], n)  # type: ignore[arg-type]
    return dims


@rule("repeat", "tile")
def repeat(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Repeats x Dim."""
    x, repeats = _first(s, n), [concrete(r.meta["val"] if isinstance(r, fx.Node) else r) for r in n.args[1]]  # type: ignore[union-attr]
    x = [UNIT] * (len(repeats) - len(x)) + x
    repeats = [1] * (len(x) - len(repeats)) + repeats
    leads = [s.algebra.fresh(r) for r in repeats]
    s.notes[n] = {"repeats": leads}
    return [s.algebra.product(lead, d) for lead, d in zip(leads, x, strict=True)]


@rule("repeat_interleave")
def repeat_interleave(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Dim x repeats."""
    if not isinstance(a.get("repeats"), int) or a.get("dim") is None:
        return s.freeze_around(n, "repeat_interleave by a tensor")
    x, k = _first(s, n), a.dim % len(shape_of(n))
    return [*x[:k], s.algebra.product(x[k], s.algebra.fresh(a.repeats, f"{n.name}: repeats")), *x[k + 1 :]]


@rule("cat", "concat", "concatenate")
def cat(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """A sum of Dims."""
    parts = [s.of(x) for x in n.args[0] if shape_of(x) != [0]]  # type: ignore[union-attr,arg-type]
    k = a.dim % len(parts[0])
    for part in parts[1:]:
        for i, dim in enumerate(part):
            if i != k:
                s.unify(parts[0][i], dim, n)
    return [s.algebra.sum(*(p[k] for p in parts)) if i == k else d for i, d in enumerate(parts[0])]


@rule("stack")
def stack(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """A new, frozen dimension: each index has its own meaning."""
    x = s.broadcast([s.of(x) for x in n.args[0]], n)  # type: ignore[union-attr,arg-type]
    k = a.dim if a.dim >= 0 else a.dim + len(x) + 1
    return [*x[:k], s.algebra.fresh(len(n.args[0]), f"{n.name}: stack"), *x[k:]]  # type: ignore[arg-type]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit")
def split(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Cuts."""
    x, k = _first(s, n), split_dim(operator_name(n), a, len(shape_of(n.args[0])))  # type: ignore[arg-type]
    sizes = [shape_of(v)[k] for v in n.meta["val"]]
    return [[*x[:k], piece, *x[k + 1 :]] for piece in s.cuts(n, x[k], sizes)]


@rule("glu")
def glu(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Both halves lose the same units, so halving at run time stays correct."""
    x = _first(s, n)
    k = a.dim % len(x)
    left, right = s.cuts(n, x[k], [shape_of(n)[k]] * 2)
    s.unify(left, right, n)
    return [*x[:k], left, *x[k + 1 :]]


@rule("unfold")
def unfold(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Windows along one dimension, appended last."""
    x = _first(s, n)
    k, shape, why = a.dimension % len(x), shape_of(n), f"{n.name}: windows"
    s.algebra.freeze(x[k], why=why)
    return [*x[:k], s.algebra.fresh(shape[k], why), *x[k + 1 :], s.algebra.fresh(shape[-1], why)]


@rule("im2col")
def im2col(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """(.., C, H, W) to (.., C x kernel, positions)."""
    x, why = _first(s, n), f"{n.name}: windows"
    s.algebra.freeze(*x[-2:], why=why)
    window = s.algebra.fresh(math.prod(a.kernel_size), why)
    return [*x[:-3], s.algebra.product(x[-3], window), s.algebra.fresh(shape_of(n)[-1], why)]


@rule("col2im")
def col2im(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """(.., C x kernel, positions) to (.., C, H, W)."""
    x, why = _first(s, n), f"{n.name}: windows"
    s.algebra.freeze(x[-1], why=why)
    channels = s.algebra.fresh(shape_of(n)[-3])
    s.unify(x[-2], s.algebra.product(channels, s.algebra.fresh(math.prod(a.kernel_size), why)), n)
    return [*x[:-2], channels, *(s.algebra.fresh(z, why) for z in shape_of(n)[-2:])]


@rule("pixel_shuffle")
def pixel_shuffle(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """(.., C x r^2, H, W) to (.., C, H r, W r)."""
    x, why = _first(s, n), f"{n.name}: pixel shuffle"
    s.algebra.freeze(*x[-2:], why=why)
    channels = s.algebra.fresh(shape_of(n)[-3])
    s.unify(x[-3], s.algebra.product(channels, s.algebra.fresh(a.upscale_factor**2, why)), n)
    return [*x[:-3], channels, *(s.algebra.fresh(z, why) for z in shape_of(n)[-2:])]


@rule("pixel_unshuffle")
def pixel_unshuffle(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """(.., C, H r, W r) to (.., C x r^2, H, W)."""
    x, why = _first(s, n), f"{n.name}: pixel shuffle"
    s.algebra.freeze(*x[-2:], why=why)
    window: Dim = s.algebra.fresh(a.downscale_factor**2, why)
    return [*x[:-3], s.algebra.product(x[-3], window), *(s.algebra.fresh(z, why) for z in shape_of(n)[-2:])]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Groups x c becomes c x groups; the groups are an argument, so they are kept."""
    x = _first(s, n)
    lead, trail = s.cuts_rows(n, x[1], shape_of(n)[1] // a.groups)
    if lead is None:
        return s.freeze_around(n, "channel shuffle")
    s.algebra.freeze(lead, why=f"{n.name}: groups of a channel shuffle")
    return [x[0], s.algebra.product(trail, lead), *x[2:]]
