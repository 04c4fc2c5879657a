"""Run blocks of zeros by kernels that skip them, and keep that choice: ``python examples/accelerate_and_save.py``."""

import torch
from torch import nn

import microglia as mg


def network() -> nn.Module:
    """Returns a network whose layers are wide enough for blocks."""
    return nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()).eval()


def main() -> None:
    """Masks, accelerates, saves and loads."""
    torch.manual_seed(0)
    model, images = network(), torch.randn(1, 16, 16, 16)
    mg.methods.OneShot(model, pattern="block:16x1", density=0.2).finish()
    fast = mg.accelerate(model, images)
    print(fast.report())
    torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-4)
    mg.save(fast, "fast")  # weights, and which kernel runs each layer
    again = mg.load("fast", network())
    torch.testing.assert_close(again(images), model(images), rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
