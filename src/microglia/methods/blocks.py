"""The blocks of a model have moved to `microglia.graph.blocks`; the names stay here too."""

from microglia.graph.blocks import ROOT, Passage, candidates, check_finite, find_blocks, first_of, passages

__all__ = ["ROOT", "Passage", "candidates", "check_finite", "find_blocks", "first_of", "passages"]
