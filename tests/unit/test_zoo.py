"""Every name of the zoo builds, runs, learns and refuses what does not fit."""

import pytest
import torch
from torch import nn

import fresh
from microglia.core.errors import MicrogliaError, UnknownNameError
from microglia.zoo import ModelError, build, model_names
from microglia.zoo.registry import MODELS

NEEDS = {"vgg16-bn": 16, "vgg19-bn": 16, "densenet40": 4, "lenet-5": 4, "conv-2": 2, "conv-4": 4, "conv-6": 8}
NEEDS |= {"googlenet": 4, **dict.fromkeys(("vgg-c", "vgg-d", "vgg-like"), 32)}
DIGITS = [name for name in model_names() if NEEDS.get(name, 1) <= 8]


def natural_shape(name):
    return (1, 28, 28) if name.startswith(("lenet", "lstm", "gru")) else (3, 32, 32)


def run_both_ways(model, shape, classes):
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, classes)
    assert torch.isfinite(logits).all()
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_the_names():
    assert {"lenet-300-100", "lenet-5", "conv-2", "conv-4", "conv-6", "vgg16-bn", "vgg19-bn"} <= set(model_names())
    assert {"resnet164", "googlenet", "alexnet-s", "alexnet-b", "vgg-c", "vgg-d", "vgg-like"} <= set(model_names())
    assert {"lstm-s", "lstm-b", "gru-s", "gru-b"} <= set(model_names())
    assert {"densenet40", "mobilenet-v1", "mobilenet-v2", "wrn-28-10"} <= set(model_names())
    for depth in (20, 32, 44, 56, 110):
        assert {f"resnet{depth}", f"resnet{depth}-projection"} <= set(model_names())
    assert model_names() == sorted(model_names())


@pytest.mark.parametrize("name", model_names())
def test_forward_and_backward(name):
    torch.manual_seed(0)
    model = build(name, classes=7, shape=natural_shape(name))
    assert model.training
    run_both_ways(model, natural_shape(name), 7)


@pytest.mark.parametrize("name", DIGITS)
def test_forward_and_backward_on_digits(name):
    torch.manual_seed(0)
    run_both_ways(build(name, shape=(1, 8, 8)), (1, 8, 8), 10)


@pytest.mark.parametrize("name", ["conv-6", "resnet8", "vgg16-bn", "densenet40", "mobilenet-v2", "lenet-5", "wrn-10-1"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 17, 30)])
def test_other_and_uneven_sizes(name, shape):
    run_both_ways(build(name, classes=3, shape=shape), shape, 3)


@pytest.mark.parametrize(("name", "smallest"), NEEDS.items())
def test_the_smallest_input(name, smallest):
    if smallest > 1:
        with pytest.raises(ModelError, match=f"too small for {name}: it needs at least {smallest}x{smallest} pixels"):
            build(name, shape=(1, smallest - 1, smallest + 8))
    run_both_ways(build(name, shape=(1, smallest, smallest)), (1, smallest, smallest), 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {"width": 3}),
        ("resnet8-projection", {"width": 32}),
        ("wrn-10-3", {"dropout": 0.3}),
        ("vgg16-bn", {"hidden": True}),
        ("vgg16-bn", {"hidden": "norm", "conv_bias": True}),
        ("mobilenet-v1", {"width": 0.25}),
        ("mobilenet-v2", {"width": 0.35, "dropout": 0.2}),
        ("mobilenet-v2", {"imagenet_strides": True}),
        ("densenet40", {"growth": 2, "stem": 3}),
        ("resnet164", {"blocks": 1, "width": 4}),
        ("googlenet", {"width": 0.25}),
    ],
)
def test_options(name, options):
    run_both_ways(build(name, **options), (3, 32, 32), 10)


