"""Lottery tickets and their controls."""
