"""Rules of operators that select entries: slice, select, index, sort, gather, pad, triangle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from microglia.graph.dims.nodes import nodes_in, operator_name, shape_of
from microglia.graph.dims.rules import rule

if TYPE_CHECKING:
    from microglia.graph.dims.analysis import Analysis, Arguments, Dims


def _first(s: Analysis, n: fx.Node) -> Dims:
    return s.of(n.args[0])  # type: ignore[arg-type]


@rule("slice", "narrow")
def slice_(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """A cut; with a step over whole rows the step is kept, and rows may be removed."""
    x = _first(s, n)
    k = (a.dim or 0) % len(x)
    size = shape_of(n.args[0])[k]  # type: ignore[arg-type]
    narrow = operator_name(n) == "narrow"
    bounds = [a.start, a.length, 1] if narrow else [a.start, a.end, a.step]
    if any(isinstance(b, fx.Node) for b in bounds):
        return _opaque_slice(s, n, x, k)
    if narrow:
        bounds = [a.start % size, a.start % size + a.length, 1]
    low, high, step = slice(*bounds).indices(size)
    if step != 1:
        return _strided(s, n, x, k, low, high, step)
    if (low, high) == (0, size):
        return x
    pieces = [p for p in (low, high - low, size - high) if p > 0]
    if high <= low:
        return [*x[:k], s.algebra.fresh(0, "empty slice"), *x[k + 1 :]]
    return [*x[:k], s.cuts(n, x[k], pieces)[1 if low else 0], *x[k + 1 :]]


def _opaque_slice(s: Analysis, n: fx.Node, x: Dims, k: int) -> Dims:
    whole = shape_of(n)[k] == shape_of(n.args[0])[k]  # type: ignore[arg-type]
    s.algebra.freeze(x[k], why=f"{n.name}: a slice by a size known at run time")
    return x if whole else [*x[:k], s.algebra.fresh(shape_of(n)[k], n.name), *x[k + 1 :]]


def _strided(s: Analysis, n: fx.Node, x: Dims, k: int, low: int, high: int, step: int) -> Dims:
    size = shape_of(n.args[0])[k]  # type: ignore[arg-type]
    if low < step and high > size - step and size % step == 0:
        lead, trail = s.cuts_rows(n, x[k], step)
        if lead is not None:
            s.algebra.freeze(trail, why=f"{n.name}: step of a slice")
            s.notes[n] = {"strided": True}
            return [*x[:k], lead, *x[k + 1 :]]
    s.algebra.freeze(x[k], why=f"{n.name}: strided slice")
    return [*x[:k], s.algebra.fresh(shape_of(n)[k], f"{n.name}: strided slice"), *x[k + 1 :]]


@rule("select", "unbind")
def select(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """The dimension is frozen, because each of its indices has its own meaning."""
    x = _first(s, n)
    k = a.dim % len(x)
    s.algebra.freeze(x[k], why=f"{n.name}: {operator_name(n)}")
    rest = x[:k] + x[k + 1 :]
    return rest if isinstance(n.meta["val"], Tensor) else [list(rest) for _ in n.meta["val"]]


@rule("index")
def index(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Indexed dimensions are frozen; the dimensions of the indices replace them."""
    x, indices = _first(s, n), list(n.args[1])  # type: ignore[arg-type]
    at = [k for k, i in enumerate(indices) if i is not None]
    separated = at != list(range(at[0], at[0] + len(at)))
    if separated or any(i.meta["val"].dtype == torch.bool for i in indices if i is not None):
        return s.freeze_around(n, "a boolean or separated index")
    why = f"{n.name}: index"
    s.algebra.freeze(*(x[k] for k in at), *(d for k in at for d in s.of(indices[k])), why=why)
    middle = s.broadcast([s.of(indices[k]) for k in at], n)
    return [*x[: at[0]], *middle, *x[at[-1] + 1 :]]


@rule("index_select", "roll", "flip", "cumsum", "cumprod", "logcumsumexp")
def ordered(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """The order along the dimension matters. A selection by a buffer can lose entries, with those of the buffer."""
    x, name = _first(s, n), operator_name(n)
    dims = a.get("dims", a.get("dim"))
    dims = [dims] if isinstance(dims, int) else list(dims or range(len(x)))
    s.algebra.freeze(*(x[i] for i in dims), why=f"{n.name}: {name}")
    if name == "index_select" and a.index in s.chosen:
        x[dims[0]] = s.of(a.index)[0]
        s.made.append(x[dims[0]])
    elif name == "index_select":
        x[dims[0]] = s.algebra.fresh(shape_of(n)[dims[0]], f"{n.name}: {name}")
    return x


@rule("gather", "take_along_dim")
def gather(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """The gathered dimension is frozen; the others are those of the index, which must not be longer."""
    if operator_name(n) == "take_along_dim" and (a.dim is None or shape_of(a.indices) != shape_of(n)):
        return s.freeze_around(n, "take_along_dim of the flat tensor, or with a broadcast index")
    x, index = _first(s, n), s.of(a["indices" if operator_name(n) == "take_along_dim" else "index"])
    k = a.dim % len(x)
    s.algebra.freeze(x[k], index[k], why=f"{n.name}: gather")
    for i, (mine, theirs) in enumerate(zip(x, index, strict=True)):
        if i != k and s.algebra.size(mine) == s.algebra.size(theirs):
            s.unify(mine, theirs, n)
        elif i != k:
            s.algebra.freeze(mine, theirs, why=f"{n.name}: gather of a part")
    return index


@rule("constant_pad_nd", "pad")
def pad(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Constant padding is free segments around the Dim; other padding copies positions."""
    x, sides = _first(s, n), list(a.pad)
    s.notes[n] = {}
    for i in range(len(sides) // 2):
        before, after, k = sides[2 * i], sides[2 * i + 1], len(x) - 1 - i
        if (before, after) == (0, 0):
            continue
        opaque = bool(nodes_in([before, after])) or a.get("mode", "constant") != "constant"
        if opaque or s.algebra.is_frozen(x[k]) or before < 0 or after < 0:
            s.algebra.freeze(x[k], why=f"{n.name}: padding")
            x[k] = s.algebra.fresh(shape_of(n)[k], f"{n.name}: padding")
        else:
            first, last = (s.algebra.fresh(z) if z else () for z in (before, after))
            s.notes[n][i] = (first, last)
            x[k] = s.algebra.sum(first, x[k], last)
    return x


@rule("triu", "tril", "diagonal")
def triangle(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """By position."""
    if operator_name(n) == "diagonal":
        return s.freeze_around(n, "diagonal")
    x = _first(s, n)
    s.algebra.freeze(*x[-2:], why=f"{n.name}: triangle")
    return x
