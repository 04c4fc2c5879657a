"""Every operator of the rule table in a tiny model: traced, analysed, cut, and held against the masked model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graph_checks import EXACT, agree, halves, masked, stir, uneven
from microglia.graph.channels.groups import channel_groups
from microglia.graph.cutting.cut import Cut
from microglia.graph.cutting.surgery import cut_graph, forward_names
from microglia.graph.cutting.verify import ShrinkError, verify
from microglia.graph.dims.analysis import Analysis
from microglia.graph.dims.nodes import operator_name
from microglia.graph.dims.rules import RULES
from microglia.graph.dims.trace import trace

aten = torch.ops.aten


class Net(nn.Module):
    """Layers and parameters by name, and what to do with them."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


class Two(Net):
    """With two inputs."""

    def forward(self, x, y):
        return self.run(self, x, y)


def weight(*shape):
    return nn.Parameter(torch.empty(*shape))


@dataclass(frozen=True)
class Case:
    """A model, the shapes of its inputs, and the sizes of the atoms that can be pruned, in increasing order."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    atoms: list[int]
    integers: int = 0  # inputs are indices below this


CASES: dict[str, Case] = {}


def add(name, build, *shapes, atoms, integers=0):
    assert name not in CASES, name
    CASES[name] = Case(build, shapes, sorted(atoms), integers)


def image(name, f, atoms=(12,), *, out=12, head=None, size=6, **parts):
    """3 x 6 x 6 images -> a convolution to 12 channels, its norm -> f -> a convolution to 5 channels."""

    def build():
        made = {k: v() for k, v in parts.items()}
        end = nn.Conv2d(out, 5, 1) if head is None else head()
        return Net(
            lambda m, x: m.head(f(m, m.norm(m.stem(x)))),
            stem=nn.Conv2d(3, 12, 3, padding=1),
            norm=nn.BatchNorm2d(12),
            head=end,
            **made,
        )

    add(name, build, (2, 3, size, size), atoms=atoms)


def tokens(name, f, atoms=(12,), *, out=12, **parts):
    """7 tokens of 6 features -> a linear layer to 12 -> f -> a linear layer to 5."""

    def build():
        made = {k: v() for k, v in parts.items()}
        return Net(lambda m, x: m.head(f(m, m.stem(x))), stem=nn.Linear(6, 12), head=nn.Linear(out, 5), **made)

    add(name, build, (2, 7, 6), atoms=atoms)


def rows(name, f, atoms=(12,), *, out=12, **parts):
    """9 rows of 6 features -> a linear layer to 12 -> f -> a linear layer to 5."""

    def build():
        made = {k: v() for k, v in parts.items()}
        return Net(lambda m, x: m.head(f(m, m.stem(x))), stem=nn.Linear(6, 12), head=nn.Linear(out, 5), **made)

    add(name, build, (9, 6), atoms=atoms)


def divided(x, scale):
    """Divides in place and reads the result under its old name."""
    y = x * 2
    y.div_(scale.view(-1, 1, 1))
    return y


def conv(i, o, k=1, **options):
    return lambda: nn.Conv2d(i, o, k, **options)


def lin(i, o, **options):
    return lambda: nn.Linear(i, o, **options)


# ----------------------------------------------------------------------------------------------------------- pointwise
image("hardswish", lambda m, x: F.hardswish(x))
image("hardtanh", lambda m, x: F.hardtanh(x))
image("relu6", lambda m, x: aten.relu6(x))
image("leaky_relu", lambda m, x: F.leaky_relu(x))
image("relu_", lambda m, x: F.relu_(x))
image("sigmoid, not zero at zero", lambda m, x: x.sigmoid())
image("cos, not zero at zero, twice", lambda m, x: m.more(x.cos()).cos(), [9, 12], out=9, more=conv(12, 9))
image("masked_fill", lambda m, x: x.masked_fill(x < 0.5, 0.3))
image("where", lambda m, x: torch.where(x > 0, x, m.other(x)), other=conv(12, 12))
image("where of a number", lambda m, x: torch.where(x > 0, x, 0.5))
image("clamp", lambda m, x: x.clamp(-0.5, 0.5))
image("clamp_min", lambda m, x: x.clamp_min(0.1))
image("clamp_max", lambda m, x: x.clamp_max(0.1))
image("dropout_", lambda m, x: aten.dropout_(x.clone(), 0.5, False))
image("division by a channel vector", lambda m, x: x / m.scale.view(-1, 1, 1), scale=lambda: nn.Parameter(torch.ones(12)))
image("division in place", lambda m, x: divided(x, m.scale), scale=lambda: nn.Parameter(torch.ones(12)))
image("division by what is zero where the channel is", lambda m, x: x / x.square().sum((2, 3), keepdim=True))
image("add of a channel vector", lambda m, x: x + m.shift.view(-1, 1, 1), shift=lambda: weight(12))
image("add of a map", lambda m, x: x + m.shift, shift=lambda: weight(6, 6))
image("layer scale", lambda m, x: x + m.gamma * m.other(x), other=conv(12, 12), gamma=lambda: weight(12, 1, 1))
image("residual", lambda m, x: x + m.two(F.relu(m.one(x))), [8, 12], one=conv(12, 8), two=conv(8, 12))
image("gate of two branches", lambda m, x: m.one(x) * m.two(x), [9, 12], out=9, one=conv(12, 9), two=conv(12, 9))

# ---------------------------------------------------------------------------------------------------- the same Dims
image("alias", lambda m, x: aten.alias(x))
image("contiguous", lambda m, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
image("dropout", lambda m, x: F.dropout(x, 0.5, False))
image("to", lambda m, x: aten.to.dtype(x, torch.float64, False, True))
image("_assert_tensor_metadata", lambda m, x: x.to(torch.float32).to(torch.float64))
image("lift_fresh_copy", lambda m, x: x * torch.tensor(2.0, dtype=torch.float64))
image("clone", lambda m, x: x.clone())
image("detach", lambda m, x: x + x.detach())
image("_to_copy", lambda m, x: aten._to_copy(x, dtype=torch.float64))
image("type_as", lambda m, x: x.type_as(m.shift), shift=lambda: weight(3))
image("feature_dropout", lambda m, x: F.dropout2d(x, 0.5, False))
image("bernoulli", lambda m, x: x * torch.bernoulli((x > 0).double()))
image("alpha_dropout", lambda m, x: F.alpha_dropout(x, 0.5, False))
image("requires_grad_", lambda m, x: aten.requires_grad_(x.clone()))
image("zeros_like", lambda m, x: x + torch.zeros_like(x))
image("ones_like", lambda m, x: x + torch.ones_like(x))
image("full_like", lambda m, x: x * torch.full_like(x, 0.5))
image("empty_like", lambda m, x: x + torch.empty_like(x).fill_(0.5))
image("rand_like", lambda m, x: x + 0 * torch.rand_like(x))
image("randn_like", lambda m, x: x + 0 * torch.randn_like(x))
image("rrelu", lambda m, x: F.rrelu(x, training=False))
image("native_dropout", lambda m, x: aten.native_dropout(x, 0.5, False)[0])
image("fill", lambda m, x: x.clone().fill_(0.5) + x)
image("copy", lambda m, x: torch.empty_like(x).copy_(m.other(x)), other=conv(12, 12))

# ---------------------------------------------------------------------------------------------------------- constants
image("zeros", lambda m, x: torch.cat([x, torch.zeros(2, 4, 6, 6, dtype=x.dtype)], 1), out=16)
image("zeros added", lambda m, x: x + torch.zeros(12, 1, 1, dtype=x.dtype))
image("ones", lambda m, x: x + torch.ones(12, 1, 1, dtype=x.dtype))
image("new_zeros", lambda m, x: torch.cat([x, x.new_zeros(x.shape[0], 3, 6, 6)], 1), out=15)
image("new_ones", lambda m, x: x * x.new_ones(x.shape))
image("full", lambda m, x: x + torch.full((12, 1, 1), 0.5, dtype=x.dtype))
image("new_full", lambda m, x: x + x.new_full((12, 1, 1), 0.5))
image("empty", lambda m, x: x + torch.empty(12, 1, 1, dtype=x.dtype).fill_(0.5))
image("new_empty", lambda m, x: x + x.new_empty(12, 1, 1).fill_(0.5))
image("arange", lambda m, x: x + torch.arange(12, dtype=x.dtype).view(-1, 1, 1), [])
image("arange on positions", lambda m, x: x + torch.arange(6, dtype=x.dtype))
image("linspace", lambda m, x: x + torch.linspace(0, 1, 12, dtype=x.dtype).view(-1, 1, 1), [])
tokens("eye", lambda m, x: x @ torch.eye(12, dtype=x.dtype), [])
image("scalar_tensor", lambda m, x: x + torch.scalar_tensor(0.5, dtype=x.dtype))
image("tril_indices", lambda m, x: x + torch.tril_indices(6, 6)[0, :6].to(x.dtype))
image("triu_indices", lambda m, x: x + torch.triu_indices(6, 6)[1, :6].to(x.dtype))
image("rand", lambda m, x: x + 0 * torch.rand(6, 6, dtype=x.dtype))
image("randn", lambda m, x: x + 0 * torch.randn(12, 1, 1, dtype=x.dtype), [])

# ------------------------------------------------------------------------------------------------------------- layers
tokens("linear", lambda m, x: m.one(F.gelu(x)), [12, 20], out=20, one=lin(12, 20, bias=False))
rows(
    "bilinear", lambda m, x: m.one(x, m.other(x)), [10, 12, 15], out=10, other=lin(12, 15), one=lambda: nn.Bilinear(12, 15, 10)
)
image("conv2d", lambda m, x: F.relu(x))
image("conv, padding by name", lambda m, x: m.one(x), [12, 14], out=14, one=conv(12, 14, 3, padding="same"))
image("conv, reflected", lambda m, x: m.one(x), [12, 14], out=14, one=conv(12, 14, 3, padding=1, padding_mode="reflect"))
image("depthwise", lambda m, x: m.one(x), one=conv(12, 12, 3, groups=12))
image("depthwise, two per channel", lambda m, x: m.one(x), [2, 12], out=24, one=conv(12, 24, 3, groups=12))
image("grouped", lambda m, x: m.one(x), [3, 4, 6], out=24, one=conv(12, 24, 3, groups=4))
image("conv_transpose2d", lambda m, x: m.one(x), [12, 10], out=10, one=lambda: nn.ConvTranspose2d(12, 10, 2, stride=2))
image(
    "grouped conv_transpose2d", lambda m, x: m.one(x), [3, 4, 5], out=20, one=lambda: nn.ConvTranspose2d(12, 20, 2, 2, groups=4)
)
add(
    "conv1d", lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Conv1d(3, 10, 3), b=nn.Conv1d(10, 4, 1)), (2, 3, 9), atoms=[10]
)
add(
    "conv3d",
    lambda: Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))), a=nn.Conv3d(3, 10, 2), n=nn.BatchNorm3d(10), b=nn.Conv3d(10, 4, 1)),
    (2, 3, 4, 4, 4),
    atoms=[10],
)
add(
    "conv_transpose1d",
    lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.ConvTranspose1d(3, 10, 3), b=nn.ConvTranspose1d(10, 4, 1)),
    (2, 3, 9),
    atoms=[10],
)
add(
    "conv_transpose3d",
    lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.ConvTranspose3d(3, 10, 2), b=nn.ConvTranspose3d(10, 4, 1)),
    (2, 3, 3, 3, 3),
    atoms=[10],
)
add(
    "conv2d of one image",
    lambda: Net(lambda m, x: m.b(F.relu(m.a(x[0]))), a=nn.Conv2d(3, 10, 3), b=nn.Conv2d(10, 4, 1)),
    (2, 3, 6, 6),
    atoms=[10],
)
image(
    "conv, weight computed",
    lambda m, x: F.conv2d(x, m.w * m.g),
    [9, 12],
    out=9,
    w=lambda: weight(9, 12, 1, 1),
    g=lambda: weight(9, 1, 1, 1),
)
image("batch_norm", lambda m, x: m.one(x), one=lambda: nn.BatchNorm2d(12, affine=False))
image("batch_norm of the batch", lambda m, x: m.one(x), one=lambda: nn.BatchNorm2d(12, track_running_stats=False))
image("instance_norm", lambda m, x: m.one(x), one=lambda: nn.InstanceNorm2d(12, affine=True))
tokens("layer_norm", lambda m, x: m.one(x), one=lambda: nn.LayerNorm(12))
tokens("layer_norm without affine", lambda m, x: F.layer_norm(x, (12,)))
tokens("rms_norm", lambda m, x: m.one(x), one=lambda: nn.RMSNorm(12))
tokens("_fused_rms_norm", lambda m, x: aten._fused_rms_norm(x, [12], m.one, 1e-6)[0], one=lambda: weight(12))
image("group_norm", lambda m, x: m.one(x), [3, 4], one=lambda: nn.GroupNorm(4, 12))
image("group_norm of one group", lambda m, x: m.one(x), one=lambda: nn.GroupNorm(1, 12))
image("prelu", lambda m, x: m.one(x), one=lambda: nn.PReLU(12))
image("prelu of one slope", lambda m, x: m.one(x), one=nn.PReLU)
image(
    "squeeze-excitation",
    lambda m, x: x * m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid(),
    [8, 12],
    down=conv(12, 8),
    up=conv(8, 12),
)
image(
    "weight standardization",
    lambda m, x: F.conv2d(x, F.batch_norm(m.w.reshape(1, 9, -1), None, None, training=True).reshape_as(m.w)),
    [9, 12],
    out=9,
    w=lambda: weight(9, 12, 3, 3),
)

# ----------------------------------------------------------------------------------------------------------- products
tokens("matmul", lambda m, x: m.q(x) @ m.k(x).transpose(-1, -2) @ x, [10, 12], q=lin(12, 10), k=lin(12, 10))
tokens("matmul of a parameter", lambda m, x: x @ m.w, [9, 12], out=9, w=lambda: weight(12, 9))
tokens("matmul of a parameter transposed", lambda m, x: x @ m.w.t(), [9, 12], out=9, w=lambda: weight(9, 12))
tokens("bmm", lambda m, x: torch.bmm(m.q(x), m.k(x).transpose(1, 2)) @ x, [10, 12], q=lin(12, 10), k=lin(12, 10))
rows("mm", lambda m, x: x.mm(m.w), [9, 12], out=9, w=lambda: weight(12, 9))
rows("mv", lambda m, x: x * x.mv(m.w)[:, None], w=lambda: weight(12))
rows("dot", lambda m, x: x * m.w.dot(m.v), [12, 12], w=lambda: weight(12), v=lambda: weight(12))
rows("addmm", lambda m, x: torch.addmm(m.b, x, m.w), [9, 12], out=9, w=lambda: weight(12, 9), b=lambda: weight(9))
rows(
    "addmm, scaled",
    lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2),
    [9, 12],
    out=9,
    w=lambda: weight(12, 9),
    b=lambda: weight(9),
)
tokens(
    "baddbmm",
    lambda m, x: torch.baddbmm(m.b, m.q(x), m.k(x).transpose(1, 2)) @ x,
    [10, 12],
    q=lin(12, 10),
    k=lin(12, 10),
    b=lambda: weight(1, 7, 7),
)
tokens("einsum", lambda m, x: torch.einsum("bnc,dc->bnd", x, m.w), [9, 12], out=9, w=lambda: weight(9, 12))
tokens(
    "einsum with an ellipsis", lambda m, x: torch.einsum("...c, cd -> ...d", x, m.w), [9, 12], out=9, w=lambda: weight(12, 9)
)
tokens("einsum, implicit output", lambda m, x: torch.einsum("bic,cz", x, m.w), [9, 12], out=9, w=lambda: weight(12, 9))
tokens(
    "einsum of activations",
    lambda m, x: torch.einsum("bij,bjc->bic", torch.einsum("bic,bjc->bij", m.q(x), m.k(x)).softmax(-1), x),
    [10, 12],
    q=lin(12, 10),
    k=lin(12, 10),
)
image("einsum of a channel vector", lambda m, x: x * torch.einsum("bchw,c->bhw", x, m.w)[:, None], w=lambda: weight(12))
tokens("outer product of the features", lambda m, x: (x[..., :, None] * x[..., None, :]).flatten(2), out=144)


class GPT2Conv(nn.Module):
    """Conv1D of GPT-2: weight (in, out), through addmm."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.weight, self.bias = outputs, weight(inputs, outputs), weight(outputs)

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view((*x.size()[:-1], self.nf))


