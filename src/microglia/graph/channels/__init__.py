"""Coupled channels: groups, units, and the choice of widths."""
