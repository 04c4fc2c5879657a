"""The order of channels: permutations that keep a model's outputs."""
