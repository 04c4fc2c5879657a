"""Sparse layers of the CPU: blocks, rows, and chains of them."""
