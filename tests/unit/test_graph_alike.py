"""One graph for both modes, shown without a trace in training mode: what counts as alike, and what never does."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import microglia as mg
from microglia.graph.cutting import live
from microglia.graph.cutting.alike import alike_in_training
from microglia.graph.cutting.graph_model import graph_model
from microglia.graph.cutting.parts import double_copy
from microglia.graph.dims.trace import trace


class Attention(nn.Module):
    """Sizes in its code, so that only its graph can be cut; dropout and batch norm follow the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)
        y = F.dropout(self.out(heads.transpose(1, 2).reshape(x.shape[0], 5, 16)), 0.1, self.training)
        return self.norm(y.transpose(1, 2))


class Changed(Attention):
    """The attention with a change of its value that the subclass makes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.change(super().forward(x))

    def change(self, y: Tensor) -> Tensor:
        return y


class OwnCode(Changed):
    def change(self, y: Tensor) -> Tensor:
        return y * 2 if self.training else y


class AlwaysDrops(Changed):
    def change(self, y: Tensor) -> Tensor:
        return F.dropout(y, 0.5, training=True)


class DrawsPython(Changed):
    def change(self, y: Tensor) -> Tensor:
        return y * 2 if self.training and random.random() < 0.0 else y


class AddsNoise(Changed):
    def change(self, y: Tensor) -> Tensor:
        return y + torch.randn_like(y) if self.training else y


class OtherNumber(Changed):
    def change(self, y: Tensor) -> Tensor:
        return F.leaky_relu(y, 0.1 if self.training else 0.2)


class OtherInput(Changed):
    def change(self, y: Tensor) -> Tensor:
        first, second = y + 1, y + 1
        return torch.relu(first if self.training else second) + first + second


class OtherPart(Changed):
    def change(self, y: Tensor) -> Tensor:
        parts = y.chunk(2, 1)
        return torch.relu(parts[self.training])


class FrozenNorm(Changed):
    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.norm.train(False)
        return self


class Keeps(Changed):
    """Keeps in evaluation mode what it computes from a parameter once, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.kept = nn.Parameter(torch.ones(16)), None

    def train(self, mode: bool = True) -> Keeps:
        self.kept = None
        return super().train(mode)

    def change(self, y: Tensor) -> Tensor:
        if self.training:
            return y + self.bias.exp()[:, None]
        if self.kept is None:
            self.kept = self.bias.exp()[:, None].detach()
        return y + self.kept


NOT_ALIKE = [OwnCode, AlwaysDrops, DrawsPython, AddsNoise, OtherNumber, OtherInput, OtherPart, FrozenNorm, Keeps]


def test_mode_arguments_alone_are_alike() -> None:
    assert alike_in_training(Attention(), torch.randn(2, 5, 16))
    assert alike_in_training(Attention().eval(), torch.randn(1, 5, 16))
    assert alike_in_training(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).linear1, torch.randn(2, 16))


@pytest.mark.parametrize("kind", NOT_ALIKE)
def test_code_of_one_mode_is_not(kind: type[nn.Module]) -> None:
    assert not alike_in_training(kind(), torch.randn(2, 5, 16))


def test_a_model_that_does_not_run_is_not() -> None:
    assert not alike_in_training(Attention(), torch.randn(2, 5, 17))


def test_nothing_of_the_model_changes() -> None:
    model, x = Keeps().eval(), torch.randn(2, 5, 16)
    model(x)
    before, kept, state = {k: v.clone() for k, v in model.state_dict().items()}, model.kept, torch.get_rng_state()
    alike_in_training(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.kept is kept
    assert not model.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("kind", "traces"), [(Attention, 2), (OwnCode, 3)])
def test_the_trace_in_training_mode_is_made_where_it_is_needed(
    kind: type[nn.Module], traces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trace = [], live.trace
    monkeypatch.setattr(live, "trace", lambda *a, **k: made.append(k) or trace(*a, **k))
    small = mg.prune_channels(kind(), torch.randn(2, 5, 16), mg.Budget(density=0.5), round_to=1)
    assert len(made) == traces
    small.train()
    x = torch.randn(3, 5, 16)
    assert not torch.equal(small(x), small(x))  # dropout follows the mode of the graph
    assert small.state_dict()["norm.num_batches_tracked"] == 2


class NoisyInTraining(nn.Module):
    """Adds in training a value whose type it states."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x[:, :4])
        if self.training:
            x = x + torch.zeros(x.shape[0], 1, dtype=x.dtype).bernoulli_(0.5)
        return x * torch.ones(1, dtype=x.dtype)


def test_types_are_read_from_traces_with_a_fixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = NoisyInTraining().eval(), torch.randn(1, 4)
    wide = trace(double_copy(model), x.double(), dynamic=())
    batches = []
    original = live.trace

    def counted(*args: Any, **options: Any) -> Any:
        batches.append(options["dynamic"])
        return original(*args, **options)

    monkeypatch.setattr(live, "trace", counted)
    small = graph_model(model, ((x,), {}), {}, (0,), wide=wide)
    assert batches == [(0,), (0,), ()]
    assert not any("another precision" in note for note in small.microglia_notes)
    double = small.double()
    assert double.train()(torch.randn(3, 4).double()).dtype == torch.float64
    assert double.eval()(torch.randn(3, 4).double()).dtype == torch.float64
