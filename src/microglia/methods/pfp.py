"""PFP (Liebenwein et al. 2020), provable filter pruning: channels that no output ever rests on go.

The algorithm (spec: corrections A), x_c the part of channel c in a sampled output of a layer that reads it:
    sensitivity s_c = max over samples of x_c+ / sum_k x_k+ and x_c- / sum_k x_k-, x+ and x- the parts by sign
    one epsilon for all groups: m draws with probabilities p = s / sum s, m proportional to (6 + 2 epsilon) / epsilon^2 sum s;
        a group keeps as many channels as draws are expected to hit, sum_c 1 - (1 - p_c)^m
    of each group the channels of the smallest sensitivity go: removing a set T changes no sampled output by more than
        sum_T s_c times the sum of |x_k|
then fine-tune. The paper also draws the filters at random, with weights; this is its deterministic variant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.config import method
from microglia.methods.thinet import Readers, ReadersConfig
from microglia.scores import scores
from microglia.storage.run import Run
from microglia.tasks.task import Task

BISECTIONS = 60


@dataclass(frozen=True)
class PfpConfig(ReadersConfig):
    """PFP; it trains only to recover.

    Attributes:
        scope: ``global``: one epsilon for all groups, as in the paper; ``uniform``: the same fraction of every group.
        positions: Outputs that are sampled for each image and reading layer.
    """

    positions: int = 40


class Pfp(Readers):
    """Removes the channels of the smallest sensitivity, at once, when it is made; see `ChannelPruner`."""

    Config = PfpConfig

    @torch.no_grad()
    def begin(self) -> None:
        """Samples the dense network and chooses the channels.

        Raises:
            ScoreError: There are no batches.
        """
        if not list(self.evidence.batches):
            raise ScoreError("Pfp samples what layers read: give evidence with batches, [(inputs, targets), ...].")
        self.values = torch.cat([order(self._sensitivity(own)) for own in self.spans()])
        self.target = self.choose(self.values)
        self.clear(~self.target, whole=True)

    def _sensitivity(self, own: slice) -> Tensor:
        """Returns the sensitivity of the channels of a group; a norm's share where no layer can be sampled."""
        samples = self.samples(self.readers(own), own)
        if samples:
            return sensitivity(torch.cat(list(samples.values())))
        norms = self.of_filters(scores["l2"](self.model, self.layers, self.evidence))[own].cpu()
        return norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)


def sensitivity(samples: Tensor) -> Tensor:
    """Returns the largest share of each channel in any sampled output, in [0, 1], of (samples, channels)."""
    shares = [part / part.sum(1, keepdim=True).clamp_min(1e-30) for part in (samples.clamp_min(0), (-samples).clamp_min(0))]
    return torch.stack(shares).amax((0, 1))


def order(sensitivities: Tensor) -> Tensor:
    """Returns the order in which the channels of a group come back as epsilon falls, comparable across groups, (channels,).

    A channel of rank k stays from m draws on, of which k - 1/2 distinct channels are expected; its value is ``sum s / m``.

    Args:
        sensitivities: At least 0, (channels,).
    """
    total = sensitivities.sum()
    live = int((sensitivities > 0).sum())
    best = sensitivities.argsort(descending=True, stable=True)[:live]
    misses = torch.log1p(-(sensitivities[best] / total).double())  # logarithm of the probability that a draw misses it
    wanted = torch.arange(live, dtype=torch.float64) + 0.5
    low, high = torch.full_like(wanted, -30.0), torch.full_like(wanted, 60.0)  # of the logarithm of m
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = -torch.expm1(middle.exp()[:, None] * misses).sum(1) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.zeros_like(sensitivities).index_copy_(0, best, (total.double() / high.exp()).to(sensitivities.dtype))


@method(
    "pfp",
    PfpConfig,
    check=fits(Pfp),
    paper="Liebenwein et al. 2020, arXiv 1911.07412",
    purpose="whole channels with an error bound",
)
def pfp(task: Task, run: Run, config: PfpConfig) -> nn.Module:
    """PFP: the channels go whose share in every sampled output of the next layers is small; fine-tune."""
    return thinned(task, run, config, Pfp)
