"""Layers: names, the selector language, tied weights, and the state behind the masks."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from microglia.core.errors import SelectorError
from microglia.core.layers import check_selectors, effective_state, matches, prunable_layers, raw_parameter
from microglia.core.masks import fold, mask


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv1d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 2, 1)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer10 = nn.Sequential(Block())
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mean", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


NAMES = ["stem", *(f"{block}.conv{i}" for block in ("layer1.0", "layer1.1", "layer10.0") for i in (1, 2)), "fc"]


def half(model: nn.Module) -> None:
    mask(model, {n: torch.arange(la.raw.numel()).view(la.shape) % 2 for n, la in prunable_layers(model).items()})


def chosen(*layers: str, exclude: tuple[str, ...] = ()) -> list[str]:
    return [name.removesuffix(".weight") for name in prunable_layers(Network(), layers or ("*",), exclude)]


def test_linear_and_convolution_weights_by_parameter_name_in_order_of_modules() -> None:
    model = Network()
    layers = prunable_layers(model)
    assert list(layers) == [f"{name}.weight" for name in NAMES]
    parameters = dict(model.named_parameters())
    assert all(layer.raw is layer.weight is parameters[name] for name, layer in layers.items())
    assert layers["fc.weight"].module is model.fc
    assert layers["fc.weight"].shape == (3, 4)
    assert list(prunable_layers(nn.Linear(2, 3))) == ["weight"]


def test_names_and_tensors_are_the_same_below_masks() -> None:
    model = Network()
    before = {name: layer.raw for name, layer in prunable_layers(model).items()}
    half(model)
    after = prunable_layers(model)
    assert list(after) == list(before)
    assert all(layer.raw is before[name] for name, layer in after.items())
    assert after["fc.weight"].weight.flatten()[::2].tolist() == [0.0] * 6
    assert raw_parameter(model.fc, "weight") is before["fc.weight"]
    fold(model)
    assert list(prunable_layers(model)) == list(before)


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        (("*",), NAMES),
        (("fc",), ["fc"]),
        (("fc.weight",), ["fc"]),
        (("layer1.*",), NAMES[1:5]),
        (("layer1*",), NAMES[1:7]),
        (("*.conv1",), NAMES[1:7:2]),
        (("layer1.[01].conv2", "stem"), ["stem", *NAMES[2:5:2]]),
        (("type:Conv1d",), NAMES[2:7:2]),
        (("type:Conv?d", "!stem"), NAMES[1:7]),
        (("type:_ConvNd",), NAMES[:7]),  # base classes count
        (("!type:Conv*",), ["fc"]),
        (("!fc", "!stem"), NAMES[1:7]),
        (("*", "!layer1.*", "!layer10.*"), ["stem", "fc"]),
    ],
)
def test_the_selector_language(selectors: tuple[str, ...], expected: list[str]) -> None:
    assert chosen(*selectors) == expected


def test_types_are_the_same_below_masks() -> None:
    model = Network()
    half(model)
    assert list(prunable_layers(model, ["type:Linear"])) == ["fc.weight"]


def test_exclude_takes_out_again() -> None:
    assert chosen(exclude=("stem", "fc")) == NAMES[1:7]
    assert chosen("layer1.*", exclude=("type:Conv1d",)) == NAMES[1:5:2]
    assert matches("fc.weight", nn.Linear(1, 1), ["f?", "!fb"])


@pytest.mark.parametrize(("layers", "exclude"), [(("fd",), ()), (("*", "!fd"), ()), (("type:conv2d",), ()), (("*",), ("fd",))])
def test_a_selector_that_meets_nothing_is_an_error_that_shows_the_names(
    layers: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    with pytest.raises(SelectorError, match=r"selector '.*' meets no layer\. Layers here: stem.weight, .*fc.weight"):
        chosen(*layers, exclude=exclude)


def test_long_lists_of_names_are_cut() -> None:
    many = prunable_layers(nn.Sequential(*(nn.Linear(1, 1) for _ in range(12))))
    with pytest.raises(SelectorError, match=re.escape("7.weight, ... (12 in all)")):
        check_selectors(many, ["x"])


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(SelectorError, match=r"No layer is left .* none of the 8 prunable layers of Network"):
        chosen("fc", exclude=("type:Linear",))
    with pytest.raises(SelectorError, match="none of the 0 prunable layers of ReLU"):
        prunable_layers(nn.ReLU())


def test_tied_weights_are_one_layer_with_all_its_holders() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3), nn.Linear(2, 3))
    model[2].weight = model[1].weight = model[0].weight
    layers = prunable_layers(model)
    assert list(layers) == ["1.weight"]
    assert {id(m) for m, _ in layers["1.weight"].holders} == {id(m) for m in model}
    shared = nn.Linear(2, 2)
    assert list(prunable_layers(nn.Sequential(shared, nn.ReLU(), shared))) == ["0.weight"]


def test_attention_has_its_projections() -> None:
    assert list(prunable_layers(nn.MultiheadAttention(4, 2))) == ["in_proj_weight", "out_proj.weight"]
    separate = prunable_layers(nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3, vdim=3)))
    assert list(separate) == ["0.q_proj_weight", "0.k_proj_weight", "0.v_proj_weight", "0.out_proj.weight"]


def test_weights_made_from_several_tensors_are_left_out() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert list(prunable_layers(model)) == ["1.weight"]


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("build", [Network, tied, lambda: nn.MultiheadAttention(4, 2), lambda: nn.Linear(2, 3)])
def test_the_effective_state_is_that_of_a_folded_copy(build: type[nn.Module]) -> None:
    bare = build()
    assert effective_state(bare).keys() == bare.state_dict().keys()
    model = copy.deepcopy(bare)
    half(model)
    state, expected = effective_state(model), fold(copy.deepcopy(model)).state_dict()
    assert state.keys() == expected.keys() == bare.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert not any(value.requires_grad for value in state.values())
    assert any(not torch.equal(value, bare.state_dict()[name]) for name, value in state.items())
    bare.load_state_dict(state)
