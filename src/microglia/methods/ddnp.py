"""DDNP, disentangled differentiable network pruning (ECCV 2022): two small networks learn widths and ranks of a frozen model.

The algorithm (spec: 9.1, after the authors' code). Per group of C coupled channels, with o of the importance network, noise g:
    width       kappa = sigmoid(linear(fixed noise) + 3)
    importance  sigmoid(o + g + 3) / 2 + energy / (2 max energy)     energy: mean over data of the sum of x^2 where it is read
    gate        prefix(kappa) at the channel's rank by importance, times u = sigmoid((o + g + 3) / 0.4)
    loss        L + 2 w |ln(MACs / (p MACs_dense))| + sum over groups ln(1 + |mean hard(u) - kappa + U(-0.02, 0.02)|)
where dL/dkappa := mean over channels of dL/dprefix; MACs are those of the mean of both widths, kappa and mean hard(u). In the
end channels rank by the moving average of their importance, and a common factor moves the widths to the budget.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call, to_device
from microglia.core.budget import Budget
from microglia.core.devices import device_of
from microglia.core.errors import BudgetError, PatternError, SelectorError
from microglia.core.masks import mask
from microglia.graph import plan_of, shrink
from microglia.graph.channels.coupled import CoupledChannels
from microglia.graph.cutting.plan import attach
from microglia.methods.config import MethodConfig, method
from microglia.methods.procedure import cut, dense_model, observe, train
from microglia.methods.soft import SoftMasks
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.step import Step, objective

INPUTS, HIDDEN = 64, 128  # length of the importance network's inputs, and of each direction of its GRU
OFFSET, TEMPERATURE, MEMORY, JITTER, DECAY, TOLERANCE = 3.0, 0.4, 0.99, 0.02, 1e-4, 0.01
RAMP, FLOOR = 0.05, 0.025  # half the prefix's ramp as a fraction of the channels; what is added to the prefix


@dataclass(frozen=True)
class DdnpConfig(MethodConfig):
    """DDNP; the budget is ``flops``, the kept fraction of the multiply-accumulates.

    Attributes:
        pattern: Always ``channel``.
        exclude: Selectors of layers that keep their shape; what is coupled to their inputs and outputs stays too.
        search_epochs: Passes of the search over its share of the training data, in batches of ``score_batch_size``.
        search_share: Fraction of the training batches that the search sees, the same ones in every pass.
        strength: w, of the penalty on multiply-accumulates.
        search_lr: Learning rate of both networks (AdamW); that of the widths falls along a cosine.
    """

    pattern: str = "channel"
    search_epochs: int = 200
    search_share: float = 0.05
    strength: float = 2.0
    search_lr: float = 1e-3

    def __post_init__(self) -> None:  # here, so that it shows before the dense model is trained
        if self.pattern != "channel":
            raise PatternError(f"The method 'ddnp' removes whole channels: its pattern is channel, not {self.pattern}.")
        if self.layers != ("*",) or self.protect or self.allow_empty or self.scope != "global":
            raise SelectorError(
                "The method 'ddnp' takes exclude, which keeps layers whole, and not layers, protect, allow_empty or scope."
            )
        if self.search_epochs < 1 or not 0 < self.search_share <= 1 or not self.search_lr > 0 or self.strength < 0:
            raise BudgetError("search_epochs is at least 1, search_share in (0, 1], search_lr above 0, strength at least 0.")

    @property
    def kept(self) -> float:
        """p, the kept fraction of the multiply-accumulates."""
        if self.flops is None or (self.density, self.params, self.ms) != (None, None, None):
            text = "takes flops, the kept fraction of the multiply-accumulates such as 0.5, and not density, params or ms"
            raise BudgetError(f"The method 'ddnp' {text}.")
        return Budget(flops=self.flops).flops or 0.0  # which checks it


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

    The step q(x) = -2 (x/T)^3 + 1.5 (x/T) + 0.5 is T = 2 s channels long, s = int(0.05 C) or less, where the group ends; with
    s = 0 the mask is the first round(kappa C). x runs from the middles of channels, so that the mask sums to kappa C; in the
    authors' code it has half a channel more. ``floor`` is added to all, up to 1.
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
    """The two networks and the moving average of the importance; everything random is drawn on the CPU."""

    def __init__(self, channels: CoupledChannels, config: DdnpConfig, energy: Tensor, generator: torch.Generator) -> None:
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
        """Draws new gates and returns what is added to the task's loss for them."""
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
    """Returns how many channels each group keeps, at least one, so that ``kept`` of the multiply-accumulates is left, int64.

    A common factor on the widths reaches the channels of all groups in one order; with each the multiply-accumulates rise, and
    bisection finds the place nearest to the budget. Where that is off, for the last channel is a large one, others go for it.

    Raises:
        BudgetError: One channel in each group is too much already.
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

    It is only compared within a group; 0 where no module is called with what is read, as inside attention.
    """
    energy = torch.zeros(channels.count + 1, dtype=torch.float64)

    def note(units: Tensor, rank: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):  # channels are in front of as many dimensions as the kernel has
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


