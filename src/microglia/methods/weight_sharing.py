"""Weight sharing (Han et al. 2016, Deep Compression, section 3): the kept weights of a layer share a few trained values.

The algorithm (spec: 4.1). Per layer with weights W, mask M and a codebook of k = 2^bits entries, entry 0 being zero:
    centroids   C = k-means of the kept weights; C_0 = 0
    codes       I = index of the nearest centroid, fixed from now on; 0 where M is false
    training    W = C[I];  dL/dC_k = sum of dL/dW over the weights with I = k;  C_0 is not trained
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from microglia.compress.codebook import Initial, check_bits
from microglia.compress.grouped import LARGEST
from microglia.compress.sharing import attach_shared, settle_shared, shared_on, shared_values
from microglia.core.errors import MicrogliaError
from microglia.core.left_out import chosen_layers
from microglia.core.masks import MaskSet, masks_of
from microglia.core.registry import unknown_name
from microglia.methods.arguments import check_model, check_unwrapped, plain_settings
from microglia.methods.pruner import own_optimizer
from microglia.scores import Evidence

Bits = Annotated[int, Field(ge=1, le=8)]
BITS = {"type:Conv?d": 8, "*": 5}
"""Bits of the paper: 8 for convolutions, 5 for linear layers."""
OPTIMIZERS = Literal["sgd", "adam", "adamw"]


@dataclass(frozen=True)
class SharingConfig:
    """Weight sharing.

    Attributes:
        bits: Bits of a code, 1 to 8, for all layers or by selector; the first selector that matches a layer counts. None is 8
            for convolutions and 5 for other layers.
        initial: Initial centroids of k-means: ``linear``, ``density`` or ``random``.
        exact: Whether to find the best centroids by dynamic programming instead.
        codebook_groups: Codebooks of each layer, one for each group of output channels (rows of the weight). A layer whose rows
            are no multiple of it has as many as their greatest common divisor.
        centroid_optimizer: Optimizer of the centroids: ``sgd``, ``adam`` or ``adamw``. A centroid's gradient is a sum over
            many weights, whose size adam evens out.
        centroid_lr: Constant learning rate of the centroids.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    bits: Bits | dict[str, Bits] | None = None
    initial: Initial = "linear"
    exact: bool = False
    centroid_optimizer: OPTIMIZERS = "adam"
    centroid_lr: float = 1e-4
    codebook_groups: int = 1

    def check_values(self) -> None:
        """Raises `MicrogliaError` for an unknown choice and for bits or a rate out of range."""
        if self.initial not in get_args(Initial):
            raise unknown_name("choice of initial centroids", self.initial, get_args(Initial))
        if self.centroid_optimizer not in get_args(OPTIMIZERS):
            raise unknown_name("optimizer of the centroids", self.centroid_optimizer, get_args(OPTIMIZERS))
        if not self.centroid_lr >= 0:
            raise MicrogliaError(f"centroid_lr is a learning rate of at least 0; got {self.centroid_lr}.")
        if not 1 <= self.codebook_groups <= LARGEST:
            raise MicrogliaError(f"codebook_groups is a number of groups from 1 to {LARGEST}; got {self.codebook_groups}.")
        for number in self.numbers.values():
            check_bits(number)

    @property
    def numbers(self) -> dict[str, int]:
        """The bits by selector."""
        if self.bits is None:
            return BITS
        return dict(self.bits) if isinstance(self.bits, Mapping) else {"*": self.bits}


@dataclass(frozen=True)
class WeightSharingConfig(SharingConfig):
    """Weight sharing in a loop of one's own.

    Attributes:
        layers: Selectors of the layers.
        exclude: Selectors of layers to leave out.
    """

    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.check_values()


