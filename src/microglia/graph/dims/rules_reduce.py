"""Rules of the operators that reduce or run over positions: softmax, mean, norms, pooling, resizing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from microglia.graph.dims.atoms import UNIT
from microglia.graph.dims.nodes import operator_name, shape_of
from microglia.graph.dims.rules import pointwise, rule

if TYPE_CHECKING:
    from microglia.graph.dims.analysis import Analysis, Arguments

REDUCTIONS = (
    "mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "prod", "logsumexp", "var_mean", "std_mean",
    "any", "all",
)  # fmt: skip


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Over one dimension, which stays."""
    x = s.of(n.args[0])  # type: ignore[arg-type]
    s.algebra.renormalize(x[a.dim])
    return x


@rule("cosine_similarity")
def cosine_similarity(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """A reduction over one dimension of both."""
    x = s.broadcast([s.of(a.x1), s.of(a.x2)], n)
    s.algebra.renormalize(x[a.dim])
    return [d for i, d in enumerate(x) if i != a.dim % len(x)]


@rule(*REDUCTIONS)
def reduction(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Over some dimensions; with keepdim these have size 1."""
    return _reduced(s, n, a)


@rule("max", "min", "argmax", "argmin", "median")
def picking(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """A reduction that returns a position, or the pointwise operator of two arguments."""
    if a.get("other") is not None:
        return pointwise(s, n, a)
    x, dims = s.of(n.args[0]), a.get("dim")  # type: ignore[arg-type]
    s.algebra.freeze(*(x if dims is None else [x[dims]]), why=f"{n.name}: {operator_name(n)}")
    return _reduced(s, n, a)


def _reduced(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    x, dims = s.of(n.args[0]), a.get("dim")  # type: ignore[arg-type]
    dims = range(len(x)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    over = {k % len(x) for k in dims} if x else set()
    s.algebra.renormalize(*(x[k] for k in over))
    out = [UNIT if k in over else d for k, d in enumerate(x) if a.get("keepdim") or k not in over]
    value = n.meta["val"]
    return out if isinstance(value, Tensor) else [list(out) for _ in value]


@rule("sort", "topk", "argsort", "msort")
def sorting(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """The sorted dimension is frozen, the others pass."""
    x = s.of(n.args[0])  # type: ignore[arg-type]
    k = 0 if operator_name(n) == "msort" else -1 if a.get("dim") is None else a.dim
    why = f"{n.name}: {operator_name(n)}"
    s.algebra.freeze(x[k], why=why)
    value = n.meta["val"]
    first = value if isinstance(value, Tensor) else value[0]
    out = [s.algebra.fresh(z, why) if i == k % len(x) else x[i] for i, z in enumerate(shape_of(first))]
    return out if isinstance(value, Tensor) else [list(out) for _ in value]


@rule("adaptive_avg_pool1d", "adaptive_max_pool1d", "avg_pool1d", "max_pool1d", "upsample_nearest1d", "upsample_linear1d")
def positions_1d(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Over the last dimension."""
    return _positions(s, n, 1)


@rule(
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "max_pool2d_with_indices",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d",
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "reflection_pad2d", "replication_pad2d",
)  # fmt: skip
def positions_2d(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Over the last two dimensions."""
    return _positions(s, n, 2)


@rule("adaptive_avg_pool3d", "adaptive_max_pool3d", "avg_pool3d", "max_pool3d", "upsample_trilinear3d", "upsample_nearest3d")
def positions_3d(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Over the last three dimensions."""
    return _positions(s, n, 3)


@rule("grid_sampler", "grid_sampler_2d")
def grid_sampler(s: Analysis, n: fx.Node, a: Arguments) -> Any:
    """Positions, looked up by the grid, whose last dimension holds coordinates."""
    x, grid = s.of(n.args[0]), s.of(n.args[1])  # type: ignore[arg-type]
    why = f"{n.name}: positions"
    s.algebra.freeze(*x[2:], *grid[1:], why=why)
    s.unify(x[0], grid[0], n)
    return [*x[:2], *(s.algebra.fresh(z, why) for z in shape_of(n)[2:])]


def _positions(s: Analysis, n: fx.Node, k: int) -> Any:
    x, why = s.of(n.args[0]), f"{n.name}: positions"  # type: ignore[arg-type]
    s.algebra.freeze(*x[-k:], why=why)
    value = n.meta["val"]

    def one(tensor: Tensor) -> Any:
        return [*x[:-k], *(s.algebra.fresh(z, why) for z in shape_of(tensor)[-k:])]

    return one(value) if isinstance(value, Tensor) else [one(v) for v in value]
