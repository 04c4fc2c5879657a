"""Sparse layers of the GPU."""
