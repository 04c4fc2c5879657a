"""MetaPruning (Liu et al. 2019): a network that makes weights for any widths, and an evolution over the widths.

The algorithm (spec: survey 8.4 and correction C7):
    PruningNet: for each convolution two linear layers map the widths around it to a full weight, of which the first channels
    of each group are taken; it is trained on random widths, and the norms have no affine parameters
    evolve width vectors within the budget; each is valued with the weights made for it, batch-norm statistics estimated anew
then train a network of the winner's widths from its initial weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from microglia.core.batch import to_device
from microglia.core.errors import BudgetError
from microglia.graph.channels.coupled import CoupledChannels
from microglia.methods.channel_procedure import cut_and_recovered, fits
from microglia.methods.config import method
from microglia.methods.evolution import Evolution, Genes
from microglia.methods.procedure import dense_model, train
from microglia.methods.width_procedure import search_and_mask
from microglia.methods.width_search import Evaluator, SearchedConfig, SearchedPruner
from microglia.methods.width_space import TRIES, Widths, WidthSpace
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig
from microglia.train.recover import Norm

OPTIONS = 31
HIDDEN = 32
"""Hidden units of each layer's generator."""


def share(gene: int) -> float:
    """Returns the kept fraction of an option: 0.10, 0.13, ..., 1.00."""
    return (10 + 3 * gene) / 100