class WeightSharing:
    """Shares the weights of a pruned model and trains the shared values, in any training loop.

    The weights are shared at once, at construction. `finish` writes the trained values into plain weights, and masks stay. Then
    `microglia.pack` stores each weight as a code. Biases and norms remain parameters of the loop's own optimizer.

    Args:
        model: The model, in place; masked weights stay zero.
        config: See `SharingConfig`.
        total_steps: Taken as by every pruner, and not needed.
        example_inputs: Taken as by every pruner, and not needed.
        evidence: Taken as by every pruner; its generator gives the seed of ``initial="random"``.
        **settings: The fields of the config by keyword instead, such as ``bits=4``; also ``layers`` and ``exclude``.

    Raises:
        MicrogliaError: The config does not fit the model; the text explains it.

    Example:
        >>> model = nn.Linear(20, 10)
        >>> _ = WeightSharing(model, bits=2).finish()
        >>> model.weight.unique().numel()
        3
    """

    def __init__(
        self,
        model: nn.Module,
        config: SharingConfig | None = None,
        *,
        total_steps: int | None = None,
        example_inputs: Any = None,
        evidence: Evidence | None = None,
        **settings: Any,
    ) -> None:
        user = type(self).__name__
        check_model(model, user)
        check_unwrapped(model, user)
        if config is not None and settings:
            raise MicrogliaError(f"{user} takes a config or keywords, not both; got a config and {', '.join(settings)}.")
        if config is None:
            config = WeightSharingConfig(**plain_settings(WeightSharingConfig, settings, user))
        self.model, self.config = model, config
        layers = chosen_layers(model, getattr(config, "layers", ("*",)), getattr(config, "exclude", ()))
        if shared := [name for name, layer in layers.items() if shared_on(layer) is not None]:
            raise MicrogliaError(f"The weights of {shared[0]} are shared already: call finish() of the first {user}.")
        seed = evidence.generator.initial_seed() if evidence is not None else 0
        how: dict[str, Any] = {"initial": config.initial, "exact": config.exact, "groups": config.codebook_groups}
        found = shared_values(layers, config.numbers, seed=seed, **how)
        if not found:
            raise MicrogliaError(f"No layer shares its weights: bits={config.numbers} chooses none of {', '.join(layers)}.")
        self.layers = {name: layers[name] for name in found}
        self._shared = {name: attach_shared(layers[name], codes, table) for name, (codes, table) in found.items()}
        self._trainable = {name: layer.raw.requires_grad for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.raw.requires_grad_(False)  # no gradient reaches it, and no optimizer shall decay it
        self.finished = False

    @property
    def codebooks(self) -> dict[str, Tensor]:
        """The present codebook of each layer by name, its zero included: (k,), or (groups, k) of several groups of rows."""
        return {name: shared.table.detach() for name, shared in self._shared.items()}

    def penalty(self) -> Tensor | float:
        """Returns 0: there is no further term of the loss."""
        return 0.0

    def replaces_step(self) -> bool:
        """Returns False: the optimizers take every step."""
        return False

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Acts after each optimizer step; codes are fixed, so that nothing is done."""

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Writes the shared values into plain weights; returns the masks, which stay attached."""
        if not self.finished:
            for name, layer in self.layers.items():
                settle_shared(layer)
                layer.raw.requires_grad_(self._trainable[name])
            self.finished = True
        return masks_of(self.model)

    def report(self) -> dict[str, Any]:
        """Returns the codebooks by layer, JSON-ready."""
        return {"codebooks": {name: table.tolist() for name, table in self.codebooks.items()}}

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns a plain group of the centroids: parameters, ``lr``, ``weight_decay``."""
        if self.finished:
            return []
        centroids = [shared.centroids for shared in self._shared.values()]
        return [{"params": centroids, "lr": self.config.centroid_lr, "weight_decay": 0.0}]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns a new optimizer of the centroids, with the config's kind and rate."""
        return [] if self.finished else [own_optimizer(self.config.centroid_optimizer, self.param_groups())]

    def weights_to_train(self) -> list[nn.Parameter]:
        """Returns the other parameters of the model: biases, norms, and layers whose weights are not shared."""
        own = {id(shared.centroids) for shared in self._shared.values()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: codes and centroids are in the model's state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state."""
