"""Sections of a report: a family's tables and figures each."""