def widths_of(genes: Genes, sizes: Widths) -> Widths:
    """Returns the widths of one option per group: the fraction of the group, rounded down, at least 1."""
    return tuple(max(1, (10 + 3 * gene) * size // 100) for gene, size in zip(genes, sizes, strict=True))


@dataclass(frozen=True)
class MetaPruningConfig(SearchedConfig):
    """MetaPruning; ``sparse_epochs`` and ``sparse_lr`` are of PruningNet, ``train`` of the winner.

    Attributes:
        tolerance: How far below the budget a candidate may be, of the dense network; it is never above. The authors' search on
            ResNet-50 allows this much below half.
        population: Candidates of each iteration.
        parents: The best so far that mutate and cross.
        mutants: Mutated candidates of each iteration.
        crossovers: Crossed candidates of each iteration.
        probability: Probability that a gene mutates.
        iterations: Iterations of the evolution.
    """

    tolerance: float = 0.025
    population: int = 50
    parents: int = 10
    mutants: int = 25
    crossovers: int = 25
    probability: float = 0.1
    iterations: int = 20

    def check_values(self) -> None:
        """Raises `BudgetError` for numbers of an evolution that are out of range."""
        _ = self.evolution

    @property
    def evolution(self) -> Evolution:
        """The evolution."""
        names = ("population", "parents", "mutants", "crossovers", "probability", "iterations")
        return Evolution(**{name: getattr(self, name) for name in names})

    @property
    def sparse(self) -> FitConfig:
        """The training of PruningNet."""
        epochs = self.train.epochs if self.sparse_epochs is None else self.sparse_epochs
        return replace(self.train, epochs=epochs, lr=self.train.lr if self.sparse_lr is None else self.sparse_lr, distill=0.0)


class PruningNet(nn.Module):
    """Makes the weights of a model's convolutions from its widths; in training every batch has random widths.

    Linear layers keep one weight for all widths, as in the paper's code. In evaluation mode the widths are those before
    pruning, and running statistics mean nothing: `made` gives a model of certain widths, whose statistics must be estimated.

    Args:
        model: The model whose shape and linear layers are taken; a copy is kept.
        units: Its coupled channels.
        seed: Seed of the widths.
    """

    def __init__(self, model: nn.Module, units: CoupledChannels, *, seed: int = 0) -> None:
        super().__init__()
        self.body, self.units, self.seed = deepcopy(model), units, seed
        self.sizes: Widths = tuple(units.lengths)
        self.draws: Tensor
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        for norm in self.body.modules():
            if isinstance(norm, Norm) and norm.affine:
                nn.init.ones_(norm.weight.requires_grad_(False))
                nn.init.zeros_(norm.bias.requires_grad_(False))
        self._around: dict[str, list[int]] = {}
        starts = torch.tensor(self.sizes).cumsum(0)
        for place in (*units.made, *units.read):
            groups = torch.bucketize(place.units[place.units < units.count], starts, right=True)
            own = self._around.setdefault(place.name, [])
            own += [group for group in dict.fromkeys(groups.tolist()) if group not in own]
        self._made = {place.name for place in units.made}
        self.generators = nn.ModuleDict()
        for name, parameter in self.body.named_parameters():
            if name in self._around and parameter.ndim > 2:
                parameter.requires_grad_(False)
                first, second = nn.Linear(len(self._around[name]), HIDDEN), nn.Linear(HIDDEN, parameter.numel())
                self.generators[name.replace(".", "/")] = nn.Sequential(first, nn.ReLU(), second).to(parameter.device)

    def weights(self, widths: Widths) -> dict[str, Tensor]:
        """Returns the parameters that depend on the widths, full-size, zero outside the first channels of each group."""
        shares = [width / size for width, size in zip(widths, self.sizes, strict=True)]
        kept = self.kept(widths)
        found: dict[str, Tensor] = {}
        for name, parameter in self.body.named_parameters():
            value: Tensor = parameter
            if (key := name.replace(".", "/")) in self.generators:
                around = torch.tensor([shares[group] for group in self._around[name]], device=parameter.device)
                value = self.generators[key](around).view_as(parameter)
            if name in self._made:
                value = self.units.companion(name, value, kept.to(parameter.device))
            if value is not parameter:
                found[name] = value
        return found

    def kept(self, widths: Widths) -> Tensor:
        """Returns the first channels of each group, boolean (count,)."""
        return torch.cat([torch.arange(size) < width for width, size in zip(widths, self.sizes, strict=True)])

    @torch.no_grad()
    def made(self, widths: Widths) -> nn.Module:
        """Returns the small model of a width vector, with the weights made for it."""
        for name, value in self.weights(widths).items():
            if name.replace(".", "/") in self.generators:
                self.body.get_parameter(name).data.copy_(value)
        return self.units.sliced(self.body, self.kept(widths))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Returns the outputs of the model at random widths, or whole in evaluation mode."""
        widths = self.sizes
        if self.training:
            made = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.draws))
            widths = widths_of(tuple(torch.randint(OPTIONS, (len(widths),), generator=made).tolist()), widths)
            self.draws += 1
        return functional_call(self.body, self.weights(widths), inputs, named)


class MetaPruning(SearchedPruner):
    """Evolves widths on the weights of a `PruningNet`, ``net``, which is to be trained first; see `SearchedPruner`."""

    Config = MetaPruningConfig

    @property
    def own(self) -> MetaPruningConfig:
        """The config."""
        return cast(MetaPruningConfig, self.config)

    def begin(self) -> None:
        """Makes the PruningNet."""
        self.net = PruningNet(self.model, self.units)

    def make_space(self) -> WidthSpace:
        """Returns the width vectors below the budget."""
        return WidthSpace(self.units, self.asked, kept=(share(0), 1.0), below=self.own.tolerance, above=0.0)

    def ranking(self) -> Tensor:
        """Returns values by which the first channels of each group stay."""
        return torch.cat([-torch.arange(size, dtype=torch.float64) for size in self.units.lengths])

    def candidate(self, widths: Widths) -> nn.Module:
        """Returns the small model of a vector, with the weights made for it."""
        return self.net.made(widths)

    @property
    def planned(self) -> int:
        """Number of candidates of all iterations."""
        return self.own.iterations * self.own.population

    def explore(self, evaluate: Evaluator, generator: torch.Generator) -> None:
        """Evolves vectors within the budget."""

        def values(born: list[Genes]) -> list[float]:
            found = evaluate([self._widths(genes) for genes in born])
            self.note(found)
            return found

        feasible = self._feasible
        self.own.evolution.run(OPTIONS, values, feasible, self._draw, generator, key=self._widths)

    def _widths(self, genes: Genes) -> Widths:
        return widths_of(genes, tuple(self.units.lengths))

    def _feasible(self, genes: Genes) -> bool:
        return self.space.feasible(self._widths(genes))

    def _draw(self, generator: torch.Generator) -> Genes | None:
        """Returns random genes within the budget; after many misses the last are shifted together."""
        genes: Genes = ()
        for _ in range(TRIES):
            genes = tuple(torch.randint(OPTIONS, (len(self.units.lengths),), generator=generator).tolist())
            if self._feasible(genes):
                return genes
            self.space.rejected += 1
        shifted = (tuple(min(OPTIONS - 1, max(0, g + by)) for g in genes) for by in range(1 - OPTIONS, OPTIONS))
        return next((genes for genes in shifted if self._feasible(genes)), None)

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken, the widths found and the PruningNet."""
        return super().state_dict() | {"net": self.net.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.net.load_state_dict(state["net"])


def check(task: Task, config: MetaPruningConfig) -> None:
    """Raises unless the budget fits the task's model, and the task can build it untrained."""
    fits(MetaPruning)(task, config)
    if task.fresh is None and task.pretrained:
        raise BudgetError(
            "MetaPruning trains the winner from scratch, and this task only builds trained weights: give it fresh=."
        )


@method(
    "metapruning",
    MetaPruningConfig,
    check=check,
    paper="Liu et al. 2019, arXiv 1903.10258",
    purpose="widths by a network that makes weights",
)
def metapruning(task: Task, run: Run, config: MetaPruningConfig) -> nn.Module:
    """MetaPruning: a network makes weights for any widths, an evolution finds the best; the winner is trained from scratch."""
    dense = dense_model(task, run, config.dense)
    teacher = dense if config.train.distill else None
    model = (task.build() if task.fresh is None else task.fresh(run.seed)).to(run.device)
    pruner = MetaPruning(model, config, total_steps=1, example_inputs=to_device(task.example, run.device))
    pruner.net.seed = run.seed
    train(task, run, "sparse", pruner.net, config.sparse)
    search_and_mask(task, run, config, model, lambda: pruner)
    return cut_and_recovered(task, run, config, model, teacher)
