"""The runtime: sparse weights that are fast on this machine, and never slower than dense ones."""

from microglia.runtime.accelerate import accelerate
from microglia.runtime.accelerated import Accelerated
from microglia.runtime.operators import level
from microglia.runtime.report import AccelerationReport, LayerChoice
from microglia.runtime.sparse_layers.chain import BlockChain, Link
from microglia.runtime.sparse_layers.layers import BlockConv2d, BlockLinear, RowConv2d

__all__ = [
    "Accelerated",
    "AccelerationReport",
    "BlockChain",
    "BlockConv2d",
    "BlockLinear",
    "LayerChoice",
    "Link",
    "RowConv2d",
    "accelerate",
    "level",
]
