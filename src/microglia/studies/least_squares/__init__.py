"""Double descent of least squares, simulated beside its closed form."""
