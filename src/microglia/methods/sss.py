"""Sparse Structure Selection (Huang, Wang 2018): factors of structures that accelerated proximal gradient drives to zero.

The algorithm (spec: survey 8.6): every structure, a neuron or all inner channels of a block, has a factor, 1 at the start
    minimize L + c sum |factor| over weights and factors together; the factors by the proximal steps of
        `microglia.methods.proximal`, constant momentum
    remove the structures of factor 0, or those of the smallest factors to a budget; the others take their factors.
The paper needs no fine-tuning after it. One channel of every group stays: a group of factor 0 adds nothing but that channel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.config import method
from microglia.methods.proximal import FactorConfig, FactorPruner
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class SssConfig(FactorConfig):
    """Sparse Structure Selection; ``strength`` is the paper's gamma, which decides how much goes where no budget does."""


class Sss(FactorPruner):
    """Trains factors of structures to zero, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = SssConfig


@method(
    "sss",
    SssConfig,
    check=fits(Sss),
    paper="Huang, Wang 2018, arXiv 1707.01213",
    purpose="channels and blocks without a budget",
)
def sss(task: Task, run: Run, config: SssConfig) -> nn.Module:
    """Sparse Structure Selection: factors of channels or blocks are driven to zero while all trains; those at zero go."""
    return thinned(task, run, config, Sss)
