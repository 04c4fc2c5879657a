"""SCOP (Tang et al. 2020): channels that serve no better than their knockoffs, their outputs on counterfeit images, go.

The algorithm (spec: FTWT and SMART 9.4), with all weights frozen:
    run [x; x~], x~ counterfeit images, batch norm over both; after every layer that makes channels that can go
        y = beta conv(x) + (1 - beta) conv(x~) for the real half, beta in [0, 1] for each channel, 1/2 at the start
    train beta on the loss of the real half alone (Adam); clamp after every step
    rank channels by |gamma| (2 beta - 1), gamma the scale of the norm, 1 without one; the lowest of each layer go
    estimate batch-norm statistics anew; fine-tune.
The counterfeits are images of a data set that the user names, such as those of a generator, or noise with the mean and the
covariance of training images; the report says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from microglia.core.batch import map_tensors
from microglia.core.devices import device_of
from microglia.core.errors import BudgetError, ScoreError
from microglia.core.masks import SCORES, MaskSet
from microglia.core.modes import evaluating, statistics_kept
from microglia.data import load_data
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import SAMPLED, ChannelConfig, ChannelPruner
from microglia.methods.config import method
from microglia.methods.what import Takes
from microglia.scores.base import per_filter
from microglia.scores.behind import norms_behind
from microglia.storage.run import Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import Task

NOISE = "noise"


@dataclass(frozen=True)
class ScopConfig(ChannelConfig):
    """SCOP; the paper trains beta for 20 epochs (``sparse_epochs``).

    Attributes:
        scope: ``uniform``, as in the paper: the same fraction of every group; or ``global``.
        knockoffs: ``noise``, Gaussian with the mean and the covariance of the images of ``score_batches``; or a data set of
            counterfeit images, by name or folder, as for ``data``. ``score_batches`` are read of it.
        factor_lr: Rate of beta (Adam, betas 0.5 and 0.9).
    """

    takes: ClassVar[Takes] = SAMPLED
    scope: Literal["uniform", "global"] = "uniform"  # type: ignore[assignment]
    score_batches: int = 8
    knockoffs: str = NOISE
    factor_lr: float = 0.004

    def check_values(self) -> None:
        """Raises `BudgetError` for a rate that is not above 0."""
        if not self.factor_lr > 0:
            raise BudgetError(f"factor_lr is above 0; got {self.factor_lr}.")


class Scop(ChannelPruner):
    """Weighs the channels of a frozen model against knockoffs, to be stepped inside anybody's loop; see `ChannelPruner`.

    Args:
        model: The model to prune, in place; it takes one tensor and returns one.
        config: See `ScopConfig`.
        knockoffs: Counterfeit images, (count, ...), normalized as the inputs; None for noise like the evidence.
        **others: See `ChannelPruner`.
    """

    Config = ScopConfig

    def __init__(
        self, model: nn.Module, config: ScopConfig | None = None, *, knockoffs: Tensor | None = None, **others: Any
    ) -> None:
        self.counterfeits, self._stack = knockoffs, ExitStack()
        super().__init__(model, config, **others)

    def begin(self) -> None:
        """Freezes the model, and lets it mix knockoffs in while it trains.

        Raises:
            ScoreError: There are neither knockoffs nor batches, or the model takes another kind of inputs.
        """
        inputs = [inputs for inputs, _ in self.evidence.batches]
        if not all(isinstance(x, Tensor) for x in (self.example, *inputs)) or not (inputs or self.counterfeits is not None):
            raise ScoreError("Scop needs inputs that are one tensor: give evidence with batches, or knockoffs=images.")
        if self.counterfeits is not None and self.counterfeits.shape[1:] != self.example.shape[1:]:
            shapes = tuple(self.counterfeits.shape[1:]), tuple(self.example.shape[1:])
            raise ScoreError(f"Knockoffs have the shape of the model's inputs; got {shapes[0]} beside {shapes[1]}.")
        self._images = torch.cat(inputs) if self.counterfeits is None else self.counterfeits
        with evaluating(self.model):
            norms = norms_behind(self.model, self.layers, replace(self.evidence, batches=[(self._images[:2], None)]))
        self.scales = {n: norm.scale.detach().double().abs().cpu() for n, norm in norms.items()}
        self.frozen = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        called = {name: layer for name, layer in self.layers.items() if layer.kind.inputs is not None}
        sizes = {name: layer.sides[0] for name, layer in called.items()}
        self.model.register_parameter(SCORES, nn.Parameter(torch.full((sum(sizes.values()),), 0.5, device=self._device)))
        self.beta: nn.Parameter | None = self.model.get_parameter(SCORES)
        self._sizes, self._real = sizes, 0
        self._stack.enter_context(statistics_kept(self.model))
        self._stack.callback(self.model.register_forward_pre_hook(self._doubled).remove)
        self._stack.callback(self.model.register_forward_hook(self._halved).remove)
        for name, layer in called.items():
            mixed = partial(self._mixed, name, cast(int, layer.kind.inputs))
            self._stack.callback(layer.module.register_forward_hook(mixed).remove)

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name of each layer and its beta, (out,)."""
        assert self.beta is not None
        yield from zip(self._sizes, torch.split(self.beta, list(self._sizes.values())), strict=True)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step; beta stays in [0, 1]."""
        super().step(optimizer)
        if self.beta is not None:
            self.beta.clamp_(0, 1)

    @torch.no_grad()
    def ranking(self) -> Tensor:
        """Returns |gamma| (2 beta - 1), the mean over the layers that make a channel."""
        found = {name: self.scales.get(name, torch.ones(())) * (2 * beta.double().cpu() - 1) for name, beta in self.parts()}
        none = {name: torch.zeros(layer.sides[0]) for name, layer in self.layers.items()}  # inside attention, never called
        return self.of_filters({name: per_filter(self.layers[name], value) for name, value in (none | found).items()})

    def finish(self) -> MaskSet:
        """Unfreezes the model and masks the channels that do not stay; returns the masks."""
        if self.beta is not None:
            self.chosen = self.final()
            self._stack.close()
            self.beta = None
            delattr(self.model, SCORES)
            for parameter in self.frozen:
                parameter.requires_grad_(True)
        return super().finish()

    def final(self) -> Tensor:
        """Returns the channels that stay."""
        return super().final() if self.beta is not None else self.chosen

    def report(self) -> dict[str, Any]:
        """Returns the widths and where the knockoffs came from."""
        noise = f"Gaussian noise with the mean and covariance of {len(self._images)} training images"
        name = cast(ScopConfig, self.config).knockoffs
        given = f"{len(self._images)} images {'given' if name == NOISE else f'of {name}'}"
        return super().report() | {"knockoffs": noise if self.counterfeits is None else given}

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the group of beta."""
        rate = cast(ScopConfig, self.config).factor_lr
        return [] if self.beta is None else [{"params": [self.beta], "lr": rate, "weight_decay": 0.0}]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns Adam of beta."""
        return [torch.optim.Adam(groups, betas=(0.5, 0.9))] if (groups := self.param_groups()) else []

    def weights_to_train(self) -> list[nn.Parameter]:
        """Returns the parameters of the model without beta; they are frozen until `finish`."""
        return [p for p in self.model.parameters() if p is not self.beta]

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken and the state of the generator."""
        return super().state_dict() | {"generator": self.evidence.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.evidence.generator.set_state(state["generator"])

    # ---------------------------------------------------------------------------------------------------- the doubled pass
    def fakes(self, count: int) -> Tensor:
        """Returns counterfeit inputs, (count, ...)."""
        generator = self.evidence.generator
        if self.counterfeits is not None:
            return self._images[torch.randint(len(self._images), (count,), generator=generator)]
        mean = self._images.mean(0, keepdim=True)
        weights = torch.randn(count, len(self._images), generator=generator).to(self._images)  # a Gaussian of their covariance
        flat = weights @ (self._images - mean).flatten(1) / len(self._images) ** 0.5
        found: Tensor = mean + flat.view(count, *self._images.shape[1:])
        return found

    def _doubled(self, module: nn.Module, args: Any) -> Any:
        self._real = len(args[0]) if torch.is_grad_enabled() and module.training else 0
        return (torch.cat([args[0], self.fakes(self._real).to(args[0])]), *args[1:]) if self._real else args

    def _halved(self, module: nn.Module, args: Any, output: Any) -> Any:
        return map_tensors(lambda tensor: tensor[: self._real], output) if self._real else output

    def _mixed(self, name: str, dim: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not self._real:
            return output
        shape = [1] * output.ndim
        shape[dim] = -1
        beta = dict(self.parts())[name].to(output.dtype).view(shape)
        real, fake = output[: self._real], output[self._real :]
        return torch.cat([beta * real + (1 - beta) * fake, fake])


def images_of(task: Task, config: ScopConfig) -> Tensor | None:
    """Returns the counterfeit images that a config names, normalized as the task's own; None for noise."""
    if config.knockoffs == NOISE:
        return None
    data = load_data(config.knockoffs, image_size=task.example.shape[-1], validation=0.0)
    own = getattr(task.data, "images", data)
    found = ImageSource(replace(data, normalization=own.normalization))
    count = config.score_batches * config.score_batch_size
    images = next(iter(found.batches("train", count, shuffle=True).epoch(0)))[0]
    if images.shape[1:] != task.example.shape[1:]:
        shapes = tuple(images.shape[1:]), tuple(task.example.shape[1:])
        raise ScoreError(f"Knockoffs of {config.knockoffs!r} have the shape {shapes[0]}; the model reads {shapes[1]}.")
    return images


def check(task: Task, config: ScopConfig) -> None:
    """Raises unless method and budget fit the task's model, and the knockoffs its inputs."""
    fits(Scop)(task, config)
    images_of(task, config)


@method(
    "scop", ScopConfig, check=check, paper="Tang et al. 2020, arXiv 2010.10732", purpose="channels against a control of noise"
)
def scop(task: Task, run: Run, config: ScopConfig) -> nn.Module:
    """SCOP: channels of a frozen network are weighed against knockoffs; those that serve no better go, fine-tune."""
    images = images_of(task, config)
    return thinned(task, run, config, Scop, knockoffs=None if images is None else images.to(run.device))
