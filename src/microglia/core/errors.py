"""Errors for the reader: what was given, what was expected, what to do."""

from __future__ import annotations


class MicrogliaError(Exception):
    """Base of every error this library raises on purpose; its text is one clear sentence for the user."""


class UnknownNameError(MicrogliaError):
    """A name (method, model, data set, score, pattern ...) that is not registered."""


class PatternError(MicrogliaError):
    """A pattern that cannot be read or fits no layer."""


class SelectorError(MicrogliaError):
    """A layer selector that matches nothing."""


class BudgetError(MicrogliaError):
    """A budget that is out of range or cannot be met; the text names the binding constraint."""


class ScoreError(MicrogliaError):
    """A score that is not finite, or that changed the model it looked at."""


class DataError(MicrogliaError):
    """A data set that is missing, empty or not readable."""


class CheckpointError(MicrogliaError):
    """A checkpoint that does not fit the model."""


class FileError(MicrogliaError):
    """A saved file that is damaged, truncated, foreign, newer than this library, or that could not be written."""


class RunError(MicrogliaError):
    """A run directory that cannot be used as asked."""


class MissingLibraryError(MicrogliaError):
    """An optional library that is not installed; the text names the command that installs it."""


class TrainingError(MicrogliaError):
    """A training that cannot go on, such as one whose loss is not finite."""


class ExportError(MicrogliaError):
    """A model that cannot be exported as asked, or a file whose outputs are not the model's."""
