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
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, PatternError, SelectorError, TrainingError
from microglia.core.layers import prunable_layers
from microglia.core.masks import mask
from microglia.graph import plan_of, shrink
from microglia.graph.coupled import CoupledChannels
from microglia.graph.plan import attach
from microglia.methods.base import MethodConfig, method
from microglia.methods.procedure import cut, dense_model, observe, train
from microglia.methods.soft import SoftMasks
from microglia.methods.units import ChannelUnits
from microglia.train.progress import Bar
from microglia.train.run import Progress, Run
from microglia.train.task import Task

INPUTS, HIDDEN = 64, 128
"""Length of the importance network's fixed inputs, and of each direction of its GRU."""
OFFSET = 3.0
"""Added before every sigmoid: the search starts with nearly everything kept."""
TEMPERATURE = 0.4
RAMP, FLOOR = 0.05, 0.025
"""Half the length of the prefix's ramp, as a fraction of the channels, and what a removed channel keeps in the search."""
MEMORY = 0.99
JITTER = 0.02
TOLERANCE = 0.01


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
        importance_decay: Weight decay of the importance network; the width network has none.
    """

    pattern: str = "channel"
    search_epochs: int = 200
    search_share: float = 0.05
    strength: float = 2.0
    search_lr: float = 1e-3
    importance_decay: float = 1e-4

    def __post_init__(self) -> None:  # here, so that it shows before the dense model is trained
        if self.pattern != "channel":
            raise PatternError(f"The method 'ddnp' removes whole channels: its pattern is channel, not {self.pattern}.")
        if self.layers != ("*",) or self.protect or self.allow_empty or self.scope != "global":
            raise SelectorError(
                "The method 'ddnp' takes exclude, which keeps layers whole, and not layers, protect, allow_empty or another "
                "scope than global: channels are coupled across layers, none is emptied, and the widths are learned."
            )
        if self.search_epochs < 1 or not 0 < self.search_share <= 1 or not self.search_lr > 0 or self.strength < 0:
            raise BudgetError(
                "search_epochs is at least 1, search_share in (0, 1], search_lr above 0 and strength at least 0; got "
                f"{self.search_epochs}, {self.search_share}, {self.search_lr} and {self.strength}."
            )

    @property
    def kept(self) -> float:
        """p, the kept fraction of the multiply-accumulates."""
        if self.flops is None or any(term is not None for term in (self.density, self.params, self.ms)):
            raise BudgetError(
                "The budget of the method 'ddnp' is flops, the kept fraction of the multiply-accumulates in (0, 1]: give it, "
                "such as flops=0.5, and leave density, params and ms out."
            )
        Budget(flops=self.flops)  # raises outside (0, 1]
        return self.flops


# ---------------------------------------------------------------------------------------------------- channels by group
def by_group(vector: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns the mean over each group's channels, (groups,)."""
    return torch.stack([part.mean() for part in torch.split(vector, list(lengths))])


