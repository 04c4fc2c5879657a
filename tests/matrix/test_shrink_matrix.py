"""Every net of the zoo at half its channels: verified, smaller, and it still runs and learns."""

from __future__ import annotations

import pytest
import torch

from microglia import Budget, prune_channels
from microglia.graph import plan_of
from microglia.zoo import build, model_names

SIZES = {"vgg16-bn": 16, "vgg19-bn": 16, "vgg-c": 32}
"""Smallest image sides; 8 for the others."""
OPTIONS = {"resnet164": {"blocks": 2}, "googlenet": {"width": 0.125}}
"""Fewer blocks, which are all alike, or fewer channels."""
ALIKE = {"alexnet-b": "alexnet-s", "lstm-b": "lstm-s", "gru-b": "gru-s"}
ALIKE |= {"vgg-d": "vgg16-bn", "vgg-like": "vgg16-bn"}
ALIKE |= {f"resnet{depth}{end}": f"resnet20{end}" for depth in (32, 44, 56, 110) for end in ("", "-projection")}
ALIKE |= dict.fromkeys(("wrn-16-10", "wrn-22-8", "wrn-28-10"), "wrn-16-8")
"""Net -> one of the same layers, of other sizes, which is tested."""


def inputs_of(name):
    channels = 1 if name.startswith("lenet") else 3
    return torch.randn(2, channels, *[SIZES.get(name, 8)] * 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name in model_names() if name not in ALIKE])
def test_half_of_every_net(name):
    x = inputs_of(name)
    torch.manual_seed(0)
    model = build(name, classes=7, shape=tuple(x.shape[1:]), **OPTIONS.get(name, {})).train()
    small = prune_channels(model, x, Budget(density=0.5), round_to=1)
    plan = plan_of(small)
    assert plan.kind == "module"
    assert type(small) is type(model)
    assert plan.error < 1e-10
    assert plan.got["density"] == pytest.approx(0.5, abs=0.02)
    assert plan.parameters[1] == sum(p.numel() for p in small.parameters()) < 0.6 * plan.parameters[0]
    assert plan.macs[1] < 0.6 * plan.macs[0]
    assert plan.pruned == plan.found
    logits = small(x)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for parameter_name, parameter in small.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
