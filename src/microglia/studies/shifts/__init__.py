"""Shifts: accuracy and operations on clean and on changed test images."""
