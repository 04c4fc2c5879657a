"""AMC (He et al. 2018): an agent chooses the kept fraction of one group of channels after the other.

The algorithm (spec: FTWT and SMART 9.2), every episode:
    for each group the state tells its layer, the operations removed before and those left, and the last action
    the action is the kept fraction; at most so much that the rest, at its narrowest, still meets the budget
    the reward after the last group is the value of the small model on held-out training examples
    after the random episodes the agent learns (`microglia.methods.ddpg`), with noise of 0.5 x 0.95^episode
then cut to the best widths; fine-tune. Channels of the largest L1 mass in the weights that read them stay. Batch-norm
statistics of each candidate are estimated anew, as the searches of this package share one evaluator; the published code
rebuilds the weights of 1x1 layers by least squares instead, which ``reconstruct`` adds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import ClassVar, cast, get_args

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.layers import prunable_layers
from microglia.core.masks import MaskSet
from microglia.core.registry import unknown_name
from microglia.methods.channel_procedure import fits
from microglia.methods.config import method
from microglia.methods.ddpg import Ddpg
from microglia.methods.least_squares import LeastSquares, Reconstructed
from microglia.methods.what import SAMPLING, Takes
from microglia.methods.width_procedure import searched_widths
from microglia.methods.width_search import WIDTHS, Evaluator, SearchedConfig, SearchedPruner
from microglia.methods.width_space import Widths, WidthSpace
from microglia.storage.run import Run
from microglia.tasks.task import Task

DEVIATION, DECAY = 0.5, 0.95
MEMORY = 100
"""Episodes that are remembered."""


@dataclass(frozen=True)
class AmcConfig(SearchedConfig):
    """AMC.

    Attributes:
        round_to: Widths are multiples of this; narrower groups stay whole. The published code takes 8.
        tolerance: How far below the budget an episode may end, as far as single groups allow; almost all by default, as in the
            published code. None ends above it.
        episodes: Width vectors that are proposed; equal ones are evaluated once.
        warmup: The first of these, which are random.
        least: Least kept fraction of a group.
        reconstruct: Whether the weights that read the kept channels are solved by least squares on training batches, for each
            candidate and for the result: ``none``, ``1x1`` (linear and 1x1 layers, as in the published code) or ``all``.
    """

    takes: ClassVar[Takes] = replace(WIDTHS, fields=(*WIDTHS.fields, *SAMPLING))
    tolerance: float = 0.999
    episodes: int = 800
    warmup: int = 100
    least: float = 0.2
    reconstruct: Reconstructed = "none"

    def check_values(self) -> None:
        """Raises `BudgetError` for counts and fractions out of range."""
        if not 1 <= self.warmup <= self.episodes:
            raise BudgetError(f"warmup is at least 1 and at most episodes; got {self.warmup} of {self.episodes}.")
        if not 0 <= self.least < 1:
            raise BudgetError(f"least is the least kept fraction of a group, in [0, 1); got {self.least}.")
        if self.reconstruct not in get_args(Reconstructed):
            raise unknown_name("reconstruction", self.reconstruct, get_args(Reconstructed))


class Amc(SearchedPruner):
    """Lets an agent choose the widths; see `SearchedPruner`."""

    Config = AmcConfig

    @property
    def own(self) -> AmcConfig:
        """The config."""
        return cast(AmcConfig, self.config)

    def begin(self) -> None:
        """Looks at what layers read, if their weights are to be solved."""
        self.solver: LeastSquares | None = None
        self.stay: Tensor | None = None
        if self.own.reconstruct != "none":
            layers = prunable_layers(self.model)
            self.solver = LeastSquares(self.model, self.units, layers, self.evidence, self.own.reconstruct)

    def candidate(self, widths: Widths) -> nn.Module:
        """Returns the small model of a vector."""
        if self.solver is None:
            return super().candidate(widths)
        with self.solver.applied(self.space.channels(self.values_of_channels, widths)):
            return super().candidate(widths)

    def final(self) -> Tensor:
        """Returns the channels that stay."""
        return super().final() if self.stay is None else self.stay

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Masks the channels that do not stay; the others' readers get the weights of the best candidate."""
        if self.solver is not None and self.stay is None:
            self.stay = self.final()  # first: new weights would rank the channels anew
            self.solver.write(self.solver.weights(self.stay))
        return super().finish()

    def make_space(self) -> WidthSpace:
        """Returns the width vectors at or below the budget."""
        own = self.own
        return WidthSpace(self.units, self.asked, kept=(own.least, 1.0), below=own.tolerance, above=0.0, round_to=own.round_to)

    @torch.no_grad()
    def ranking(self) -> Tensor:
        """Returns the L1 mass of the weights that read each channel."""
        total = torch.zeros(self.units.count + 1, dtype=torch.float64)
        for place in self.units.read:
            mass = self.raw[place.name].detach().cpu().double().abs().movedim(place.dim, 0).flatten(1).sum(1)
            total.index_add_(0, place.units, mass)
        return total[:-1]

    @property
    def planned(self) -> int:
        """Number of episodes."""
        return self.own.episodes

    def explore(self, evaluate: Evaluator, generator: torch.Generator) -> None:
        """Lets the agent act, and learn after the random episodes."""
        own, features = self.own, self._features()
        steps = len(self.units.lengths)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        agent = Ddpg(len(features[0]) + 3, memory=MEMORY * steps, seed=seed)
        drawn = [self._episode(agent, features, None) for _ in range(own.warmup)]  # valued together, in processes
        values = evaluate([widths for widths, _, _ in drawn])
        self.note(values)
        for (_, states, actions), value in zip(drawn, values, strict=True):
            agent.remember(states, actions, value)
        for episode in range(own.episodes - own.warmup):
            widths, states, actions = self._episode(agent, features, DEVIATION * DECAY**episode)
            (value,) = evaluate([widths])
            self.note([value])
            agent.remember(states, actions, value)
            for _ in range(steps):
                agent.update()

    def _episode(self, agent: Ddpg, features: Tensor, deviation: float | None) -> tuple[Widths, list[Tensor], list[float]]:
        """Returns the widths that the agent chooses, with its states and actions; random ones without a deviation."""
        lengths = self.units.lengths
        narrow, wide = self.space.at([0.0] * len(lengths)), tuple(lengths)
        chosen: list[int] = []
        states: list[Tensor] = []
        actions: list[float] = []
        last = 1.0
        for number, size in enumerate(lengths):
            rest = self.units.fraction("flops", [*chosen, *wide[number:]])
            removed = 1 - rest
            states.append(torch.cat([features[number], torch.tensor([removed, rest, last])]))
            bounds = self.own.least, 1.0
            action = agent.random(*bounds) if deviation is None else agent.act(states[-1], deviation, *bounds)
            asked = self.space.at([action] * len(lengths))[number]
            options, excess = self._options(chosen, narrow)
            most = options[max(0, bisect_right(excess, 1e-12) - 1)]
            options, excess = self._options(chosen, wide)
            least = options[min(len(options) - 1, bisect_left(excess, -self.space.below - 1e-12))]
            width = min(max(asked, least), most)
            last = width / size
            chosen.append(width)
            actions.append(last)
        return tuple(chosen), states, actions

    def _options(self, chosen: list[int], later: Widths) -> tuple[list[int], list[float]]:
        """Returns the widths of the next group, ascending, and how far each is above the budget with given later widths."""
        number = len(chosen)
        size = self.units.lengths[number]
        widths = sorted({self.space.at([share / size] * len(later))[number] for share in range(1, size + 1)})
        return widths, [self.space.excess([*chosen, width, *later[number + 1 :]]) for width in widths]

    def _features(self) -> Tensor:
        """Returns what a state tells of the layer that makes each group, (groups, 7), from 0 to 1 over the groups.

        Index, whether it is a convolution, inputs, outputs, stride, kernel, weights.
        """
        rows = []
        for number, name in enumerate(self.units.names):
            module = self.model.get_submodule(name.partition("#")[0].rpartition(".")[0])
            weight = self.raw[name.partition("#")[0]]
            stride = module.stride[0] if isinstance(module, nn.Conv2d) else 1
            shape = [weight.shape[1] if weight.ndim > 1 else 1, self.units.lengths[number]]
            kernel = weight.shape[-1] if weight.ndim > 2 else 1
            rows.append([number, weight.ndim > 2, *shape, stride, kernel, weight.numel()])
        values = torch.tensor(rows, dtype=torch.float32)
        least = values.amin(0)
        return (values - least) / (values.amax(0) - least).clamp(min=1e-9)


@method(
    "amc",
    AmcConfig,
    check=fits(Amc),
    paper="He et al. 2018, arXiv 1802.03494",
    purpose="densities of layers by reinforcement learning",
)
def amc(task: Task, run: Run, config: AmcConfig) -> nn.Module:
    """AMC: an agent (DDPG) learns the kept fraction of each group, always within the budget; fine-tune."""
    return searched_widths(task, run, config, Amc)
