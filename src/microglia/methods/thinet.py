"""ThiNet (Luo et al. 2017): the channels go without which the next layer's outputs change least; the others are rescaled.

The algorithm (spec: survey 8.6), for each group of coupled channels, in the order of the network:
    sample y = sum_c x_c at random outputs and positions of the layers that read the group, x_c the part of channel c
    add to the removed set T, one by one, the channel that minimizes sum (sum_(c in T) x_c)^2
    scale the columns of the others by the least-squares w that minimizes |y - X w|^2
then remove T; fine-tune.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.modes import evaluating
from microglia.graph.channels.coupled import Place
from microglia.graph.channels.widths import highest
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import SAMPLED, AtOnce, ChannelConfig
from microglia.methods.config import method
from microglia.methods.what import Takes
from microglia.scores import scores
from microglia.scores.reading import outputs_of
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig


@dataclass(frozen=True)
class ReadersConfig(ChannelConfig):
    """Methods that sample what layers read, and train only to recover.

    Attributes:
        positions: Outputs that are sampled for each image and reading layer.
    """

    takes: ClassVar[Takes] = SAMPLED
    positions: int = 10

    def check_values(self) -> None:
        """Raises `BudgetError` for less than one position."""
        if self.positions < 1:
            raise BudgetError(f"positions is at least 1; got {self.positions}.")

    @property
    def sparse(self) -> FitConfig:
        """The training before the cut: none."""
        return replace(self.train, epochs=0)


@dataclass(frozen=True)
class ThinetConfig(ReadersConfig):
    """ThiNet; it trains only to recover.

    Attributes:
        scope: Always ``uniform``: the same fraction of every group.
        rescale: Whether to scale what stays by least squares.
    """

    takes: ClassVar[Takes] = replace(SAMPLED, scopes=("uniform",))
    scope: Literal["uniform", "global"] = "uniform"  # type: ignore[assignment]
    rescale: bool = True


class Readers(AtOnce):
    """Removes channels at once, when it is made, by samples of the layers that read them."""

    Config: type[ReadersConfig] = ReadersConfig

    def samples(self, places: Mapping[str, Place], own: slice) -> dict[str, Tensor]:
        """Returns by reading layer the parts of a group's channels in sampled outputs, float64 (samples, channels)."""
        found: dict[str, list[Tensor]] = {}
        handles = []
        for name, place in places.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and _plain(module)):

                def note(module: nn.Module, args: Any, output: Any, name: str = name, place: Place = place) -> None:
                    parts = contributions(module, args[0], self.raw[name], self._drawn(module, output)).cpu()
                    whole = parts.new_zeros(len(parts), self.units.count + 1).index_add_(1, place.units, parts)
                    found.setdefault(name, []).append(whole[:, own])

                handles.append(module.register_forward_hook(note))
        try:
            with evaluating(self.model):
                for inputs, _ in self.evidence.batches:
                    outputs_of(self.model, inputs, self.evidence.forward)
        finally:
            for handle in handles:
                handle.remove()
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _drawn(self, module: nn.Module, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (image, output, position) of each sample; positions are flat."""
        conv = isinstance(module, nn.Conv2d)
        outputs = output.shape[1] if conv else output.shape[-1]
        spots = output[0].numel() // outputs
        draws = len(output) * cast(ReadersConfig, self.config).positions
        uniform = torch.rand(2, draws, generator=self.evidence.generator)
        images = torch.arange(len(output)).repeat_interleave(draws // len(output))
        return images, (uniform[0] * outputs).long(), (uniform[1] * spots).long()


class Thinet(Readers):
    """Removes the channels that the next layers miss least, at once, when it is made; see `ChannelPruner`."""

    Config = ThinetConfig

    @torch.no_grad()
    def begin(self) -> None:
        """Chooses channels group by group, each on what the choices before left of the network.

        Raises:
            ScoreError: There are no batches.
        """
        if not list(self.evidence.batches):
            raise ScoreError("ThiNet samples what layers read: give evidence with batches, [(inputs, targets), ...].")
        wanted = self.choose(torch.zeros(self.units.count))
        self.target = torch.ones(self.units.count, dtype=torch.bool)
        for own in self.spans():
            if (count := int(wanted[own].sum())) < own.stop - own.start:
                self._thin(own, count)

    def _thin(self, own: slice, count: int) -> None:
        """Removes the channels of a group but for a count, and rescales the columns that read the others."""
        places = self.readers(own)
        samples = self.samples(places, own)
        if samples:
            kept = greedy(torch.cat(list(samples.values())), count)
        else:  # read by layers of other kinds alone, such as grouped convolutions
            kept = highest(self.of_filters(scores["l2"](self.model, self.layers, self.evidence))[own].cpu(), count)
        self.target[own] = kept
        for name, found in samples.items() if cast(ThinetConfig, self.config).rescale else ():
            factors = torch.ones(self.units.count + 1, dtype=torch.float64)
            factors[own] = torch.zeros(len(kept), dtype=torch.float64).masked_scatter(kept, least_squares(found, kept))
            raw, place = self.raw[name], places[name]
            raw.mul_(factors[place.units].to(raw).view([-1 if d == place.dim else 1 for d in range(raw.ndim)]))
        gone = torch.zeros(self.units.count, dtype=torch.bool)
        gone[own] = ~kept
        self.clear(gone, whole=True)


def _plain(module: nn.Conv2d) -> bool:
    """Tells whether a convolution reads all channels, between zeros."""
    return module.groups == 1 and not isinstance(module.padding, str) and module.padding_mode == "zeros"


def contributions(module: nn.Module, inputs: Tensor, weight: Tensor, drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Returns the part of each input channel in sampled outputs of a layer, float64 (samples, channels); no bias is in it.

    Args:
        module: A linear layer, or a convolution without groups.
        inputs: All that it read.
        weight: Its weight.
        drawn: (image, output, flat position) of each sample.
    """
    images, outputs, spots = (index.to(inputs.device) for index in drawn)
    rows = weight.detach().double()[outputs]
    if isinstance(module, nn.Conv2d):
        padding = cast("tuple[int, int]", module.padding)
        unfolded = functional.unfold(
            inputs.double(), module.kernel_size, dilation=module.dilation, padding=padding, stride=module.stride
        )
        patches = unfolded[images, :, spots].view(len(images), inputs.shape[1], -1)
        return (patches * rows.flatten(2)).sum(2)
    return inputs.double().reshape(len(inputs), -1, inputs.shape[-1])[images, spots] * rows


def greedy(samples: Tensor, count: int) -> Tensor:
    """Returns which channels stay, boolean (channels,): the others are taken one by one, each the one that adds least.

    Args:
        samples: Parts of the channels, (samples, channels).
        count: Channels that stay.
    """
    gram = samples.T @ samples
    cost, kept = gram.diagonal().clone(), torch.ones(gram.shape[0], dtype=torch.bool)
    for _ in range(len(kept) - count):
        worst = int(torch.where(kept, cost, torch.inf).argmin())  # what sum (sum_T x)^2 rises by
        kept[worst] = False
        cost += 2 * gram[worst]
    return kept


def least_squares(samples: Tensor, kept: Tensor) -> Tensor:
    """Returns the factors w of the kept channels that minimize |y - X w|^2, y the sum of all channels, (kept,).

    A channel that is never active, or repeats others, is not scaled where the solution would leave it undetermined: w is the
    solution nearest to ones.
    """
    inputs, missing = samples[:, kept], samples[:, ~kept].sum(1)
    gram = inputs.T @ inputs
    further: Tensor = torch.linalg.pinv(gram, hermitian=True) @ (inputs.T @ missing)
    return 1 + further


@method(
    "thinet",
    ThinetConfig,
    check=fits(Thinet),
    paper="Luo et al. 2017, arXiv 1707.06342",
    purpose="channels; the next layer's outputs are kept",
)
def thinet(task: Task, run: Run, config: ThinetConfig) -> nn.Module:
    """ThiNet: the channels go that the next layers miss least, the others are rescaled by least squares; fine-tune."""
    return thinned(task, run, config, Thinet)