def test_any_wide_resnet():
    with torch.device("meta"):
        assert sum(p.numel() for p in build("wrn-40-2").parameters()) == 2_243_546
    assert "wrn-40-2" not in model_names()
    for wrong in ("wrn-28", "wrn-27-10", "wrn-4-1", "wrn-16-0", "wrn-a-b", "wrn--16-2"):
        with pytest.raises(ModelError, match="wrn-D-K takes D = 10, 16, 22"):
            build(wrong)


def test_the_names_of_parameters_in_a_resnet():
    names = list(build("resnet20").state_dict())
    assert names[:2] == ["conv1.weight", "bn1.weight"]
    assert "layer1.0.conv1.weight" in names
    assert "layer3.2.bn2.running_var" in names
    assert names[-2:] == ["linear.weight", "linear.bias"]
    assert not [name for name in names if "shortcut" in name]


def test_the_shortcut_without_parameters():
    shortcut = build("resnet8").layer2[0].shortcut
    x = torch.randn(2, 16, 5, 5)
    y = shortcut(x)
    assert y.shape == (2, 32, 3, 3)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_convolutions_start_from_kaiming_fan_out():
    torch.manual_seed(0)
    weight = build("vgg16-bn").features[-3].weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert not build("conv-2").features[0].bias.any()


def test_the_same_seed_gives_the_same_model():
    def state():
        torch.manual_seed(3)
        return build("mobilenet-v2", width=0.35).state_dict()

    first, second = state(), state()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["lenet-5", "resnet8", "wrn-10-1"])
def test_torch_export_traces_it_for_any_batch_size(name):
    model = build(name).eval()
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (torch.randn(3, 3, 32, 32),), dynamic_shapes=shapes, strict=False)
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet-20", "'resnet20'"), ("lenet5", "'lenet-5'"), ("vgg16", "'vgg16-bn'"), ("wrn28-10", "'wrn-28-10'")],
)
def test_an_unknown_name_gets_near_ones(name, near):
    with pytest.raises(UnknownNameError, match=f"There is no model named '{name}'.*Did you mean .*{near}.*timm:NAME"):
        build(name)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("lenet-5", {"width": 2}, "lenet-5 takes no option 'width'; its options: none"),
        ("resnet20", {"wdth": 2}, "its options: width"),
        ("resnet20", {"width": 0}, "width a whole number of at least 1, not 0"),
        ("resnet20", {"width": 1.5}, "not 1.5"),
        ("densenet40", {"growth": -1}, "growth a whole number"),
        ("mobilenet-v1", {"width": 0}, "width is above 0; got 0"),
        ("mobilenet-v2", {"width": "a"}, "mobilenet-v2 cannot be built with width='a'"),
        ("mobilenet-v2", {"dropout": 2.0}, "between 0 and 1"),
        ("wrn-10-1", {"dropout": -1.0}, "between 0 and 1"),
        ("vgg16-bn", {"hidden": "yes"}, "hidden=True, False or 'norm', not 'yes'"),
        ("resnet20", {"classes": 0}, "classes a whole number of at least 1, not 0"),
        ("resnet20", {"classes": 2.0}, "not 2.0"),
        ("resnet20", {"classes": True}, "not True"),
        ("resnet20", {"shape": (32, 32)}, r"shape is \(channels, height, width\)"),
        ("resnet20", {"shape": (3, 0, 32)}, "at least 1"),
        ("resnet20", {"shape": (3, 32.5, 32)}, "whole numbers"),
        ("resnet20", {"shape": 32}, "not 32"),
    ],
)
def test_wrong_inputs(name, options, text):
    with pytest.raises(ModelError, match=text):
        build(name, **options)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        MODELS.add("resnet20")(nn.Identity)
    assert issubclass(ModelError, MicrogliaError)


def test_the_zoo_alone_imports_no_model_library():
    code = "import sys, microglia.zoo; print([m for m in ('timm', 'torchvision', 'transformers') if m in sys.modules])"
    done = fresh.run(code)
    assert done.stdout.strip() == "[]", done.stderr
