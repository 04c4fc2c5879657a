"""The space of weights: points, curves and planes in it, and what the loss is there."""