tokens(
    "Conv1D of GPT-2",
    lambda m, x: m.two(F.gelu(m.one(x))),
    [8, 12, 16],
    out=8,
    one=lambda: GPT2Conv(16, 12),
    two=lambda: GPT2Conv(8, 16),
)
tokens("one weight used twice", lambda m, x: m.one(F.gelu(m.one(x))), [12], one=lin(12, 12))
tokens("one weight used both ways", lambda m, x: F.linear(F.gelu(m.one(x)), m.one.weight.t()), [12, 20], one=lin(12, 20))
add(
    "tied embedding",
    lambda: Net(
        lambda m, i: F.linear(m.b(F.gelu(m.a(m.e(i)))), m.e.weight),
        e=nn.Embedding(11, 8),
        a=nn.Linear(8, 10),
        b=nn.Linear(10, 8),
    ),
    (2, 7),
    atoms=[8, 10],
    integers=11,
)
add(
    "embedding", lambda: Net(lambda m, i: m.a(m.e(i)), e=nn.Embedding(11, 8), a=nn.Linear(8, 4)), (2, 7), atoms=[8], integers=11
)


# ---------------------------------------------------------------------------------------------------------- attention
class Attention(nn.Module):
    """Self-attention in the forms that models have it."""

    def __init__(self, form, width=12, heads=3, each=4, groups=3):
        super().__init__()
        self.form, self.heads, self.each, self.groups = form, heads, each, groups
        self.qkv = nn.Linear(width, (heads + 2 * groups) * each)
        self.out = nn.Linear(heads * each, width)
        self.norm = nn.LayerNorm(width)
        if form == "bias table":
            self.table = weight(13, heads)
            self.register_buffer("index", torch.arange(7)[:, None] - torch.arange(7)[None] + 6)

    def forward(self, x):
        batch, n = x.shape[:2]
        y = self.qkv(self.norm(x))
        if self.form == "reshape":
            q, k, v = y.reshape(batch, n, 3, self.heads, self.each).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            pieces = y.split([self.heads * self.each, self.groups * self.each, self.groups * self.each], -1)
            q, k, v = (p.view(batch, n, -1, self.each).transpose(1, 2) for p in pieces)
        if self.form == "softmax":
            y = (q @ k.transpose(-2, -1) * self.each**-0.5).softmax(-1) @ v
        elif self.form == "bias table":
            bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        elif self.form == "expand":
            again = self.heads // self.groups
            k, v = (
                z[:, :, None].expand(batch, self.groups, again, n, self.each).reshape(batch, -1, n, self.each) for z in (k, v)
            )
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "repeat_interleave":
            k, v = (z.repeat_interleave(self.heads // self.groups, 1) for z in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                is_causal=self.form == "causal",
                enable_gqa=self.form == "gqa",
                scale=0.3 if self.form == "scaled" else None,
            )
        return x + self.out(y.transpose(1, 2).flatten(2))


def attention(name, form, atoms, **options):
    tokens(name, lambda m, x: m.block(x), atoms, block=lambda: Attention(form, **options))


attention("scaled_dot_product_attention", "split", [3, 4, 4, 12])  # heads, width of q and k, width of v, the stream
attention("attention, coarse qkv", "reshape", [3, 4, 12])
attention("attention by softmax", "softmax", [3, 4, 4, 12])
attention("attention, causal", "causal", [3, 4, 4, 12])
attention("attention, scaled", "scaled", [3, 4, 4, 12])
attention("attention with a relative position table", "bias table", [3, 4, 4, 12])
attention("grouped queries", "gqa", [3, 4, 4, 12], heads=6)
attention("grouped queries by repeat_interleave", "repeat_interleave", [3, 4, 4, 12], heads=6)
attention("grouped queries by expand", "expand", [2, 3, 4, 4, 12], heads=6)
attention("one key head", "expand", [3, 4, 4, 12], groups=1)
tokens(
    "attention of one head",
    lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), x),
    [10, 12],
    q=lin(12, 10),
    k=lin(12, 10),
)
tokens(
    "nn.MultiheadAttention",
    lambda m, x: m.one(x, x, x, need_weights=False)[0],
    [3, 4, 12, 12],
    one=lambda: nn.MultiheadAttention(12, 3, batch_first=True),
)


