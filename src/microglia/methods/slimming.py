"""Network Slimming (Liu et al. 2017): L1 on the scales of the norms, then the channels of the smallest scales go.

The algorithm (spec: survey 8.2):
    minimize L + lambda sum |gamma| over the scales of all channels; the sub-gradient is lambda sign(gamma), 0 at 0
    keep the channels of the largest |gamma| over the whole network, to the budget; remove the others; fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.config import method
from microglia.methods.scales import ScaleConfig, ScalePruner
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class SlimmingConfig(ScaleConfig):
    """Network Slimming; the paper's ``strength`` is 1e-4 for VGG, and 1e-5 for ResNet-164 and DenseNet-40.

    Weight decay acts on the scales too; ``train.no_decay=[norm]`` leaves it out.
    """


class Slimming(ScalePruner):
    """Drives scales to zero by an L1 penalty, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = SlimmingConfig

    def penalty(self) -> Tensor | float:
        """Returns lambda times the sum of |gamma|."""
        if self.kept is not None:
            return 0.0
        return cast(SlimmingConfig, self.config).strength * torch.stack([scale.abs().sum() for scale in self.scales]).sum()


@method(
    "slimming",
    SlimmingConfig,
    check=fits(Slimming),
    paper="Liu et al. 2017, arXiv 1708.06519",
    purpose="networks with batch norms, simple and strong",
)
def slimming(task: Task, run: Run, config: SlimmingConfig) -> nn.Module:
    """Network Slimming: L1 on the scales of norms, then the smallest scales' channels go, fine-tune."""
    return thinned(task, run, config, Slimming)
