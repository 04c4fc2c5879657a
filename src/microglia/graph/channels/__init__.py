"""Coupled channels: groups, units, and how wide each is to be."""
