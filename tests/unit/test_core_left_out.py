"""Weights that a budget does not reach are named: bilinear layers, weight_norm, torch's pruning, tied embeddings."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import microglia as mg
from microglia.core.errors import SelectorError


def three() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(4, 4, 8)
        self.fc = nn.Linear(8, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight


def test_weights_of_another_form_are_named_as_left_out():
    with pytest.warns(UserWarning, match=r"pair\.weight \(128 of 144 weights"):
        pruner = mg.methods.OneShot(Paired(), density=0.5)
    assert list(pruner.layers) == ["fc.weight"]


def new_weight_norm(module):
    parametrizations.weight_norm(module)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize("change", [new_weight_norm, nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_layers_made_of_other_tensors_are_named_as_left_out(change):
    net = three()
    change(net[0])
    with pytest.warns(UserWarning, match=r"0\.weight \(64 of 160 weights"):
        assert mg.methods.OneShot(net, density=0.5).masks.total == 96


def test_a_transposed_convolution_and_a_raw_matrix_are_named_as_left_out():
    net = nn.Sequential(nn.Linear(8, 8), nn.ConvTranspose2d(3, 5, 2))
    net.register_parameter("extra", nn.Parameter(torch.ones(4, 6)))
    with pytest.warns(UserWarning, match=r"extra, 1\.weight \(84 of 148 weights"):
        mg.methods.OneShot(net, density=0.5)


@pytest.mark.parametrize(
    "choice", [{"exclude": "pair"}, {"exclude": ["type:Bilinear"]}, {"layers": "fc"}, {"layers": ["*", "!pair"]}]
)
def test_what_is_left_out_on_purpose_is_not_warned_of(choice):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(mg.methods.OneShot(Paired(), density=0.5, **choice).layers) == ["fc.weight"]


def test_a_plain_network_with_masks_on_it_is_not_warned_of():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(5, 6), nn.MultiheadAttention(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mg.methods.OneShot(net, density=0.5)
        mg.methods.OneShot(net, density=0.25)


def test_an_exclude_that_meets_nothing_is_still_refused():
    with pytest.raises(SelectorError, match="lstm"):
        mg.methods.OneShot(Paired(), density=0.5, exclude="lstm")


def test_a_tied_embedding_stays_dense_and_is_named():
    net = Tied()
    with pytest.warns(UserWarning, match=r"embedding shares the weight of head\.weight"):
        pruner = mg.methods.OneShot(net, density=0.25)
    assert pruner.masks.kept == 16
    mg.fold(net)
    assert not (net.embedding.weight == 0).any()


@pytest.mark.parametrize("layers", [["*", "head"], ["fc", "head.weight"], ["*", "he*"]])
def test_a_tied_embedding_that_is_named_is_pruned(layers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = mg.methods.OneShot(Tied(), density=0.25, layers=layers)
    assert (pruner.masks.kept, pruner.masks.total) == (48, 192)


def test_where_only_a_tied_embedding_is_left_the_error_says_how_to_prune_it():
    net = Tied()
    del net.fc
    with pytest.raises(SelectorError, match="name it in layers="):
        mg.methods.OneShot(net, density=0.5)


def test_shrink_says_that_nothing_can_be_removed():
    net = three()
    mg.methods.OneShot(net, density=0.5)
    with pytest.warns(UserWarning, match="Nothing to remove: no mask removes a whole channel"):
        mg.shrink(net, torch.randn(2, 8))
    channels = three()
    mg.methods.OneShot(channels, density=0.5, pattern="channel", layers=["0", "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        small = mg.shrink(channels, torch.randn(2, 8))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in three().parameters())
