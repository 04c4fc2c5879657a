"""Random small nets: whatever is removed, the smaller net computes what the masked one does, and learns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from graph_checks import EXACT, agree, halves, masked, own_choices, stir, uneven
from microglia.graph.cutting.cut import Cut
from microglia.graph.cutting.modules import indices, kept_units
from microglia.graph.cutting.surgery import cut_graph, forward_names
from microglia.graph.cutting.verify import verify
from microglia.graph.dims.analysis import Analysis
from microglia.graph.dims.trace import trace

WIDTHS = (4, 6, 8, 12, 18)
OPS = (
    "conv", "grouped", "depthwise", "expand", "bn", "gn", "ln", "relu", "sigmoid", "add", "add earlier", "cat", "cat earlier",
    "split", "gate", "glu", "pool", "up", "shuffle", "attention", "se", "scale", "halves", "pixels",
)  # fmt: skip


class Attention(nn.Module):
    """Over the positions of a map; heads of a third or half of the width."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        q, k, v = (z.flatten(2).unflatten(1, (self.heads, -1)).mT for z in self.qkv(x).chunk(3, 1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2).view_as(x))


class Random(nn.Module):
    """A net of drawn operations on (channels, side, side) maps; a drawn operation that does not fit is left out.

    Args:
        steps: Operation and a number that decides its options.
        head: How the map becomes 3 outputs: "mean", "max" or "flatten".
    """

    def __init__(self, steps, head):
        super().__init__()
        self.layers, self.steps, self.head_kind = nn.ModuleList([nn.Conv2d(2, 6, 3, padding=1)]), [], head
        self.width, self.side = 6, 4
        seen = [(6, 4)]
        for op, number in steps:
            step = self._plan(op, number, seen)
            if step is not None:
                self.steps.append(step)
                seen.append((self.width, self.side))
        self.head = nn.Linear(self.width * (self.side**2 if head == "flatten" else 1), 3)

    def _layer(self, layer):
        self.layers.append(layer)
        return len(self.layers) - 1

    def _plan(self, op, number, seen):
        """Returns (operation, its number, layer) or None, and notes the new width and side."""
        c, side, layer = self.width, self.side, None
        wide = WIDTHS[number % len(WIDTHS)]
        divisors = [d for d in (2, 3) if c % d == 0]
        groups = divisors[number % len(divisors)] if divisors else 0
        twins = [k for k, shape in enumerate(seen) if shape == (c, side) or (op == "cat earlier" and shape[1] == side)]
        if op == "conv":
            layer, self.width = self._layer(nn.Conv2d(c, wide, 1 + 2 * (number % 2), padding=number % 2)), wide
        elif op == "grouped" and groups:
            layer, self.width = (
                self._layer(nn.Conv2d(c, groups * (2 + number % 4), 1, groups=groups)),
                groups * (2 + number % 4),
            )
        elif op == "depthwise":
            layer = self._layer(nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False))
        elif op == "expand" and c <= 12:
            layer, self.width = self._layer(nn.Conv2d(c, 2 * c, 1, groups=c)), 2 * c
        elif op == "bn":
            layer = self._layer(nn.BatchNorm2d(c))
        elif op == "gn" and groups and side > 1:
            layer = self._layer(nn.GroupNorm(groups, c))
        elif op == "ln":
            layer = self._layer(nn.LayerNorm(c))
        elif op in ("add", "cat", "se"):
            added = c if op != "cat" else wide
            if op == "cat" and c + wide > 30:
                return None
            layer, self.width = self._layer(nn.Conv2d(c, added, 1)), c + (added if op == "cat" else 0)
        elif op == "add earlier" and len(twins) > 1:
            return op, twins[number % (len(twins) - 1)], None
        elif op == "cat earlier":
            k = twins[number % len(twins)]
            if c + seen[k][0] > 30:
                return None
            self.width = c + seen[k][0]
            return op, k, None
        elif op == "split" and c > 2:
            number = 1 + number % (c - 1)
        elif op in ("gate", "glu") and c % 2 == 0 and c > 4:
            self.width = c // 2
        elif op == "pool" and side > 1:
            self.side = side // 2
        elif op == "up" and side < 4:
            self.side = 2 * side
        elif op in ("shuffle", "attention") and groups:
            number = groups
            layer = self._layer(Attention(c, groups)) if op == "attention" else None
        elif op == "scale":
            layer = self._layer(nn.PReLU(c))
        elif op == "halves" and c % 2 == 0 and c > 4:
            layer = self._layer(nn.Conv2d(c // 2, c // 2, 1))
        elif op == "pixels" and c % 4 == 0 and side < 4:
            self.width, self.side = c // 4, 2 * side
        elif op not in ("relu", "sigmoid"):
            return None
        return op, number, layer

    def _run(self, x, seen, op, number, layer):
        f = self.layers[layer] if layer is not None else None
        if op in ("conv", "grouped", "depthwise", "expand", "bn", "gn", "attention", "scale"):
            return f(x)
        if op == "ln":
            return f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if op == "halves":
            left, right = x.chunk(2, 1)
            return torch.cat([left + f(right), right], 1)
        simple = {
            "relu": F.relu,
            "sigmoid": torch.sigmoid,
            "add": lambda x: x + f(x),
            "add earlier": lambda x: x + seen[number],
            "cat": lambda x: torch.cat([x, f(x)], 1),
            "cat earlier": lambda x: torch.cat([seen[number], x], 1),
            "split": lambda x: torch.cat([x[:, number:], x[:, :number].relu()], 1),
            "gate": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].tanh(),
            "glu": lambda x: F.glu(x, 1),
            "pool": lambda x: F.avg_pool2d(x, 2),
            "up": lambda x: F.interpolate(x, scale_factor=2),
            "shuffle": lambda x: x.unflatten(1, (number, -1)).transpose(1, 2).flatten(1, 2),
            "se": lambda x: x * f(x.mean((2, 3), keepdim=True)).sigmoid(),
            "pixels": lambda x: F.pixel_shuffle(x, 2),
        }
        return simple[op](x)

    def forward(self, x):
        x = self.layers[0](x)
        seen = [x]
        for step in self.steps:
            x = self._run(x, seen, *step)
            seen.append(x)
        if self.head_kind == "flatten":
            return self.head(x.flatten(1))
        return self.head(x.mean((2, 3)) if self.head_kind == "mean" else x.amax((2, 3)))


STEPS = st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 19)), min_size=2, max_size=7)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(STEPS, st.sampled_from(["mean", "max", "flatten"]), st.integers(0, 99))
def test_a_random_net(steps, head, seed):
    model = stir(Random(steps, head), seed)
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    analysis = Analysis(trace(model, x, dynamic=(0,) if seed % 4 == 0 else ()))
    atoms = analysis.prunable()
    assume(atoms)
    assert analysis.unknown == {}
    renormalized = any(analysis.algebra.renormalized[a] for a in atoms)
    for kept in (halves(analysis, atoms, seed), uneven(analysis, atoms, seed), own_choices(analysis, atoms, seed)):
        cut = Cut(analysis, kept)
        for node, dims in analysis.dims.items():
            for dim in dims if node.op == "call_function" and all(isinstance(d, tuple) for d in dims or [None]) else []:
                assert int(cut.mask(dim).sum()) == cut.count(dim)
        checked = verify(cut, tolerance=EXACT)
        small = cut_graph(cut, forward_names(model))
        outputs = small(x)
        agree(outputs, checked.outputs[0])
        if not renormalized:
            agree(outputs, masked(model, cut)(x))
        outputs.square().sum().backward()
        for name, parameter in small.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("op", OPS)
