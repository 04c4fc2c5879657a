"""Cutting: from kept units to a smaller, verified model."""
