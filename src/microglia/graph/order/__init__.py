"""Permutations of channels that keep a model's outputs."""