def test_every_operation_can_be_drawn(op):
    """The operations are not left out for want of a fitting width."""
    before = [("pool", 0)] if op in ("up", "pixels") else []
    model = Random([("conv", 3), ("relu", 0), *before, (op, 1)], "mean")
    assert model.steps[-1][0] == op


GROUPED = [("grouped", 1), ("bn", 0), ("relu", 0), ("grouped", 3), ("se", 0), ("grouped", 0), ("conv", 1)]


@settings(deadline=None, max_examples=10)
@given(st.permutations(GROUPED), st.integers(0, 99))
def test_groups_that_choose_for_themselves(steps, seed):
    """Kept indices give the same cut again, also where the leading factors are cut too."""
    model = stir(Random([("conv", 3), *steps], "mean"), seed)
    analysis = Analysis(trace(model, torch.zeros(2, 2, 4, 4, dtype=torch.float64), dynamic=()))
    kept = own_choices(analysis, analysis.prunable(), seed)
    cut = Cut(analysis, kept)
    verify(cut, tolerance=EXACT)
    wanted = indices(cut)
    assert indices(Cut(analysis, kept_units(analysis, wanted))) == wanted
    event(f"{sum(k.ndim > 1 for k in kept.values())} atoms with rows")


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_kept_indices_give_the_same_cut_again(seed):
    """Heads of two channels, cut in the middle of a head: a row's unit may be gone from one tensor and kept in others."""
    model = stir(Random([("attention", 13), ("halves", 13)], "mean"))
    analysis = Analysis(trace(model, torch.zeros(2, 2, 4, 4, dtype=torch.float64), dynamic=()))
    generator = torch.Generator().manual_seed(seed)
    sizes = analysis.algebra.sizes
    kept = {a: torch.rand(sizes[a], generator=generator) < 0.7 for a in analysis.prunable()}
    wanted = indices(Cut(analysis, kept))
    assert wanted
    assert indices(Cut(analysis, kept_units(analysis, wanted))) == wanted
