"""MACs against closed forms, and each product under the right weight."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from microglia.core.errors import MicrogliaError
from microglia.measure import count_macs


class Keep(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return torch.where(self.mask, weight, 0.0)


def ones(model):
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model


@st.composite
def convolutions(draw):
    dimensions = draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 3)] * dimensions)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    if draw(st.booleans()):
        groups = inputs
        outputs = inputs * draw(st.integers(1, 2))
    geometry = {
        "kernel_size": draw(each),
        "stride": draw(each),
        "padding": tuple(p - 1 for p in draw(each)),
        "dilation": draw(each),
    }
    size = draw(st.tuples(*[st.integers(3, 7)] * dimensions))
    return dimensions, inputs, outputs, groups, geometry, size


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.booleans(), st.integers(1, 3))
def test_convolution_closed_form(case, bias, batch):
    dimensions, inputs, outputs, groups, geometry, size = case
    produced = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, *(geometry[key] for key in geometry), strict=True)
    ]
    assume(min(produced) > 0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    model = ones(kind(inputs, outputs, groups=groups, bias=bias, **geometry))
    counted = count_macs(model, torch.randn(batch, inputs, *size))
    expected = math.prod(geometry["kernel_size"]) * (inputs // groups) * outputs * math.prod(produced)
    assert counted.layers == {"weight": expected}
    assert counted.total == counted.effective == expected
    assert counted.other == 0
    assert counted.speedup == 1


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_transposed_convolution_closed_form(case):
    dimensions, inputs, outputs, groups, geometry, size = case
    made = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in zip(size, *(geometry[key] for key in geometry), strict=True)
    ]
    assume(min(made) > 0)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    counted = count_macs(ones(kind(inputs, outputs, groups=groups, **geometry)), torch.randn(2, inputs, *size))
    expected = math.prod(size) * math.prod(geometry["kernel_size"]) * inputs * outputs // groups
    assert counted.layers == {"weight": expected}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans())
def test_linear_closed_form(inputs, outputs, leading, bias):
    counted = count_macs(nn.Linear(inputs, outputs, bias=bias), torch.randn(*leading, inputs))
    assert counted.layers == {"weight": inputs * outputs * math.prod(leading[1:])}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**31))
def test_speedup_of_a_layer_is_one_over_its_density(kept, seed):
    mask = torch.zeros(60, dtype=torch.bool)
    mask[torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    model = nn.Sequential(nn.Linear(12, 5))
    parametrize.register_parametrization(model[0], "weight", Keep(mask.view(5, 12)))
    counted = count_macs(model, torch.randn(4, 12))
    assert counted.layers == {"0.weight": 60}
    assert counted.entries == {"0.weight": (60, kept)}
    assert counted.effective == kept
    assert counted.speedup == 60 / kept
    parametrize.remove_parametrizations(model[0], "weight")
    assert count_macs(model, torch.randn(4, 12)).speedup == 60 / kept


def test_densities_weigh_by_macs_and_scores_stay():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = ones(nn.Linear(8, 6, bias=False)), ones(nn.Linear(6, 2, bias=False))

        def forward(self, tokens):
            hidden = self.wide(tokens)
            return self.narrow((hidden @ hidden.mT) @ hidden)

    model = Scores()
    with torch.no_grad():
        model.wide.weight[:3] = 0
        model.narrow.weight[:, :2] = 0
    counted = count_macs(model, torch.randn(2, 5, 8))
    assert counted.layers == {"wide.weight": 5 * 48, "narrow.weight": 5 * 12}
    assert counted.other == 2 * 5 * 5 * 6
    assert counted.total == 240 + 60 + 300
    assert counted.effective == 240 / 2 + 60 * 2 / 3 + 300
    assert counted.speedup == 600 / 460


def test_nothing_left_is_infinite_and_null_in_json():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    counted = count_macs(model, torch.randn(1, 3))
    assert counted.speedup == math.inf
    assert counted.to_dict()["speedup"] is None
    assert count_macs(nn.ReLU(), torch.randn(1, 3)).speedup == 1


def test_a_module_called_twice_counts_twice_and_tied_weights_are_one_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.alias = self.block
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.alias(self.block(self.embedding(tokens))))

    counted = count_macs(Twice(), torch.zeros(3, 5, dtype=torch.long))
    assert counted.layers == {"block.weight": 2 * 5 * 16, "head.weight": 5 * 28}


class Functional(nn.Module):
    """The same weight through functions, slices, transposes, copies and reparametrizations."""

    def __init__(self, use):
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.use = use

    def forward(self, x):
        return self.use(x, self.layer.weight, self.layer.bias)


USES = {
    "linear": (F.linear, 24),
    "half of it": (lambda x, w, b: F.linear(x, w[:3], b[:3]), 12),
    "second half": (lambda x, w, b: F.linear(x, w[3:]), 12),
    "chunks": (lambda x, w, b: torch.cat([F.linear(x, part) for part in w.chunk(3)], 1), 24),
    "transposed": (lambda x, w, b: x @ w.t(), 24),
    "weight first": (lambda x, w, b: (w @ x.t()).t(), 24),
    "vector": (lambda x, w, b: torch.stack([torch.mv(w, row) for row in x]), 24),
    "vector and bias": (lambda x, w, b: torch.stack([torch.addmv(b, w, row) for row in x]), 24),
    "dot": (lambda x, w, b: torch.stack([torch.dot(w[0], row) for row in x]), 4),
    "einsum": (lambda x, w, b: torch.einsum("ni,oi->no", x, w), 24),
    "batched": (lambda x, w, b: torch.einsum("nsi,oi->nso", x[:, None], w), 24),
    "expanded": (lambda x, w, b: torch.bmm(x[:, None], w.t().expand(len(x), 4, 6)), 24),
    "copied": (lambda x, w, b: F.linear(x, w.clone().contiguous()), 24),
    "cast": (lambda x, w, b: F.linear(x.double(), w.double()), 24),
    "as convolution": (lambda x, w, b: F.conv1d(x[..., None], w[..., None]), 24),
    "standardized": (lambda x, w, b: F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)), 24),
    "times a constant": (lambda x, w, b: F.linear(x, w * 0.5 + 0), 24),
    "twice": (lambda x, w, b: F.linear(F.linear(x, w), w.t()), 48),
}


@pytest.mark.parametrize("use", USES)
def test_functional_uses_belong_to_the_weight(use):
    function, expected = USES[use]
    counted = count_macs(Functional(function), torch.randn(5, 4))
    assert counted.layers == {"layer.weight": expected}
    assert counted.other == 0


@pytest.mark.parametrize("use", USES)
def test_functional_uses_belong_to_the_masked_weight(use):
    function, expected = USES[use]
    model = Functional(function)
    mask = torch.rand(6, 4) < 0.5
    parametrize.register_parametrization(model.layer, "weight", Keep(mask))
    counted = count_macs(model, torch.randn(5, 4))
    assert counted.layers == {"layer.weight": expected}
    assert counted.entries == {"layer.weight": (24, int(mask.sum()))}


def test_a_bias_or_an_activation_of_the_same_size_is_no_weight():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            scaled = x * self.scale
            return torch.addmm(self.scale, scaled, scaled)

    counted = count_macs(Plain(), torch.randn(4, 4), batch=1)
    assert counted.layers == {}
    assert counted.total == counted.other == 64


@pytest.mark.parametrize("gates", [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers(gates):
    kind, count = gates
    model = kind(5, 7, batch_first=True)
    enabled = torch.backends.mkldnn.enabled
    counted = count_macs(model, torch.randn(2, 6, 5))
    assert counted.layers == {"weight_ih_l0": 6 * count * 35, "weight_hh_l0": 6 * count * 49}
    assert torch.backends.mkldnn.enabled == enabled


@pytest.mark.parametrize("weights", [True, False])
def test_attention(weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens):
            return self.attention(tokens, tokens, tokens, need_weights=weights)[0]

    counted = count_macs(Attention(), torch.randn(3, 5, 8))
    assert counted.layers == {"attention.in_proj_weight": 5 * 3 * 64, "attention.out_proj.weight": 5 * 64}
    assert counted.other == 2 * 5 * 5 * 8


@pytest.mark.parametrize("training", [True, False])
def test_the_fast_path_of_transformers_is_switched_off_and_on_again(training):
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    counted = count_macs(model, torch.randn(3, 5, 8))
    assert counted.total == 2 * (5 * (4 * 64 + 2 * 128) + 2 * 25 * 8)
    assert counted.other == 2 * 2 * 25 * 8
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(module.training is training for module in model.modules())


def test_evaluation_mode_is_counted():
    class Modes(nn.Linear):
        def forward(self, x):
            return super().forward(super().forward(x)) if self.training else super().forward(x)

    assert count_macs(Modes(4, 4).train(), torch.randn(2, 4)).total == 16


def test_inputs_in_every_form():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, other=None, flag=False):
            assert flag
            return {"out": self.layer(x) + (0 if other is None else other)}

    x = torch.randn(2, 4)
    assert count_macs(Named(), {"x": x, "flag": True}).total == 16
    assert count_macs(Named(), (x, x, True)).total == 16
    assert count_macs(Named(), [x, None, True]).total == 16


def test_batch_can_be_given():
    model = nn.LSTM(5, 7)  # (time, batch, features)
    assert count_macs(model, torch.randn(6, 2, 5), batch=2).total == 6 * 4 * (35 + 49)


def test_inference_mode_counts_the_same():
    with torch.inference_mode():
        assert count_macs(nn.Conv2d(2, 3, 1), torch.randn(2, 2, 4, 4)).total == 96


def test_errors_are_for_the_reader():
    with pytest.raises(MicrogliaError, match=r"Linear does not run on the example inputs \(\(2, 3\) torch.float32"):
        count_macs(nn.Linear(4, 4), torch.randn(2, 3))
    with pytest.raises(MicrogliaError, match="not str"):
        count_macs(nn.Linear(4, 4), "images")
    with pytest.raises(MicrogliaError, match="0 samples"):
        count_macs(nn.Linear(4, 4), torch.randn(0, 4))
    with pytest.raises(MicrogliaError, match="_trilinear cannot be counted"):
        count_macs(nn.Bilinear(2, 2, 2), (torch.randn(1, 2), torch.randn(1, 2)))
    assert torch.backends.mha.get_fastpath_enabled()