def _units(model: nn.Module, task: Task, config: DdnpConfig) -> CoupledChannels:
    example = to_device(task.example, device_of(model))
    return CoupledChannels(model, example, config.exclude)


def fits(task: Task, config: DdnpConfig) -> None:
    """Raises unless the channels of the task's model can be removed down to the budget."""
    kept, channels = config.kept, _units(task.build(), task, config)
    whole_widths(channels, torch.ones(len(channels.lengths)), kept)


@method("ddnp", DdnpConfig, check=fits)
def ddnp(task: Task, run: Run, config: DdnpConfig) -> nn.Module:
    """DDNP: two networks learn widths and ranks of the frozen model's channels, the rest is removed, fine-tune."""
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None
    found = run.stage("search", partial(search, task, run, config, model))
    run.observations["widths"] = found["report"]
    model = cut(task, run, "prune", model, partial(_removed, task, run, config, found["kept"]))
    observe(task, run, "before", model)
    train(task, run, "train", model, config.train, teacher=teacher)
    return model


def search(task: Task, run: Run, config: DdnpConfig, model: nn.Module, progress: Progress) -> dict[str, Any]:
    """Returns what a search finds; it works on a frozen copy, saves each pass, and is the same on every rank."""
    units, frozen = _units(model, task, config), deepcopy(model).eval().requires_grad_(False)
    batches = task.data.batches("train", config.score_batch_size, seed=run.seed, shuffle=True)
    share = max(1, round(config.search_share * len(batches)))
    energy = energies(frozen, units, islice(batches.epoch(0), share), run.device, task.forward)
    own = Search(units, config, energy, generator := torch.Generator().manual_seed(run.seed))
    SoftMasks(frozen, units, lambda: own.gates, None)
    rest = [parameter for parameter in own.parameters() if parameter is not own.linear]
    groups = [{"params": [own.linear], "weight_decay": 0.0}, {"params": rest, "weight_decay": DECAY}]
    optimizer, rows = torch.optim.AdamW(groups, config.search_lr), []
    step = Step(task, frozen, [optimizer], objective(task, training=False), own.noise.device)
    if (state := progress.state) is not None:
        own.load_state_dict(state["networks"])
        own.average.copy_(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        rows = list(state["rows"])
    while len(rows) < config.search_epochs:
        optimizer.param_groups[0]["lr"] = config.search_lr * (1 + math.cos(math.pi * len(rows) / config.search_epochs)) / 2
        rows.append({"loss": _epoch(own, step, islice(batches.epoch(0), share))})
        state = {"networks": own.state_dict(), "average": own.average, "optimizer": optimizer.state_dict(), "rows": rows}
        progress.save({**state, "generator": generator.get_state()})
    widths = own.widths().detach().cpu()
    counts = whole_widths(units, widths, config.kept)
    learned, final = (dict(zip(units.names, values.tolist(), strict=True)) for values in (widths, counts))
    kept = ranks(own.average.cpu(), own.lengths) < to_channels(counts, own.lengths)
    return {"kept": kept, "report": {"widths": learned, "counts": final, "history": rows}}


def _epoch(own: Search, step: Step, batches: Iterable[Any]) -> float:
    """Goes on by one pass over the batches; returns the mean loss."""
    losses, diverged = [], "The loss of the search became {loss}; look for non-finite weights or inputs."
    for batch in batches:
        penalty = own()  # first: it draws the gates of the forward pass
        losses.append(float(step(batch, penalty=lambda drawn=penalty: drawn, diverged=diverged)))  # type: ignore[misc]
    return sum(losses) / len(losses)


def _removed(task: Task, run: Run, config: DdnpConfig, kept: Tensor, model: nn.Module) -> nn.Module:
    """Returns the model without the other channels, biases and shifts of theirs included."""
    masked = deepcopy(model)
    mask(masked, _units(model, task, config).masks(kept.to(run.device)))
    small = shrink(masked, to_device(task.example, run.device), clear=True)
    plan = plan_of(small)
    return attach(small, replace(plan, asked={"flops": config.kept}, got={"flops": plan.macs[1] / plan.macs[0]}))
