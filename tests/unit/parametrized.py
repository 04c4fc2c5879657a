"""Models with other parametrizations than masks, in float64, for the tests of masks, of the graph and of files."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


class Adapter(nn.Module):
    """A low-rank adapter."""

    def __init__(self, outputs: int = 8, inputs: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class Doubled(nn.Module):
    """One of the user's own with an inverse."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight + 1

    def right_inverse(self, weight: Tensor) -> Tensor:
        return (weight - 1) / 2


class OwnMask(nn.Module):
    """One of the user's own that holds a tensor named like that of a mask."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(6) != 2)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask + 0.25


def add(layer: nn.Linear, kind: str) -> None:
    """Gives the weight of a layer a parametrization, or the two whose names a plus sign joins."""
    for one in kind.split("+"):
        if one == "spectral":
            parametrizations.spectral_norm(layer)
        elif one == "orthogonal":
            # torch cannot put its trivialization after another parametrization
            parametrizations.orthogonal(layer, use_trivialization=False)
        else:
            step = {"adapter": Adapter, "inverse": Doubled, "mask": OwnMask}[one]()
            parametrize.register_parametrization(layer, "weight", step)


KINDS = ["spectral", "orthogonal", "adapter", "inverse", "mask", "spectral+adapter", "adapter+spectral", "mask+inverse"]


def build(kind: str = "", seed: int = 0) -> nn.Sequential:
    """Returns a net in float64 whose first layer has a parametrization."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    if kind:
        add(net[0], kind)
    return net.double()


def inputs(seed: int = 5) -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def channel_mask() -> dict[str, Tensor]:
    """Returns a mask of the first layer: three of its channels whole and some weights of the others."""
    kept = torch.rand(8, 6, generator=torch.Generator().manual_seed(2)) > 0.3
    kept[[1, 4, 6]] = False
    return {"0.weight": kept}
