"""`shrink`: what masked channels still add is folded, or they stay and the plan says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graph_checks import agree, stir
from microglia import Budget, mask, prune_channels
from microglia.graph import ShrinkError, plan_of, shrink

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Divided(nn.Module):
    """Channels divided by a learned scale each."""

    def __init__(self):
        super().__init__()
        self.one, self.head = nn.Linear(6, 16), nn.Linear(16, 5)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 16))

    def forward(self, x):
        return self.head(self.one(x) / self.scale)


class DividedInPlace(Divided):
    """The same, written over what a view of it reads later."""

    def forward(self, x):
        channels = self.one(x)
        rows = channels.unsqueeze(1)
        channels.div_(self.scale)
        return self.head(rows)


class WritesItsInput(Divided):
    def forward(self, x):
        return self.head(self.one(x.mul_(2).add_(1)) / self.scale)


class Padded(nn.Module):
    """Masked channels are constants that a convolution reads, behind zeros or, with ``positions``, not the same everywhere."""

    def __init__(self, positions):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=0 if positions else 1), nn.Linear(8, 5)
        self.place = nn.Parameter(torch.randn(8, 8, 8)) if positions else 0.0

    def forward(self, x):
        return self.head(self.two(self.one(x) + self.place).mean((2, 3)))


class Scores(nn.Module):
    """Masked channels of both factors meet in a product without weights: what their biases add there is in no layer."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(7, 5)

    def forward(self, x):
        return self.head(self.query(x) @ self.key(x).T)


class Functional(nn.Module):
    """A weight that no layer holds."""

    def __init__(self):
        super().__init__()
        self.one, self.weight = nn.Linear(6, 16), nn.Parameter(torch.randn(5, 16))

    def forward(self, x):
        return F.linear(self.one(x), self.weight)


def half_masked(model, *names):
    """Every second channel of the layers masked, biases left."""
    torch.manual_seed(0)
    model.eval()
    for name in names:
        weight = model.get_parameter(name)
        keep = torch.ones_like(weight, dtype=torch.bool)
        keep[::2] = False
        mask(model, {name: keep})
    return model


def note_of(model):
    return " ".join(plan_of(model).notes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Divided, DividedInPlace])
def test_channels_that_a_parameter_divides_are_removed(kind, bias):
    torch.manual_seed(0)
    model = half_masked(kind(), "one.weight")
    if not bias:
        model.one.bias.data[::2] = 0
    small = shrink(model, X)
    assert len(small.scale) == small.one.out_features == small.head.in_features == 8
    assert torch.allclose(small(X), model(X), atol=1e-6)
    assert plan_of(small).notes == ()


@pytest.mark.parametrize("kind", [Divided, DividedInPlace])
def test_a_divisor_of_zero_is_named(kind):
    model = half_masked(kind(), "one.weight")
    model.scale.data[::2] = 0
    small = shrink(model, X)
    assert small.one.out_features == 16
    assert "8 because the masked model itself makes them infinite or NaN" in note_of(small)
    assert "padding" not in note_of(small)
    cleared = shrink(model, X, clear=True)
    assert cleared.one.out_features == 8
    assert torch.isfinite(cleared(X)).all()


def test_what_is_written_in_place_is_seen_by_its_views():
    """Zero divided by zero must be taken out of the view too, or the reference itself would be NaN."""
    torch.manual_seed(0)
    small = prune_channels(DividedInPlace().eval(), X, Budget(density=0.5), round_to=1)
    assert small.head.in_features == 8
    assert plan_of(small).error < 1e-10


def test_a_model_that_writes_its_input():
    torch.manual_seed(0)
    model, given = WritesItsInput().eval().double(), X.double()
    small = prune_channels(model, given, Budget(density=0.5), round_to=1)
    assert plan_of(small).kind == "module"
    assert torch.equal(given, X.double())


@pytest.mark.parametrize(
    ("positions", "reason"),
    [(False, "two.weight reads behind zero padding"), (True, "not constant where two.weight reads them")],
)
def test_why_constants_stay(positions, reason):
    model = half_masked(Padded(positions), "one.weight")
    small = shrink(model, IMAGES)
    assert small.one.out_channels == 8
    assert "4 of 4 masked channels stay, for what they still add cannot be folded into a bias: 4 because they are" in note_of(
        small
    )
    assert reason in note_of(small)
    assert shrink(model, IMAGES, clear=True).one.out_channels == 4


def test_a_reader_that_takes_no_bias_is_named():
    small = shrink(half_masked(Functional(), "one.weight"), X)
    assert small.one.out_features == 16
    assert "weight is not the weight of a linear layer or convolution" in note_of(small)


def test_what_is_in_no_layer_is_refused():
    model = half_masked(Scores(), "query.weight", "key.weight")
    with pytest.raises(ShrinkError, match="no bias can carry"):
        shrink(model, X)
    model.query.bias.data[::2] = 0
    small = shrink(model, X)
    assert small.query.out_features == small.key.out_features == 4
    assert torch.allclose(small(X), model(X), atol=1e-6)


def test_a_layer_that_is_given_a_bias_loses_its_own_channels_too():
    """Its new bias is of nothing that was masked: it says nothing about which outputs stay."""
    model = stir(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        model[0].weight[:4] = model[2].weight[:4] = 0
        model[0].bias[:4] = 0.5
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = shrink(model, x)
    assert [tuple(layer.weight.shape) for layer in (small[0], small[2], small[4])] == [(4, 6), (4, 4), (3, 4)]
    assert plan_of(small).parameters[1] == sum(p.numel() for p in small.parameters())
    agree(small(x), model(x))