class Rotary(nn.Module):
    """Attention as in DINOv3: no bias of the keys, positions by rotation with periods that are a buffer, after a prefix."""

    def __init__(self, width=12, heads=3, each=8, *, bias=True, norm=False, rotary=True):
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv = nn.Linear(width, 3 * heads * each, bias=False)
        self.out = nn.Linear(heads * each, width)
        self.q_bias, self.v_bias = (weight(heads * each) if bias else None for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(heads * each) if bias else None, persistent=False)
        self.q_norm, self.k_norm = (nn.LayerNorm(each) if norm else nn.Identity() for _ in range(2))
        self.register_buffer("periods", 100 ** (torch.arange(each // 4) / each), persistent=False)

    def forward(self, x):
        batch, n = x.shape[:2]
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        y = F.linear(x, self.qkv.weight, bias)
        q, k, v = y.reshape(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = (torch.cat((z[:, :, :1], self.rotate(z[:, :, 1:])), 2).type_as(v) for z in (q, k))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def rotate(self, x):
        places = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)
        angles = torch.stack((places, places.square()), -1)[..., None] / self.periods
        sin, cos = (z.flatten(1).tile(2) for z in (angles.sin(), angles.cos()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin


def rotary(name, atoms, **options):
    tokens(name, lambda m, x: m.block(x), atoms, block=lambda: Rotary(**options))


rotary("rotary positions by periods", [2, 3, 12])  # a period of both places and both halves, heads, the stream
rotary("rotary positions without bias", [2, 3, 12], bias=False)
rotary("rotary positions after norms", [2, 3, 12], norm=True)
rotary("a concatenated bias", [3, 8, 12], rotary=False)
rotary("a concatenated bias, norms", [3, 8, 12], rotary=False, norm=True)

# ---------------------------------------------------------------------------------------------------- recurrent nets
for kind, options in (("lstm", {}), ("gru", {}), ("rnn_tanh", {}), ("rnn_relu", {"nonlinearity": "relu"})):
    family = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)
    tokens(kind, lambda m, x: m.one(x)[0], [10, 12], out=10, one=lambda f=family, o=options: f(12, 10, batch_first=True, **o))
    tokens(
        f"{kind}, two layers, two directions",
        lambda m, x: m.one(x)[0],
        [10, 12],
        out=20,
        one=lambda f=family, o=options: f(12, 10, 2, bidirectional=True, **o),
    )
tokens("lstm, last state", lambda m, x: m.one(x)[1][0][-1], [10, 12], out=10, one=lambda: nn.LSTM(12, 10, batch_first=True))
tokens("lstm without bias", lambda m, x: m.one(x)[0], [10, 12], out=10, one=lambda: nn.LSTM(12, 10, bias=False))
tokens("lstm with projections", lambda m, x: m.one(x)[0], [], out=5, one=lambda: nn.LSTM(12, 10, proj_size=5, batch_first=True))

# ------------------------------------------------------------------------------------------------------- arrangement
image("reshape", lambda m, x: x.reshape(2, 3, 4, 6, 6).reshape(2, 12, 6, 6), [3, 4])
image("view", lambda m, x: x.view(x.shape[0], 2, 6, 36).transpose(1, 2).reshape(-1, 12, 6, 6), [2, 6])
image("_unsafe_view", lambda m, x: aten._unsafe_view(x, [2, 12, 36]).unflatten(2, (6, 6)))
image("flatten", lambda m, x: x.flatten(1), out=432, head=lin(432, 5))
image("flatten of the wrong order", lambda m, x: x.permute(0, 2, 3, 1).flatten(1), head=lin(432, 5))
image("unflatten", lambda m, x: x.unflatten(1, (3, -1)).flatten(1, 2), [3, 4])
image("reshape_as", lambda m, x: m.other(x).flatten(2).reshape_as(x), other=conv(12, 12))
image("view_as", lambda m, x: m.other(x).view_as(x) + x, other=conv(12, 12))
image("reshape without common refinement", lambda m, x: x.reshape(2, 8, 9, 6).flatten(1, 2).reshape(2, 12, 6, 6), [])
image("permute", lambda m, x: m.one(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), [9, 12], out=9, one=lin(12, 9))
image("transpose", lambda m, x: m.one(x.transpose(1, -1)).transpose(1, -1), [9, 12], out=9, one=lin(12, 9))
image("swapaxes", lambda m, x: m.one(x.swapaxes(1, 3)).swapaxes(3, 1), [9, 12], out=9, one=lin(12, 9))
image("swapdims", lambda m, x: m.one(x.swapdims(1, 3)).swapdims(3, 1), [9, 12], out=9, one=lin(12, 9))
rows("t", lambda m, x: (m.w @ x.t()).t(), [12], out=9, w=lambda: weight(9, 12))
rows("numpy_T", lambda m, x: (m.w @ x.T).T, [12], out=9, w=lambda: weight(9, 12))
tokens("mT", lambda m, x: (m.w @ x.mT).mT, [12], out=9, w=lambda: weight(9, 12))
tokens("adjoint", lambda m, x: (m.w @ x.adjoint()).adjoint(), [12], out=9, w=lambda: weight(9, 12))
rows("matrix_H", lambda m, x: (m.w @ x.H).H, [12], out=9, w=lambda: weight(9, 12))
image("movedim", lambda m, x: m.one(x.movedim(1, -1)).movedim(-1, 1), [9, 12], out=9, one=lin(12, 9))
image(
    "movedim of several", lambda m, x: m.one(x.movedim((2, 3), (0, 1))).movedim((0, 1), (2, 3)), [9, 12], out=9, one=lin(12, 9)
)
image("moveaxis", lambda m, x: m.one(x.moveaxis(1, 3)).moveaxis(3, 1), [9, 12], out=9, one=lin(12, 9))
image("unsqueeze", lambda m, x: x.unsqueeze(-1).unsqueeze(1).flatten(0, 1).flatten(3))
image("squeeze", lambda m, x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze((2,)), head=lin(12, 5))
image("squeeze of all", lambda m, x: x.mean((2, 3), keepdim=True).squeeze(), head=lin(12, 5))
image("expand", lambda m, x: x * m.scale.view(1, -1, 1, 1).expand(2, -1, 6, 6), scale=lambda: weight(12))
image("expand to channels", lambda m, x: x * m.scale.expand(2, 12, 6, 6), scale=lambda: weight(1))
image("expand_as", lambda m, x: x * x.mean(1, keepdim=True).expand_as(x))
image("broadcast_to", lambda m, x: x * torch.broadcast_to(m.scale, (12, 6, 6)), scale=lambda: weight(12, 1, 1))
image("repeat", lambda m, x: x.repeat(1, 2, 1, 1), out=24)
image("repeat of more dimensions", lambda m, x: x.mean((2, 3)).repeat(3, 1, 2).sum(0), head=lin(24, 5))
image("tile", lambda m, x: x.tile((2, 1, 1)), out=24)
image("repeat_interleave", lambda m, x: x.repeat_interleave(2, 1), out=24)
image("cat", lambda m, x: torch.cat([x, m.one(x)], 1), [9, 12], out=21, one=conv(12, 9))
image("concat", lambda m, x: torch.concat([x, m.one(x)], 1), [9, 12], out=21, one=conv(12, 9))
image("concatenate", lambda m, x: aten.concatenate([x, m.one(x)], 1), [9, 12], out=21, one=conv(12, 9))
image("cat of positions", lambda m, x: torch.cat([x, m.one(x)], 2), one=conv(12, 12))
image("cat with itself", lambda m, x: torch.cat([x, x.relu(), x.tanh()], 1), out=36)
image("stack", lambda m, x: torch.stack([x, m.one(x)], 1).flatten(1, 2), out=24, one=conv(12, 12))
image("stack last", lambda m, x: torch.stack([x, m.one(x)], -1).sum(-1), one=conv(12, 12))
image("split", lambda m, x: torch.cat(x.split(5, 1)[::-1], 1), [2, 5, 5])
image("split_with_sizes", lambda m, x: torch.cat(x.split([3, 9], 1)[::-1], 1), [3, 9])
image("chunk", lambda m, x: torch.cat([x.chunk(2, 1)[1], x.chunk(2, 1)[0].relu()], 1), [6, 6])
image("chunk and multiply", lambda m, x: math.prod(x.chunk(2, 1)), [6], out=6)
image("tensor_split", lambda m, x: torch.cat(torch.tensor_split(x, (3, 7), 1)[::-1], 1), [3, 4, 5])
image("unsafe_chunk", lambda m, x: torch.cat(torch.unsafe_chunk(x, 3, 1)[::-1], 1), [4, 4, 4])
image("unsafe_split", lambda m, x: torch.cat(torch.unsafe_split(x, 8, 1)[::-1], 1), [4, 8])
image("hsplit", lambda m, x: torch.cat(torch.hsplit(x, [4])[::-1], 1), [4, 8])
rows("vsplit", lambda m, x: torch.cat(torch.vsplit(x, [4])[::-1], 0))
rows("hsplit of rows", lambda m, x: torch.cat(torch.hsplit(x, 3)[::-1], 1), [4, 4, 4])
image("glu", lambda m, x: F.glu(x, 1), [6], out=6)
image("slice", lambda m, x: torch.cat([x[:, :3].relu(), x[:, 3:-2], x[:, -2:]], 1), [2, 3, 7])
image("slice of positions", lambda m, x: x[:, :, 1:-1, ::2])
image("slice that loses channels", lambda m, x: x[:, 4:], [4, 8], out=8)
image("slice by a step", lambda m, x: torch.cat([x[:, ::2].relu(), x[:, 1::2]], 1), [6])
image("slice by a step from the middle", lambda m, x: x[:, 4::2], [], out=4)
image("slice that is a residual", lambda m, x: torch.cat([x[:, :4] + m.one(x[:, 4:]), x[:, 4:]], 1), [4, 8], one=conv(8, 4))
image("narrow", lambda m, x: torch.cat([x.narrow(1, 0, 4), x.narrow(1, 4, 8).relu()], 1), [4, 8])
image("narrow from the end", lambda m, x: torch.cat([x.narrow(1, -4, 4), x.narrow(1, -12, 8).relu()], 1), [4, 8])
image("select", lambda m, x: x[:, 3][:, None] * x, [])
image("select of a position", lambda m, x: x[:, :, 2], head=lambda: nn.Conv1d(12, 5, 1))
image("unbind", lambda m, x: torch.stack(x.unbind(1)[::-1], 1), [])
image("unbind of positions", lambda m, x: sum(x.unbind(2))[..., None])
image("index", lambda m, x: x[:, torch.tensor([0, 3, 5])], [], out=3)
image("index of positions", lambda m, x: x[:, :, torch.tensor([[0, 3], [4, 5]])].flatten(2, 3))
image("index_select", lambda m, x: x.index_select(1, torch.tensor([1, 4])), [], out=2)
image("index_select of positions", lambda m, x: x.index_select(2, torch.tensor([1, 4])))
image("roll", lambda m, x: x.roll(1, 1), [])
image("roll of positions", lambda m, x: x.roll((1, 2), (2, 3)))
image("flip", lambda m, x: x.flip(1), [])
image("flip of positions", lambda m, x: x.flip((2, 3)))
image("cumsum", lambda m, x: x.cumsum(1), [])
image("cumsum of positions", lambda m, x: x.cumsum(2))
image("cumprod", lambda m, x: x.cumprod(-1))
image("logcumsumexp", lambda m, x: x.logcumsumexp(3))
tokens("gather", lambda m, x: x.gather(1, m.at), [], at=lambda: nn.Buffer(torch.arange(168).view(2, 7, 12) % 7))
tokens("gather of the first token", lambda m, x: x.gather(1, torch.zeros(2, 7, 12, dtype=torch.long)))
tokens("gather of tokens", lambda m, x: x.gather(1, x.argsort(1)))
tokens("take_along_dim", lambda m, x: torch.take_along_dim(x, x.argsort(1), 1))
image("constant_pad_nd", lambda m, x: aten.constant_pad_nd(x, [1, 1, 0, 0, 2, 3], 0.5), out=17)
image("pad", lambda m, x: F.pad(x, (1, 1, 1, 1)))
image("pad of channels", lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 4)) + m.one(x), [4, 12], out=16, one=conv(12, 16))
image("triu", lambda m, x: x.triu())
image("tril", lambda m, x: x.tril(1))
tokens("triu of channels", lambda m, x: x.triu(), [])
image("diagonal", lambda m, x: x.diagonal(0, 2, 3)[..., None], [])
image("unfold", lambda m, x: x.unfold(2, 2, 2).sum(-1))
image("unfold of channels", lambda m, x: x.unfold(1, 3, 3).sum(-1), [], out=4)
image("im2col", lambda m, x: F.unfold(x, 3)[..., None], out=108)
image("col2im", lambda m, x: F.fold(m.one(F.unfold(x, 2, stride=2).mT).mT, 6, 2, stride=2), [9, 12], out=9, one=lin(48, 36))
image("pixel_shuffle", lambda m, x: F.pixel_shuffle(x, 2), [3], out=3)
image("pixel_unshuffle", lambda m, x: F.pixel_unshuffle(x, 2), out=48)
image("channel_shuffle", lambda m, x: F.channel_shuffle(x, 3), [4])
image("native_channel_shuffle", lambda m, x: aten.native_channel_shuffle(x, 4), [3])
image("shuffle by reshape", lambda m, x: x.view(-1, 3, 4, 6, 6).transpose(1, 2).reshape(-1, 12, 6, 6), [3, 4])
image(
    "shuffle of two halves",
    lambda m, x: torch.cat(x.chunk(2, 1), 1).view(2, 2, 6, 6, 6).transpose(1, 2).reshape(2, 12, 6, 6).chunk(2, 1)[1],
    [3, 3],
    out=6,
)

# -------------------------------------------------------------------------------------------------------- reductions
image("softmax", lambda m, x: x.softmax(1))
image("softmax of positions", lambda m, x: x.softmax(-1))
image("log_softmax", lambda m, x: x.log_softmax(1))
image("_softmax", lambda m, x: aten._softmax(x, 1, False))
image("_log_softmax", lambda m, x: aten._log_softmax(x, 1, False))
image("normalize", lambda m, x: F.normalize(x, dim=1))
image("cosine_similarity", lambda m, x: x * F.cosine_similarity(x, m.one(x), 1)[:, None], one=conv(12, 12))
image("cosine_similarity of positions", lambda m, x: F.cosine_similarity(x, m.one(x), 2)[..., None], one=conv(12, 12))
for kind in ("mean", "sum", "amax", "amin", "var", "std", "logsumexp"):
    image(kind, lambda m, x, k=kind: x * getattr(torch, k)(x.sigmoid(), 1, keepdim=True))
    image(f"{kind} of positions", lambda m, x, k=kind: getattr(torch, k)(x, (2, 3)), head=lin(12, 5))
image("mean of all", lambda m, x: x - x.mean())
image("mean of channels and positions", lambda m, x: x - x.cos().mean((1, 2, 3), keepdim=True))
image("mean of one channel dimension, dropped", lambda m, x: x * x.cos().mean(1)[:, None])
image("std without correction", lambda m, x: x / torch.std(x, (1, 2), correction=0, keepdim=True))
image("linalg_vector_norm", lambda m, x: x / torch.linalg.vector_norm(x.cos(), dim=1, keepdim=True))
image("norm", lambda m, x: x / aten.norm.ScalarOpt_dim(x.cos(), 2, [1], True))
image("prod", lambda m, x: x * x.cos().prod(1, keepdim=True))
image("var_mean", lambda m, x: sum(torch.var_mean(x, 1, keepdim=True)) * x)
image("std_mean", lambda m, x: sum(torch.std_mean(x, 1, keepdim=True)) * x)
image("any", lambda m, x: x * (x > 1).any(1, keepdim=True))
image("all", lambda m, x: x * (x > -1).all(1, keepdim=True))
image("max", lambda m, x: x * x.max(1, keepdim=True).values, [])
image("max of positions", lambda m, x: x.max(2).values[..., None])
image("max of two", lambda m, x: torch.max(x, m.one(x)), one=conv(12, 12))
image("max of all", lambda m, x: x / x.max(), [])
image("min", lambda m, x: x.min(-1).values[..., None])
image("argmax", lambda m, x: x * x.argmax(2, keepdim=True))
image("argmin", lambda m, x: x * x.argmin(1, keepdim=True), [])
image("median", lambda m, x: x.median(2).values[..., None])
image("sort", lambda m, x: x.sort(1).values, [])
image("sort of positions", lambda m, x: x.sort().values)
image("topk", lambda m, x: x.topk(3, 1).values, [], out=3)
image("topk of positions", lambda m, x: x.topk(2).values)
image("argsort", lambda m, x: x * x.argsort(2))
tokens("msort", lambda m, x: x.msort())
rows("msort of channels", lambda m, x: x.t().msort().t(), [])

# ---------------------------------------------------------------------------------------------------------- positions
for kind, options in {
    "adaptive_avg_pool1d": (3,), "adaptive_max_pool1d": (3,), "avg_pool1d": (2,), "max_pool1d": (2,),
}.items():  # fmt: skip
    tokens(kind, lambda m, x, k=kind, o=options: getattr(F, k)(x.mT, *o).mT)
tokens("upsample_nearest1d", lambda m, x: F.interpolate(x.mT, scale_factor=2).mT)
tokens("upsample_linear1d", lambda m, x: F.interpolate(x.mT, 9, mode="linear").mT)
for kind, options in {
    "adaptive_avg_pool2d": (2,), "adaptive_max_pool2d": (2,), "avg_pool2d": (2,), "max_pool2d": (2,), "lp_pool2d": (2, 2),
}.items():  # fmt: skip
    image(kind, lambda m, x, k=kind, o=options: getattr(F, k)(x, *o))
image("max_pool2d_with_indices", lambda m, x: aten.max_pool2d_with_indices(x, [2, 2])[0])
image("upsample_nearest2d", lambda m, x: F.interpolate(x, scale_factor=2))
image("upsample_bilinear2d", lambda m, x: F.interpolate(x, 9, mode="bilinear"))
image("upsample_bicubic2d", lambda m, x: F.interpolate(x, 9, mode="bicubic"))
image("_upsample_nearest_exact2d", lambda m, x: F.interpolate(x, 9, mode="nearest-exact"))
image("_upsample_bilinear2d_aa", lambda m, x: F.interpolate(x, 9, mode="bilinear", antialias=True))
image("_upsample_bicubic2d_aa", lambda m, x: F.interpolate(x, 9, mode="bicubic", antialias=True))
for kind, sample in {"grid_sampler": aten.grid_sampler, "grid_sampler_2d": aten.grid_sampler_2d}.items():
    image(kind, lambda m, x, f=sample: f(x, m.one(x).permute(0, 2, 3, 1).tanh(), 0, 0, False), one=conv(12, 2))
image("reflection_pad2d", lambda m, x: aten.reflection_pad2d(x, [1, 1, 1, 1]))
image("replication_pad2d", lambda m, x: aten.replication_pad2d(x, [1, 1, 1, 1]))


def volume(name, f):
    add(
        name,
        lambda: Net(lambda m, x: m.b(f(m.a(x))), a=nn.Conv3d(3, 10, 1), b=nn.Conv3d(10, 4, 1)),
        (2, 3, 4, 4, 4),
        atoms=[10],
    )


volume("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 2))
volume("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 2))
volume("avg_pool3d", lambda x: F.avg_pool3d(x, 2))
volume("max_pool3d", lambda x: F.max_pool3d(x, 2))
volume("upsample_trilinear3d", lambda x: F.interpolate(x, 5, mode="trilinear"))
volume("upsample_nearest3d", lambda x: F.interpolate(x, scale_factor=2))

# ------------------------------------------------------------------------------------------------- operators unknown
image("an operator without a rule", lambda m, x: torch.fft.fft2(x).real, [])
add(
    "two inputs",
    lambda: Two(lambda m, x, y: m.c(m.a(x) + m.b(y)), a=nn.Linear(6, 12), b=nn.Linear(4, 12), c=nn.Linear(12, 5)),
    (3, 6),
    (3, 4),
    atoms=[12],
)


ANY_BATCH = {
    "view", "flatten", "unflatten", "reshape_as", "shuffle by reshape", "new_zeros", "new_ones", "expand_as", "repeat", "chunk",
    "slice", "pad", "cat", "attention by softmax", "scaled_dot_product_attention", "grouped queries by expand", "one key head",
    "Conv1D of GPT-2", "squeeze", "lstm", "weight standardization",
}  # fmt: skip
"""Cases traced with a free batch, and run with another one; to trace the others so would take three times as long."""


LEFT_WHOLE = {
    "division by a channel vector": ["scale"],
    "division in place": ["scale"],
    "division by what is zero where the channel is": None,
    "rotary positions by periods": ["block.periods"],
    "rotary positions without bias": ["block.periods"],
}
"""Divisors, which the plain masked model must not have zero: what they divide is. None: it divides zero by zero."""


@cache
def analysed(name):
    case = CASES[name]
    generator = torch.Generator().manual_seed(1)
    if case.integers:
        inputs = tuple(torch.randint(case.integers, shape, generator=generator) for shape in case.shapes)
    else:
        inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes)
    model = stir(case.build())
    return model, inputs, Analysis(trace(model, inputs, dynamic=(0,) if name in ANY_BATCH else ()))


@pytest.mark.parametrize("name", CASES)
def test_the_cut_model_is_the_masked_one(name):
    model, inputs, analysis = analysed(name)
    if name in RULES:
        assert name.rstrip("_") in {operator_name(n).rstrip("_") for n in analysis.trace.graph.nodes}
    atoms = analysis.prunable()
    assert sorted(analysis.algebra.sizes[a] for a in atoms) == CASES[name].atoms
    groups = channel_groups(analysis)
    assert [g.atom for g in groups] == atoms
    for kept in (halves(analysis, atoms, 3), uneven(analysis, atoms, 5)):
        cut = Cut(analysis, kept)
        checked = verify(cut, tolerance=1e-6 if name == "_assert_tensor_metadata" else EXACT)
        small = cut_graph(cut, forward_names(model))
        with torch.no_grad():
            outputs = small(*inputs)
            agree(outputs, checked.outputs[0])
            whole = LEFT_WHOLE.get(name, [])
            if whole is not None and not any(g.renormalized for g in groups):
                agree(outputs, masked(model, cut, whole)(*inputs), 1e-6 if name == "_assert_tensor_metadata" else EXACT)
        if name in ANY_BATCH:
            assert torch.allclose(small(*(x[:1].repeat(5, *[1] * (x.ndim - 1)) for x in inputs))[3:4], outputs[:1])
        now = {n: tuple(p.shape) for n, p in small.named_parameters()}
        assert all(now[n] == tuple(cut.slice(n, p).shape) for n, p in model.named_parameters() if n in now)


UNREACHED = {"_assert_scalar", "_assert_async", "sym_constrain_range_for_size"}
"""Operators of the table that occur only in traces with sizes that depend on values."""


def test_every_rule_has_a_case():
    assert set(RULES) - UNREACHED - set(CASES) == set()


# ---------------------------------------------------------------------------------------------------------- mutations
def residual_net():
    return Net(
        lambda m, x: m.head((m.stem(x) + m.two(F.relu(m.norm(m.one(m.stem(x)))))).mean((2, 3))),
        stem=nn.Conv2d(3, 8, 3, padding=1),
        one=nn.Conv2d(8, 10, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(10),
        two=nn.Conv2d(10, 8, 1),
        head=nn.Linear(8, 5),
    )


def attention_net():
    return Net(
        lambda m, x: m.head(m.block(m.stem(x))), stem=nn.Linear(6, 12), block=Attention("softmax"), head=nn.Linear(12, 5)
    )


def grouped_net():
    return Net(
        lambda m, x: m.head(F.glu(m.two(F.channel_shuffle(F.relu(m.norm(m.one(m.stem(x)))), 4)), 1)),
        stem=nn.Conv2d(3, 8, 1),
        one=nn.Conv2d(8, 24, 3, groups=4),
        norm=nn.BatchNorm2d(24),
        two=nn.Conv2d(24, 20, 1),
        head=nn.Conv2d(10, 5, 1),
    )


MUTATED = {
    "residual": (residual_net, (2, 3, 5, 5)),
    "attention": (attention_net, (2, 7, 6)),
    "grouped": (grouped_net, (2, 3, 5, 5)),
}


def partition(analysis):
    """What can be pruned of the parameters, with atoms numbered as they occur; what stays is told by its size alone."""
    numbers: dict[int, int] = {}
    prunable, sizes = set(analysis.prunable()), analysis.algebra.sizes

    def canonical(dim):
        return tuple(tuple(one(f) for f in segment) for segment in analysis.algebra.normal(dim))

    def one(factor):
        if not isinstance(factor, int):
            return canonical(factor)
        return ("kept", sizes[factor]) if factor not in prunable else (numbers.setdefault(factor, len(numbers)), sizes[factor])

    return {name: [canonical(d) for d in analysis.parameter_dims[name]] for name in analysis.used_parameters()}


@pytest.mark.parametrize("name", MUTATED)
def test_verification_notices_a_dropped_equality(name, monkeypatch):
    """Leaves out one unify at a time; whatever then says something else of the parameters must be refused."""
    build, shape = MUTATED[name]
    model = stir(build())
    traced = trace(model, torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dynamic=())
    right = Analysis.unify
    calls, left_out = 0, -1

    def unify(self, left, right_dim, node):
        nonlocal calls
        calls += 1
        if calls - 1 != left_out:
            right(self, left, right_dim, node)

    monkeypatch.setattr(Analysis, "unify", unify)
    truth = partition(Analysis(traced))
    total, caught, redundant, missed = calls, 0, 0, []
    assert total >= 6
    for left_out in range(total):
        calls = 0
        mutant = Analysis(traced)
        if partition(mutant) == truth:
            redundant += 1
            continue
        atoms = mutant.prunable()
        try:
            for seed in (1, 2):
                verify(Cut(mutant, halves(mutant, atoms, seed)), tolerance=EXACT)
                verify(Cut(mutant, uneven(mutant, atoms, seed)), tolerance=EXACT)
        except ShrinkError:
            caught += 1
        else:
            missed.append(left_out)
    assert missed == []
    assert caught >= 8
    assert caught + redundant == total
