"""The parts of a DDNP search: the two networks, soft prefixes, energies of channels, and integer widths for a budget."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from microglia.core.batch import call, to_device
from microglia.core.errors import BudgetError
from microglia.graph.channels.coupled import CoupledChannels

INPUTS, HIDDEN = 64, 128  # length of the importance network's inputs, and of each direction of its GRU
OFFSET, TEMPERATURE, MEMORY, JITTER, TOLERANCE = 3.0, 0.4, 0.99, 0.02, 0.01
RAMP, FLOOR = 0.05, 0.025  # half the prefix's ramp as a fraction of the channels; floor of the prefix


class Aim(Protocol):
    """The target of a search."""

    @property
    def kept(self) -> float:
        """p, the kept fraction of the multiply-accumulates."""
        ...

    @property
    def strength(self) -> float:
        """w, the weight of the penalty on multiply-accumulates."""
        ...


def by_group(vector: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns the mean over each group's channels, (groups,)."""
    return torch.stack([part.mean() for part in torch.split(vector, list(lengths))])


def to_channels(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns each group's value for all its channels, (channels,)."""
    return values.repeat_interleave(torch.tensor(lengths, device=values.device))


def ranks(importance: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns each channel's rank in its group, 0 = most important, ties by position: a permutation of each group."""
    parts = torch.split(importance, list(lengths))
    return torch.cat([part.argsort(descending=True, stable=True).argsort() for part in parts])


class Prefix(torch.autograd.Function):
    """The soft mask of the first kappa C of each group's channels by rank, (channels,), with a smooth step at the end.

    The step q(x) = -2 (x/T)^3 + 1.5 (x/T) + 0.5 is T = 2 s channels long; s = int(0.05 C), or less near the end of the group.
    With s = 0 the mask is the first round(kappa C). x is measured at the middle of channels, so that the mask sums to kappa C;
    in the authors' code the sum is half a channel larger. ``floor`` is added to all entries, up to 1.
    """

    @staticmethod
    def forward(ctx: Any, widths: Tensor, ranks: Tensor, lengths: list[int], floor: float = 0.0) -> Tensor:  # noqa: D102
        ctx.lengths = lengths
        sizes = torch.tensor(lengths, device=widths.device)
        whole = (widths * sizes + 0.5).floor()
        half = torch.minimum((RAMP * sizes).floor(), torch.minimum(whole, sizes - whole))
        wide, first, half = (to_channels(v, lengths) for v in (widths * sizes, whole, half))
        x = torch.maximum(torch.minimum(wide - ranks - 0.5, half), -half) / (2 * half).clamp(min=1)
        prefix = torch.where(half > 0, -2 * x**3 + 1.5 * x + 0.5, (ranks < first).to(x.dtype))
        return (prefix + floor).clamp(max=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Returns dL/dkappa, the mean over channels of dL/dmask (spec: 9.1)."""
        return by_group(gradients[0], ctx.lengths), None, None, None


def _uniform(like: Tensor, inputs: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(nn.init.uniform_(like, -(inputs**-0.5), inputs**-0.5, generator=generator))


class Search(nn.Module):
    """The two networks and the moving average of the importance; all random numbers are drawn on the CPU."""

    def __init__(self, channels: CoupledChannels, config: Aim, energy: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.channels, self.config, self.lengths, self.generator = channels, config, list(channels.lengths), generator
        self.gates: Tensor | None = None
        groups, device = len(self.lengths), energy.device
        self.noise = torch.randn(groups, generator=generator).to(device)
        self.linear = _uniform(torch.empty(groups, groups), groups, generator)
        self.inputs = nn.init.orthogonal_(torch.empty(groups, INPUTS), generator=generator).to(device)
        self.gru = nn.GRU(INPUTS, HIDDEN, bidirectional=True, device="meta").to_empty(device="cpu")  # draws nothing
        for parameter in self.gru.parameters():
            _uniform(parameter.data, HIDDEN, generator)
        self.norm = nn.LayerNorm(2 * HIDDEN)
        self.heads = nn.ParameterList([_uniform(torch.empty(n, 2 * HIDDEN), 2 * HIDDEN, generator) for n in self.lengths])
        self.energy = torch.cat([part / part.max().clamp_min(1e-30) for part in torch.split(energy, self.lengths)]).float()
        self.average = torch.zeros(channels.count, device=device)
        self.to(device)

    def widths(self) -> Tensor:
        """Returns kappa, (groups,)."""
        return torch.sigmoid(self.linear @ self.noise + OFFSET)

    def forward(self) -> Tensor:
        """Draws new gates and returns their penalty for the task's loss."""
        widths, lengths = self.widths(), self.lengths
        features = torch.relu(self.norm(self.gru(self.inputs)[0]))
        outputs = torch.cat([head @ row for head, row in zip(self.heads, features, strict=True)])
        drawn = torch.rand(len(outputs) + len(lengths), generator=self.generator).to(outputs.device)
        shifted = outputs - (-drawn[: len(outputs)].clamp_min(1e-20).log()).log() + OFFSET  # with Gumbel noise
        importance = (torch.sigmoid(shifted) + self.energy).detach() / 2
        self.average.lerp_(importance, 1 - MEMORY)
        soft = torch.sigmoid(shifted / TEMPERATURE)
        prefix: Tensor = Prefix.apply(widths, ranks(importance, lengths), lengths, FLOOR)  # type: ignore[no-untyped-call]
        self.gates = prefix * soft
        shares = by_group(soft + ((soft >= 0.5).to(soft.dtype) - soft).detach(), lengths)
        macs = self.channels.macs(to_channels((widths + shares).double() / 2, lengths))
        pursuit = (shares - widths + (2 * drawn[len(outputs) :] - 1) * JITTER).abs().log1p().sum()
        return 2 * self.config.strength * (macs / self.config.kept).log().abs() + pursuit


def whole_widths(channels: CoupledChannels, widths: Tensor, kept: float) -> Tensor:
    """Returns the channels that each group keeps, at least one, so that ``kept`` of the multiply-accumulates remains, int64.

    A growing common factor on the widths adds the channels of all groups in one order. Each channel raises the
    multiply-accumulates, so bisection finds the point nearest to the budget. If the last channel is so large that the budget is
    missed, other channels are removed for it.

    Raises:
        BudgetError: Even one channel in each group exceeds the budget.
    """
    lengths = channels.lengths
    place, group = ranks(torch.zeros(channels.count), lengths), to_channels(torch.arange(len(lengths)), lengths)
    factor = (place + 0.5) / to_channels(widths * torch.tensor(lengths), lengths)
    order = torch.where(place > 0, factor, -1.0).argsort(stable=True)

    def ratio(stay: Tensor) -> float:
        return float(channels.macs(torch.zeros(channels.count, dtype=torch.float64).index_fill_(0, stay, 1.0))) / kept

    at = bisect.bisect_right(range(len(lengths), channels.count + 1), 1.0, key=lambda n: ratio(order[:n])) + len(lengths) - 1
    if at < len(lengths):
        raise BudgetError(f"flops={kept:g} cannot be met with one channel in each group; ask for more, or exclude less.")
    below, above, stuck = order[:at], order[: at + 1], set()
    if min(1 - ratio(below), ratio(above) - 1) > TOLERANCE:
        for channel in reversed(order[len(lengths) : at].tolist()):
            if int(group[channel]) not in stuck and ratio(fewer := above[above != channel]) >= 1:
                above = fewer
            else:
                stuck.add(int(group[channel]))
    return group[min(below, above, key=lambda stay: abs(ratio(stay) - 1))].bincount(minlength=len(lengths))


@torch.no_grad()
def energies(
    model: nn.Module,
    channels: CoupledChannels,
    batches: Iterable[tuple[Any, Any]],
    device: torch.device,
    forward: Callable[[nn.Module, Any], Any] = call,
) -> Tensor:
    """Returns each channel's energy, the sum over data and positions of x^2 in all layers that read it, float64 (channels,).

    It is only compared within a group. It is 0 if no module has the channel as its input, as inside attention.
    """
    energy = torch.zeros(channels.count + 1, dtype=torch.float64)

    def note(units: Tensor, rank: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):  # after the channels come as many dimensions as the kernel has
            each = args[0].movedim(args[0].ndim - rank + 1, 0).flatten(1).float().square().sum(1).double().cpu()
            if len(each) % len(units) == 0:  # a grouped convolution's weight has the channels of one group
                energy.index_add_(0, units, each.view(-1, len(units)).sum(0))

    hooks = []
    for place in channels.read:
        module, rank = model.get_submodule(place.name.rpartition(".")[0]), model.get_parameter(place.name).ndim
        hooks.append(module.register_forward_pre_hook(partial(note, place.units, rank)))
    for inputs, _ in batches:
        forward(model, to_device(inputs, device))
    for hook in hooks:
        hook.remove()
    return energy[:-1].to(device)
