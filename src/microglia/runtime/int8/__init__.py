"""Sparse layers in 8 bits: exact integer kernels, calibration, and a whole model lowered to them."""
