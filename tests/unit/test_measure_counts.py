"""Parameters and bytes: exact counts, masked and folded, and a model that stays as it was."""

import json
import zlib

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from microglia.core.errors import FileError, SelectorError
from microglia.core.layers import effective_state
from microglia.measure import bytes_on_disk, count_parameters, measure


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


class Tied(nn.Module):
    """An embedding whose table is the output layer's weight as well, and a block used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.block = nn.Linear(6, 6)
        self.again = self.block
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.again(self.block(self.embedding(tokens))))


def test_counts_by_hand():
    model = ones(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(8, 2, bias=False)))
    counts = count_parameters(model)
    assert counts.all == 4 * 27 + 4 + 8 + 16
    assert counts.prunable == counts.kept == 4 * 27 + 16
    assert counts.nonzero_all == counts.all
    assert counts.layers == {"0.weight": (108, 108), "3.weight": (16, 16)}
    assert counts.density == counts.compression == 1


@settings(deadline=None)
@given(mask=st.lists(st.booleans(), min_size=12, max_size=12), zeros=st.integers(0, 12))
def test_a_mask_counts_its_true_entries_and_folding_changes_nothing(mask, zeros):
    model = ones(nn.Sequential(nn.Linear(4, 3)))
    with torch.no_grad():
        model[0].weight.view(-1)[:zeros] = 0
    plain = count_parameters(model)
    assert plain.kept == 12 - zeros
    parametrize.register_parametrization(model[0], "weight", Keep(torch.tensor(mask).view(3, 4)))
    masked = count_parameters(model)
    left = sum(mask[zeros:])
    assert masked.all == 15
    assert masked.kept == sum(mask)
    assert masked.nonzero_all == left + 3
    assert masked.layers == {"0.weight": (12, sum(mask))}
    assert masked.density == sum(mask) / 12
    assert masked.compression == 15 / (3 + sum(mask))
    parametrize.remove_parametrizations(model[0], "weight")
    assert count_parameters(model).kept == left


def test_two_masks_keep_what_both_keep():
    model = ones(nn.Linear(2, 2))
    for mask in ([[True, False], [True, True]], [[True, True], [False, True]]):
        parametrize.register_parametrization(model, "weight", Keep(torch.tensor(mask)))
    assert count_parameters(model).kept == 2


def test_tied_weights_count_once():
    model = ones(Tied())
    counts = count_parameters(model)
    assert counts.all == counts.nonzero_all == 66 + 36 + 6
    assert counts.layers == {"block.weight": (36, 36), "head.weight": (66, 66)}
    parametrize.register_parametrization(model.head, "weight", Keep(torch.arange(66).view(11, 6) < 10))
    assert count_parameters(model).kept == 46
    assert count_parameters(model).all == 108


def test_selectors_choose_what_is_prunable():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    assert count_parameters(model, ["0"]).prunable == 12
    assert count_parameters(model, exclude=["0"]).prunable == 6
    with pytest.raises(SelectorError, match="meets no layer"):
        count_parameters(model, ["conv*"])


def test_nothing_kept_is_infinite_compression_and_null_in_json():
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    counts = count_parameters(model)
    assert counts.compression == float("inf")
    assert json.loads(json.dumps(counts.to_dict()))["compression"] is None


def test_a_parametrization_with_a_state_is_read_without_moving_it():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = nn.Sequential(nn.Linear(3, 3), model)
    bytes_on_disk(other)
    count_parameters(other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


@settings(max_examples=20, deadline=None)
@given(outputs=st.integers(1, 40), inputs=st.integers(1, 40), bias=st.booleans())
def test_bytes_are_those_of_the_file(outputs, inputs, bias):
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias), nn.BatchNorm1d(outputs))
    written = safetensors.torch.save(model.state_dict())
    size = bytes_on_disk(model)
    assert size.raw == len(written)
    assert size.zipped == len(zlib.compress(written, 6))


def test_zeros_pay_when_zipped_and_masks_are_multiplied_in():
    model = nn.Sequential(nn.Linear(256, 64))
    dense = bytes_on_disk(model)
    parametrize.register_parametrization(model[0], "weight", Keep(torch.rand(64, 256) < 0.1))
    masked = bytes_on_disk(model)
    assert masked.raw == dense.raw
    assert masked.zipped < 0.4 * dense.zipped
    parametrize.remove_parametrizations(model[0], "weight")
    assert bytes_on_disk(model) == masked


def test_shared_tensors_are_written_once():
    model = Tied()
    state = {name: t for name, t in model.state_dict().items() if not name.startswith(("head", "again"))}
    assert bytes_on_disk(model).raw == len(safetensors.torch.save(state))
    shared = Keep(torch.rand(6, 6) < 0.5)
    parametrize.register_parametrization(model.block, "weight", shared)
    assert bytes_on_disk(model).raw == len(safetensors.torch.save(state))


def test_views_of_one_storage_and_odd_layouts_are_written():
    model = nn.Module()
    table = torch.arange(24.0).view(4, 6)
    model.register_buffer("left", table[:, :3])
    model.register_buffer("right", table[:, 3:])
    model.register_buffer("turned", table.t())
    model.register_buffer("steps", torch.tensor(3), persistent=False)
    expected = {name: value.clone().contiguous() for name, value in effective_state(model).items()}
    assert bytes_on_disk(model).raw == len(safetensors.torch.save(expected))
    assert set(expected) == {"left", "right", "turned"}


def test_what_safetensors_cannot_hold_is_a_clear_error():
    model = nn.Module()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(FileError, match="safetensors"):
        bytes_on_disk(model)


def snapshot(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        torch.get_rng_state(),
    )


def same(one, other):
    states, *rest = zip(one, other, strict=True)
    equal = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return (
        equal
        and states[0].keys() == states[1].keys()
        and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in rest)
    )


class Busy(nn.Module):
    """Draws numbers, counts its calls in a buffer and an attribute, and writes into its input, in any mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout())
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen = 0

    def forward(self, images):
        self.calls += 1
        self.seen += 1
        images.add_(0)
        noise = torch.rand(1) * 0
        return self.head(self.body(images.relu_()).mean((2, 3)) + noise)


def test_measuring_leaves_the_model_the_inputs_and_the_generator_alone():
    model = Busy().train()
    model.body[1].eval()
    parametrize.register_parametrization(model.head, "weight", Keep(torch.tensor([[True, False, True, True]] * 2)))
    images = torch.randn(2, 3, 8, 8)
    before, given = snapshot(model), images.clone()
    measured = measure(model, images, latency=False)
    assert same(before, snapshot(model))
    assert torch.equal(images, given)
    assert model.seen == 0
    assert measured.macs.layers == {"body.0.weight": 36 * 108, "head.weight": 8}
    assert measured.macs.entries["head.weight"] == (8, 6)
    assert measured.latency is None
    assert json.loads(json.dumps(measured.to_dict())) == measured.to_dict()
