"""The landscape of the loss: lines, curves, paths, surfaces and basins, and what they say of pruned networks."""
