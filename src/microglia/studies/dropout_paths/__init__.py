"""Dropout stability, and the paths of low loss that it gives."""
