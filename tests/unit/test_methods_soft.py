"""The factors of a search beside other parametrizations of the same tensor: its own are found, whatever stands before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parametrized import Adapter, add, build, inputs
from torch import nn
from torch.nn.utils import parametrize

import microglia as mg
from microglia.core.masks import Masked
from microglia.methods import Pas, Smart
from microglia.methods.soft import Factored, Kept


class Shifted(nn.Module):
    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return bias + 0.5


def searched(kind: str, when: str, **settings: Any) -> tuple[nn.Sequential, Smart]:
    net = build(kind if when == "before" else "")
    known: dict[str, Any] = {"pattern": "unstructured", "density": 0.4, "total_steps": 4, "search": 1.0, "layers": ["0"]}
    pruner = Smart(net, **(known | settings))
    if when == "after":
        add(net[0], kind)
        net.double()
    return net, pruner


def classes(net: nn.Sequential) -> list[str]:
    return [type(step).__name__ for step in net[0].parametrizations.weight]


@pytest.mark.filterwarnings("ignore:No optimizer moved")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["spectral", "adapter", "inverse", "adapter+inverse"])
def test_the_mask_takes_the_place_of_the_factors_and_of_nothing_else(kind: str, when: str) -> None:
    net, pruner = searched(kind, when)
    others = [name for name in classes(net) if name != Factored.__name__]
    assert len(others) == len(kind.split("+"))
    wanted = [Masked.__name__ if name == Factored.__name__ else name for name in classes(net)]
    net.eval()
    kept = pruner.choose(pruner.ranking()).view(8, 6)
    steps = net[0].parametrizations.weight
    value = steps.original.detach()
    for step in steps:
        value = value * kept if isinstance(step, Factored) else step(value)
    masks = pruner.finish()
    assert torch.equal(masks["0.weight"], kept)
    assert classes(net) == wanted
    torch.testing.assert_close(net[0].weight, value, rtol=0, atol=1e-12)
    after = net(inputs())
    torch.testing.assert_close(mg.fold(net)(inputs()), after, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:No optimizer moved")
@pytest.mark.parametrize("first", [True, False])
def test_a_companion_with_a_parametrization_of_its_own_ends_as_it_was_computed(first: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    pruner = Pas(net, pattern="channel", density=0.5, total_steps=4, search=1.0, example_inputs=inputs())
    steps = net[0].parametrizations.bias
    steps.insert(1 if first else 0, Shifted())
    assert any(isinstance(m, Kept) for m in net.modules())
    pruner.freeze()
    wanted = net(inputs()).detach()
    bias = net[0].bias.detach().clone()
    pruner.finish()
    assert not any(isinstance(m, Kept) for m in net.modules())
    assert torch.equal(net[0].bias, bias)
    assert torch.equal(net(inputs()), wanted)
    assert parametrize.is_parametrized(net[0], "bias") == first


@pytest.mark.filterwarnings("ignore:No optimizer moved")
def test_where_a_layer_has_no_mask_in_the_end_its_other_parametrization_stays() -> None:
    """Coupled channels: factors act where a channel is read, on layers that no mask is put on."""
    net = build("")
    step = Adapter(4, 8).double()
    parametrize.register_parametrization(net[2], "weight", step)
    pruner = Smart(net, pattern="unstructured", density=0.5, total_steps=4, search=1.0)
    pruner.soft.harden(net, {"0.weight": torch.ones(8, 6)})
    assert list(net[2].parametrizations.weight) == [step]
