"""Small networks of every kind that gates meet, with norms that are not trivial and heads whose masks differ by input."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.dynamic import Counter, Flow, GatePlan, Site, attach_gates, find_sites, gates_of
from microglia.zoo import build

SHAPE = (3, 12, 12)


class Residual(nn.Module):
    """A stem, a block with an identity, a block with a projection, a block with a padded shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.one_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.two_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.three, self.three_norm = nn.Conv2d(8, 12, 3, 2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.four = nn.Conv2d(12, 12, 3, padding=1)
        self.shortcut, self.shortcut_norm = nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12)
        self.five, self.six = nn.Conv2d(12, 20, 3, 2, padding=1), nn.Conv2d(20, 20, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem_norm(self.stem(x)))
        x = self.relu(self.two_norm(self.two(self.relu(self.one_norm(self.one(x))))) + x)
        y = self.four(self.relu(self.three_norm(self.three(x))))
        y += self.shortcut_norm(self.shortcut(x))
        x = self.relu(y)
        y = self.six(torch.relu(self.five(x)))
        return self.head(torch.relu(y + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 5))).mean((2, 3)))


class Branches(nn.Module):
    """Branches that are concatenated, and concatenated again behind a norm of their own as in a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.left_norm = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.right = nn.Conv2d(8, 10, 5, padding=2)
        self.after = nn.Conv2d(16 + 8, 12, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(12 + 24), nn.Conv2d(36, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.stem(x))
        parts = [torch.relu(self.left_norm(self.left(x))), functional.max_pool2d(torch.tanh(self.right(x)), 3, 1, 1)]
        x = torch.cat([*parts, x], 1)
        x = torch.cat([functional.leaky_relu(self.after(x)), x], dim=1)
        x = functional.gelu(self.last(torch.relu(self.norm(x))))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def plain() -> nn.Module:
    """VGG with the settings a convolution can have: strides, dilation, 'same' and 'valid', with and without norm and bias."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, padding=2, dilation=2), nn.ReLU6(),
        nn.Conv2d(12, 16, (3, 5), padding=(1, 2), stride=(2, 1)), nn.BatchNorm2d(16), nn.Hardswish(),
        nn.MaxPool2d(2), nn.Dropout(0.3),
        nn.Conv2d(16, 16, 3, padding="same", dilation=2, bias=False), nn.ELU(), nn.AvgPool2d(2, padding=1),
        nn.Conv2d(16, 10, 2, padding="valid"), nn.Mish(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


def depthwise() -> nn.Module:
    """Depthwise layers behind kept and dropped channels, with a norm, a bias and neither, and one of grouped channels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 12, 1), nn.ReLU(),
        nn.Conv2d(12, 12, 3, stride=2, groups=12), nn.Identity(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def signals() -> nn.Module:
    """Convolutions over one dimension."""
    return nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv1d(8, 10, 3, padding="same", dilation=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(10, 5),
    )  # fmt: skip


def volumes() -> nn.Module:
    """Convolutions over three dimensions."""
    return nn.Sequential(
        nn.Unflatten(2, (3, 4)), nn.Conv3d(3, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2, padding=1),
        nn.Conv3d(6, 8, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "residual": Residual,
    "branches": Branches,
    "depthwise": depthwise,
    "signals": signals,
    "volumes": volumes,
    "resnet8": lambda: build("resnet8", classes=5, shape=SHAPE, width=8),
    "resnet8-projection": lambda: build("resnet8-projection", classes=5, shape=SHAPE, width=8),
    "mobilenet-v1": lambda: build("mobilenet-v1", classes=5, shape=SHAPE, width=0.125),
    "mobilenet-v2": lambda: build("mobilenet-v2", classes=5, shape=SHAPE, width=0.1),
}


def images(count: int = 4, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def network(name: str, seed: int = 0) -> nn.Module:
    """Returns a network in evaluation mode whose norms do something to every channel."""
    return copy.deepcopy(_made(name, seed))


@functools.cache
def _made(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NETWORKS[name]().eval()
        with torch.no_grad():
            model(images(2))  # fills lazy layers
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                shake(module)
    model.kind = name  # type: ignore[assignment]
    return model


@torch.no_grad()
def shake(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Draws the statistics and the affine map of a norm from torch's generator."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.4, 2)
    if norm.weight is not None:
        norm.weight.uniform_(0.5, 1.5).mul_(torch.randint(0, 2, norm.weight.shape) * 2 - 1)
        norm.bias.normal_(0, 0.4)


def plan_of(model: nn.Module, x: Tensor, r: float = 0.8, **settings: object) -> GatePlan:
    found = find_sites(Flow(model, x), model).sites if not hasattr(model, "kind") else _sites(str(model.kind))
    return GatePlan(found, **settings).with_r(r)  # type: ignore[arg-type]


@functools.cache
def _sites(name: str) -> tuple[Site, ...]:  # a trace takes long
    return find_sites(Flow(_made(name, 0), images(1)), _made(name, 0)).sites


def gated(model: nn.Module, x: Tensor, r: float = 0.8, seed: int = 0, plan: GatePlan | None = None) -> nn.Module:
    """Hangs gates on a model whose heads look at their input: about half of the filters are on, not the same for each input."""
    generator = torch.Generator().manual_seed(seed)
    attach_gates(model, plan or plan_of(model, x, r), generator)
    with torch.no_grad():
        for gate in gates_of(model).values():
            gate.weight.normal_(0, 2.0 * gate.site.inputs if gate.softmax else 1.0, generator=generator)
            gate.weight -= gate.weight.mean(1, keepdim=True)
            gate.bias.normal_(0, 0.3, generator=generator)
    return model


@torch.no_grad()
def bias(model: nn.Module, value: float, *layers: str) -> None:
    """Gives the heads of some layers (of all by default) one constant logit."""
    for name, gate in gates_of(model).items():
        if not layers or name in layers:
            gate.weight.zero_()
            gate.bias.fill_(value)


def counter_of(model: nn.Module, x: Tensor) -> Counter:
    """Returns the counter of a model without gates."""
    return Counter(model, Flow(model, x), plan_of(model, x), x)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tells whether two states are equal bit for bit."""
    return list(first) == list(second) and all(torch.equal(value, second[name]) for name, value in first.items())
