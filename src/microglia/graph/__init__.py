"""Shrinking: coupled channels are found through torch.export, removed physically, and verified."""

from microglia.graph.cutting import change as _registered  # noqa: F401
from microglia.graph.cutting.plan import Plan, plan_of, replay
from microglia.graph.cutting.verify import ShrinkError
from microglia.graph.depth import Depth, depth_of, keep_blocks
from microglia.graph.experts import Experts, experts_of, keep_experts
from microglia.graph.order.permute import Permutation, permutation_of, permute_channels
from microglia.graph.prune import prune_channels
from microglia.graph.selection import select_channels
from microglia.graph.shrink import shrink

__all__ = [
    "Depth",
    "Experts",
    "Permutation",
    "Plan",
    "ShrinkError",
    "depth_of",
    "experts_of",
    "keep_blocks",
    "keep_experts",
    "permutation_of",
    "permute_channels",
    "plan_of",
    "prune_channels",
    "replay",
    "select_channels",
    "shrink",
]