def ranks(importance: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns each channel's rank in its group, 0 = most important, ties by position: a permutation of each group."""
    parts = torch.split(importance, list(lengths))
    return torch.cat([part.argsort(descending=True, stable=True).argsort() for part in parts])


class _Prefix(torch.autograd.Function):
    """dL/dkappa := mean over channels of dL/dmask (spec: 9.1); the order of the channels does not matter to it."""

    @staticmethod
    def forward(ctx: Any, widths: Tensor, ranks: Tensor, lengths: list[int], floor: float) -> Tensor:
        ctx.lengths = lengths
        sizes = torch.tensor(lengths, device=widths.device)
        whole = (widths * sizes + 0.5).floor()
        half = torch.minimum((RAMP * sizes).floor(), torch.minimum(whole, sizes - whole))
        wide, first, half = (v.repeat_interleave(sizes) for v in (widths * sizes, whole, half))
        # From the middle of each channel, so that the mask sums to kappa C; the authors' has half a channel more.
        x = torch.maximum(torch.minimum(wide - ranks - 0.5, half), -half) / (2 * half).clamp(min=1)
        mask = torch.where(half > 0, -2 * x**3 + 1.5 * x + 0.5, (ranks < first).to(x.dtype))
        return (mask + floor).clamp(max=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return by_group(gradients[0], ctx.lengths), None, None, None


def prefix(widths: Tensor, ranks: Tensor, lengths: Sequence[int], floor: float = 0.0) -> Tensor:
    """Returns the soft mask of the first kappa C of each group's channels by rank, (channels,), with a smooth step at the end.

    The step q(x) = -2 (x/T)^3 + 1.5 (x/T) + 0.5 is T = 2 s channels long, s = int(0.05 C), less where the group ends; where s
    is 0 the mask is the first round(kappa C) channels. ``floor`` is added to all, up to 1.
    """
    return _Prefix.apply(widths, ranks, list(lengths), floor)  # type: ignore[no-any-return, no-untyped-call]


# ---------------------------------------------------------------------------------------------------------- the networks
class WidthNetwork(nn.Module):
    """Fixed noise, one linear map, kappa = sigmoid(. + 3)."""

    noise: Tensor

    def __init__(self, groups: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("noise", torch.randn(groups, generator=generator))
        self.weight = nn.Parameter(_uniform((groups, groups), groups, generator))

    def forward(self) -> Tensor:
        """Returns kappa, (groups,)."""
        return torch.sigmoid(self.weight @ self.noise + OFFSET)


class ImportanceNetwork(nn.Module):
    """Fixed orthogonal inputs, one per group in order, a bidirectional GRU, layer norm and ReLU, a linear map per group."""

    inputs: Tensor

    def __init__(self, lengths: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("inputs", nn.init.orthogonal_(torch.empty(len(lengths), INPUTS), generator=generator))
        self.gru: nn.GRU = nn.utils.skip_init(nn.GRU, INPUTS, HIDDEN, bidirectional=True)  # leaves the global generator alone
        with torch.no_grad():
            for parameter in self.gru.parameters():
                parameter.copy_(_uniform(parameter.shape, HIDDEN, generator))
        self.norm = nn.LayerNorm(2 * HIDDEN)
        self.heads = nn.ParameterList([_uniform((length, 2 * HIDDEN), 2 * HIDDEN, generator) for length in lengths])

    def forward(self) -> Tensor:
        """Returns o, (channels,)."""
        features = torch.relu(self.norm(self.gru(self.inputs)[0]))
        return torch.cat([head @ row for head, row in zip(self.heads, features, strict=True)])


def _uniform(shape: Sequence[int], inputs: int, generator: torch.Generator) -> Tensor:
    """Returns what torch initializes linear maps and GRUs with, from a generator."""
    return (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(inputs)


# ------------------------------------------------------------------------------------------------------------ the search
@torch.no_grad()
def energies(model: nn.Module, channels: CoupledChannels, batches: Iterable[tuple[Any, Any]], device: torch.device) -> Tensor:
    """Returns each channel's energy: mean over data of the sum over positions of x^2, over all layers that read it.

    Float64 (channels,); 0 where no module call shows what is read, as for projections inside attention.
    """
    totals: dict[int, Tensor] = {}
    hooks, seen = [], 0
    for number, place in enumerate(channels.read):
        path, _, attribute = place.name.rpartition(".")
        module = model.get_submodule(path)
        rank = getattr(module, attribute).ndim

        def note(_: nn.Module, args: tuple[Any, ...], number: int = number, rank: int = rank) -> None:
            if args and isinstance(args[0], Tensor):  # channels are in front of as many dimensions as the kernel has
                each = args[0].movedim(args[0].ndim - rank + 1, 0).flatten(1).float().square().sum(1).double()
                totals[number] = totals[number] + each if number in totals else each

        hooks.append(module.register_forward_pre_hook(note))
    for inputs, _ in batches:
        model(inputs.to(device))
        seen += len(inputs)
    for hook in hooks:
        hook.remove()
    energy = torch.zeros(channels.count + 1, dtype=torch.float64)
    for number, total in totals.items():
        units = channels.read[number].units
        if total.numel() % units.numel() == 0:  # a grouped convolution holds one group's channels
            energy.index_add_(0, units, total.view(-1, units.numel()).sum(0).cpu())
    return energy[:-1] / max(1, seen)


def gated(model: nn.Module, units: ChannelUnits, gates: list[Tensor]) -> nn.Module:
    """Returns a frozen copy in eval mode whose channels are multiplied by the last of ``gates``, if any, where they are read."""
    frozen = deepcopy(model).eval().requires_grad_(False)
    SoftMasks(frozen, units, lambda: gates[-1] if gates else None, None)
    return frozen


class Search:
    """The two networks, what moves them, and the moving average of the importance.

    Args:
        channels: What is searched.
        config: See `DdnpConfig`.
        energy: Of each channel, (channels,).
        generator: Of everything random, on the CPU.
        device: Where to compute.
    """

    def __init__(
        self, channels: CoupledChannels, config: DdnpConfig, energy: Tensor, generator: torch.Generator, device: torch.device
    ) -> None:
        self.channels, self.config, self.generator, self.device = channels, config, generator, device
        self.lengths = channels.lengths
        self.nets = nn.ModuleList([WidthNetwork(len(self.lengths), generator), ImportanceNetwork(self.lengths, generator)])
        self.nets.to(device)
        decays = (0.0, config.importance_decay)
        groups = [{"params": list(n.parameters()), "weight_decay": d} for n, d in zip(self.nets, decays, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, lr=config.search_lr)
        parts = torch.split(energy, self.lengths)
        self.energy = torch.cat([part / part.max().clamp_min(1e-300) for part in parts]).float().to(device)
        self.average = torch.zeros(channels.count, device=device)
        self.gates: list[Tensor] = []
        self.rows: list[dict[str, float]] = []

    def penalty(self) -> Tensor:
        """Draws new gates and returns what is added to the task's loss for them."""
        widths, outputs = self.nets[0](), self.nets[1]()
        gumbel = -(-self._uniform(self.channels.count).clamp_min(1e-20).log()).log()
        shifted = outputs + gumbel + OFFSET
        importance = (torch.sigmoid(shifted) + self.energy).detach() / 2
        self.average.lerp_(importance, 1 - MEMORY)
        soft = torch.sigmoid(shifted / TEMPERATURE)
        self.gates[:] = [prefix(widths, ranks(importance, self.lengths), self.lengths, FLOOR) * soft]
        shares = by_group(soft + ((soft >= 0.5).to(soft.dtype) - soft).detach(), self.lengths)
        jitter = (2 * self._uniform(len(self.lengths)) - 1) * JITTER
        macs = self.channels.macs(self._spread((widths + shares) / 2))
        pursuit = (shares - widths + jitter).abs().log1p().sum()
        return 2 * self.config.strength * (macs / self.config.kept).log().abs() + pursuit

    def epoch(self, model: nn.Module, task: Task, batches: Iterable[tuple[Any, Any]]) -> None:
        """Goes on by one pass over the batches."""
        rate, epochs = self.config.search_lr, self.config.search_epochs
        self.optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * len(self.rows) / epochs)) / 2
        total, steps = 0.0, 0
        for inputs, targets in batches:
            penalty = self.penalty()
            loss = task.loss(model(inputs.to(self.device)), targets.to(self.device)) + penalty
            if not torch.isfinite(loss):
                raise TrainingError(f"The loss of the search became {loss.item()}; look for non-finite weights or inputs.")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total, steps = total + float(loss.detach()), steps + 1
        macs = float(self.channels.macs(self._spread(self.nets[0]().detach())))
        self.rows.append({"epoch": len(self.rows) + 1, "loss": total / max(1, steps), "flops": macs})

    def state(self) -> dict[str, Any]:
        """Returns what is needed to go on."""
        nets, optimizer = self.nets.state_dict(), self.optimizer.state_dict()
        own = {"average": self.average, "rows": self.rows, "generator": self.generator.get_state()}
        return {"nets": nets, "optimizer": optimizer, **own}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.nets.load_state_dict(state["nets"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.copy_(state["average"])
        self.rows = list(state["rows"])
        self.generator.set_state(state["generator"])

    @torch.no_grad()
    def result(self) -> dict[str, Any]:
        """Returns the channels that stay, boolean (channels,), and the report."""
        widths = self.nets[0]().cpu()
        counts = whole_widths(self.channels, widths, self.config.kept)
        kept = ranks(self.average, self.lengths).cpu() < _each(counts, self.lengths)
        names = self.channels.names
        report = {
            "widths": dict(zip(names, widths.tolist(), strict=True)),
            "counts": dict(zip(names, counts, strict=True)),
            "flops": float(self.channels.macs(kept.double())),
            "history": self.rows,
        }
        return {"kept": kept, "report": report}

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator).to(self.device)

    def _spread(self, widths: Tensor) -> Tensor:
        return widths.double().repeat_interleave(torch.tensor(self.lengths, device=widths.device))


def _each(counts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return torch.tensor(counts).repeat_interleave(torch.tensor(lengths))


def whole_widths(channels: CoupledChannels, widths: Tensor, kept: float) -> list[int]:
    """Returns how many channels each group keeps, at least one, so that ``kept`` of the multiply-accumulates is left.

    A common factor on the widths reaches the channels of all groups in one order; along it the multiply-accumulates rise, so
    bisection finds the place. Where the nearest one is more than 1 % off, later channels that still fit fill the rest.

    Raises:
        BudgetError: One channel per group is too much already.
    """
    lengths = channels.lengths
    places = torch.arange(channels.count) - _each([sum(lengths[:i]) for i in range(len(lengths))], lengths)
    reached = (((n + 0.5) / (float(w) * size), i) for i, (w, size) in enumerate(zip(widths, lengths)) for n in range(1, size))
    order = [group for _, group in sorted(reached)]

    def counts(steps: int) -> list[int]:
        taken = Counter(order[:steps])
        return [1 + taken[group] for group in range(len(lengths))]

    def ratio(counts: Sequence[int]) -> float:
        return float(channels.macs((places < _each(counts, lengths)).double())) / kept

    at = bisect.bisect_right(range(len(order) + 1), 1.0, key=lambda steps: ratio(counts(steps)))
    best = min((counts(steps) for steps in (at - 1, at) if 0 <= steps <= len(order)), key=lambda c: abs(ratio(c) - 1))
    if at == 0 and ratio(best) > 1 + TOLERANCE:
        raise BudgetError(
            f"flops={kept:g} cannot be met: with one channel in each group {kept * ratio(best):.3g} of the "
            "multiply-accumulates are left. Ask for more, or exclude less."
        )
    if at == 0 or abs(ratio(best) - 1) <= TOLERANCE:
        return best
    filled, full = counts(at - 1), set()
    for group in order[at - 1 :]:
        more = [n + (i == group) for i, n in enumerate(filled)]
        if group in full or ratio(more) > 1:
            full.add(group)
        else:
            filled = more
    return min(best, filled, key=lambda c: abs(ratio(c) - 1))


# --------------------------------------------------------------------------------------------------------- the procedure
def _units(model: nn.Module, example: Tensor, config: DdnpConfig) -> ChannelUnits:
    left = list(prunable_layers(model, config.exclude)) if config.exclude else []
    return ChannelUnits(model, prunable_layers(model), "auto", example, left)


def fits(task: Task, config: DdnpConfig) -> None:
    """Raises unless the channels of the task's model can be removed down to the budget."""
    channels = _units(task.build(), task.example, config).channels
    whole_widths(channels, torch.ones(len(channels.lengths)), config.kept)


@method("ddnp", DdnpConfig, check=fits)
def ddnp(task: Task, run: Run, config: DdnpConfig) -> nn.Module:
    """DDNP: two networks learn widths and ranks of the frozen model's channels, the rest is removed, fine-tune."""
    Budget(flops=config.kept)
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None
    found = run.stage("search", partial(search, task, run, config, model))
    run.observations["search"] = found["report"]
    model = cut(task, run, "prune", model, partial(_removed, task, run, config, found["kept"]))
    observe(task, run, "before", model)
    train(task, run, "train", model, config.train, teacher=teacher)
    return model


def search(task: Task, run: Run, config: DdnpConfig, model: nn.Module, progress: Progress) -> dict[str, Any]:
    """Returns what a search finds, a stage that goes on pass by pass; the model is left as it is.

    Every rank searches on the same batches with the same numbers, and the cut is the first one's.
    """
    units = _units(model, task.example.to(run.device), config)
    batches = task.data.batches("train", config.score_batch_size, seed=run.seed, shuffle=True)
    share = max(1, round(config.search_share * len(batches)))
    gates: list[Tensor] = []
    frozen = gated(model, units, gates)
    energy = energies(frozen, units.channels, islice(batches.epoch(0), share), run.device)
    own = Search(units.channels, config, energy, torch.Generator().manual_seed(run.seed), run.device)
    own.gates = gates
    if progress.state is not None:
        own.load(progress.state)
    with Bar("search", total=config.search_epochs, done=len(own.rows)) as bar:
        while len(own.rows) < config.search_epochs:
            own.epoch(frozen, task, islice(batches.epoch(0), share))
            progress.save(own.state())
            bar.advance()
    return own.result()


@torch.no_grad()
def _removed(task: Task, run: Run, config: DdnpConfig, kept: Tensor, model: nn.Module) -> nn.Module:
    """Returns the model without the other channels: all that makes them zero, then shrunk."""
    example, masked = task.example.to(run.device), deepcopy(model)
    units = _units(model, example, config)
    kept = kept.to(run.device)
    for name in units.companions:
        parameter = masked.get_parameter(name)
        parameter.copy_(units.companion(name, parameter, kept))
    mask(masked, units.masks(kept))
    small = shrink(masked, example)
    plan = plan_of(small)
    return attach(small, replace(plan, asked={"flops": config.kept}, got={"flops": plan.macs[1] / plan.macs[0]}))
