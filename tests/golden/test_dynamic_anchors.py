"""Gates, heads and dense operations of the paper's models (spec, sections 7.5 and 7.8)."""

import pytest
import torch

from microglia.dynamic import Counter, Flow, GatePlan, find_sites
from microglia.zoo import build

PUBLISHED = [  # name, gates, operations as published, what their profiler adds to ours, head products, convolutions without
    ("vgg16-bn", 13, 313_478_144, 276_480, 1_634_496, 0),  # the biases: one addition per value of each map
    ("resnet56", 55, 125_485_760, 64, 94_256, 0),  # the average pooling: one per channel
    ("mobilenet-v1", 27, 46_355_456, 1024, 5_930_080, 0),
    ("mobilenet-v2", 52, None, None, 6_637_024, 0),  # 53 in the paper, whose first block expands 32 channels to 32
    ("resnet20-projection", 19, None, None, None, 2),
]


@pytest.mark.parametrize(("name", "gates", "published", "more", "heads", "without"), PUBLISHED)
def test_gates_heads_and_dense_operations(name, gates, published, more, heads, without):
    with torch.random.fork_rng():
        model, x = build(name).eval(), torch.zeros(1, 3, 32, 32)
    flow = Flow(model, x)
    found = find_sites(flow, model)
    counter = Counter(model, flow, GatePlan(found.sites), x)
    assert len(found.sites) == gates
    assert len(found.left_out) == without
    assert all("shortcut" in reason for reason in found.left_out.values())
    assert published is None or counter.dense + more == published
    assert heads is None or counter.heads == heads
    everything = {site.layer: torch.ones(1, site.outputs, dtype=torch.bool) for site in found.sites}
    costs = counter(everything)
    assert float(costs.paper) == counter.dense
    assert float(costs.honest) == counter.dense + counter.heads


def test_heads_of_depthwise_layers_cost_more_than_the_layers():
    """MobileNetV1 on CIFAR: 2.79M of 5.93M, against 1.42M for all depthwise convolutions; 12.8 % of the network in all."""
    with torch.random.fork_rng():
        model, x = build("mobilenet-v1").eval(), torch.zeros(1, 3, 32, 32)
    flow = Flow(model, x)
    sites = find_sites(flow, model).sites
    counter = Counter(model, flow, GatePlan(sites), x)
    depthwise = [layer for layer, step in flow.convolutions.items() if step.convolution.depthwise]
    assert len(depthwise) == 13
    heads = sum(site.inputs * site.outputs for site in sites if site.layer in depthwise)
    assert round(heads / 1e6, 2) == 2.79
    assert round(sum(counter.macs[layer] for layer in depthwise) / 1e6, 2) == 1.42
    assert round(100 * counter.heads / counter.dense, 1) == 12.8


def test_the_published_count_is_about_p_squared_and_the_true_one_the_mean_of_p_and_p_squared():
    """ResNet-56 where every gate keeps half: 0.25 against 0.375 (spec 7.8, third defect)."""
    with torch.random.fork_rng():
        model, x = build("resnet56").eval(), torch.zeros(1, 3, 32, 32)
    flow = Flow(model, x)
    sites = find_sites(flow, model).sites
    counter = Counter(model, flow, GatePlan(sites), x)
    costs = counter({site.layer: (torch.arange(site.outputs) % 2 == 0)[None] for site in sites})
    assert float(costs.paper) / counter.dense == pytest.approx(0.25, abs=0.005)
    assert (float(costs.honest) - counter.heads) / counter.dense == pytest.approx(0.375, abs=0.01)
