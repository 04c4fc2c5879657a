"""Least-squares reconstruction of the layers that read fewer channels (He et al. 2017; AMC's code).

For a layer with weight W (out, columns), second moments H = E[x x^T] of what it read in the dense network, A the columns of
the channels that stay: the weights that minimize E|W x - W_A x_A|^2 are W_A = W H[:, A] H[A, A]^-1. Moments are taken once,
so that a candidate costs one solution for each layer and no pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.core.modes import evaluating
from microglia.graph.channels.coupled import CoupledChannels
from microglia.methods.layer_inputs import Reading
from microglia.scores import Evidence
from microglia.scores.reading import outputs_of
from microglia.scores.second_moments import matrix_of, weight_of

Reconstructed = Literal["none", "1x1", "all"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DAMPENING = 1e-6
"""Fraction of the mean of H's diagonal that is added to it."""


class LeastSquares:
    """The layers that read channels, and the second moments of what they read.

    Args:
        model: The dense model; it stays unchanged.
        units: Its channels.
        layers: Its prunable layers by name.
        evidence: Batches.
        which: ``1x1``: linear layers and convolutions of one position, as in AMC's code; ``all``: all convolutions too.

    Raises:
        ScoreError: There are no batches.
    """

    def __init__(
        self, model: nn.Module, units: CoupledChannels, layers: Mapping[str, Layer], evidence: Evidence, which: Reconstructed
    ) -> None:
        self.units = units
        self.layers: dict[str, Layer] = {}
        for name in dict.fromkeys(place.name for place in units.read):
            layer = layers.get(name)
            if layer is not None and _plain(layer) and (which == "all" or layer.raw[0, 0].numel() == 1):
                self.layers[name] = layer
        reading, seen = Reading(self.layers, whole=True), False
        handles = reading.attach()
        try:
            with evaluating(model), torch.no_grad():
                for inputs, _ in evidence.batches:
                    reading.begin(None)
                    outputs_of(model, inputs, evidence.forward)
                    seen = True
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise ScoreError(
                "A reconstruction looks at what layers read: give evidence with batches, [(inputs, targets), ...]."
            )
        self.moments = {n: mean for g in reading.groups() for mean in [g.moments.mean()[0]] for n in g.layers}
        self.before = {name: self.layers[name].raw.detach().clone() for name in self.moments}

    def weights(self, kept: Tensor) -> dict[str, Tensor]:
        """Returns the weights of each layer where channels go, boolean ``kept`` (count,); those of the others stay."""
        padded, found = torch.cat([kept.cpu(), torch.ones(1, dtype=torch.bool)]), {}
        for place in self.units.read:
            if place.name not in self.moments or place.dim != 1:
                continue
            old, moments = self.before[place.name], self.moments[place.name]
            matrix = matrix_of(old).to(moments.dtype)
            stay = padded[place.units].repeat(matrix.shape[1] // len(place.units)).to(moments.device)
            if not bool(stay.all()):
                matrix[:, stay] = solved(matrix, moments, stay)
                found[place.name] = weight_of(matrix, tuple(old.shape)).to(old)
        return found

    @contextmanager
    def applied(self, kept: Tensor) -> Iterator[None]:
        """Context in which the model has the weights of some channels that stay."""
        found = self.weights(kept)
        self.write(found)
        try:
            yield
        finally:
            self.write({name: self.before[name] for name in found})

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor]) -> None:
        """Writes weights into the model."""
        for name, weight in weights.items():
            self.layers[name].raw.copy_(weight)


def _plain(layer: Layer) -> bool:
    """Tells whether a layer is linear, or a convolution that reads all channels."""
    module = layer.module
    return isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTIONS) and module.groups == 1)


def solved(weight: Tensor, moments: Tensor, stay: Tensor) -> Tensor:
    """Returns the columns that stay, (out, kept), which minimize E|W x - W_A x_A|^2.

    Args:
        weight: W, (out, columns).
        moments: H = E[x x^T], (columns, columns).
        stay: Columns that stay, boolean (columns,).
    """
    gram = moments[stay][:, stay]
    gram = gram + DAMPENING * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )
    gone = moments[stay][:, ~stay] @ weight[:, ~stay].T  # what the others added, seen through the kept columns
    found: Tensor = weight[:, stay] + torch.linalg.solve(gram, gone).T
    return found
