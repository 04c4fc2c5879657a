"""Remove half of a network's multiply-accumulates and measure it before and after: ``python examples/prune_channels.py``."""

import torch
from torch import nn

import microglia as mg


def network() -> nn.Module:
    """Returns a small network; any model that `torch.export` traces does as well, such as ``torchvision.models.resnet50()``."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


def main() -> None:
    """Prunes, measures and saves."""
    torch.manual_seed(0)
    model, images = network(), torch.randn(1, 3, 32, 32)
    small = mg.prune_channels(model, images, mg.Budget(flops=0.5))
    print(mg.graph.plan_of(small))
    for name, one in (("dense", model), ("pruned", small)):
        print(name, mg.measure(one, images, executions="torch"))
    mg.save(small, "small")
    assert torch.equal(mg.load("small", network())(images), small(images))


if __name__ == "__main__":
    main()
