"""Shrinking: coupled channels found through torch.export, removed physically, verified equal."""

from microglia.graph.permute import Permutation, permutation_of, permute_channels
from microglia.graph.plan import Plan, plan_of, replay
from microglia.graph.prune import prune_channels
from microglia.graph.settle import shrink
from microglia.graph.verify import ShrinkError

__all__ = [
    "Permutation",
    "Plan",
    "ShrinkError",
    "permutation_of",
    "permute_channels",
    "plan_of",
    "prune_channels",
    "replay",
    "shrink",
]
