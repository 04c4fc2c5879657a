"""Dimensions: the traced graph, and the algebra of its dimensions."""
