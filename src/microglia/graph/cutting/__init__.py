"""Cutting: kept units to a smaller model that is verified equal."""
