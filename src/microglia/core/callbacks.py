"""Callbacks: what follows a run or a training, told of its stages, epochs and result."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

StageState = Literal["began", "resumed", "finished", "found"]
"""``began`` anew; ``resumed`` after some epochs; ``finished`` now; ``found``: finished before, also by another run."""

log_of_stages = logging.getLogger("microglia.stages")
log_of_epochs = logging.getLogger("microglia.epochs")


class Callback:
    """Follows a run or a training; a subclass overrides what it needs, for the methods here do nothing.

    An error that a callback raises ends the training, so a callback can stop it. The trackers of `microglia.track` are
    different: they give a warning and leave the run alone.

    Example:
        >>> class Losses(Callback):
        ...     def __init__(self):
        ...         self.values = []
        ...     def on_epoch(self, stage, row):
        ...         self.values.append(row["loss"])
        >>> losses = Losses()
        >>> losses.on_epoch("train", {"epoch": 1, "loss": 0.5})
        >>> losses.values
        [0.5]
    """

    def on_stage(self, stage: str, state: StageState, epochs: int = 0) -> None:
        """Called when a stage begins, is taken up again, or ends.

        Args:
            stage: Name of the stage, such as ``dense`` or ``train``.
            state: See `StageState`.
            epochs: Finished epochs, for ``resumed``.
        """

    def on_epoch(self, stage: str, row: Mapping[str, Any]) -> None:
        """Called after each epoch.

        Args:
            stage: Name of the stage.
            row: ``epoch`` (from 1), ``loss``, ``lr``, validation metrics, ``seconds``.
        """

    def on_result(self, result: Mapping[str, Any]) -> None:
        """Called once, when the run is finished, with what ``result.json`` holds."""

    def close(self) -> None:
        """Called at the end of a run, also after an error; `microglia.fit` does not, for several of them share callbacks."""


class Callbacks(Callback):
    """Several callbacks as one, called in their order.

    Args:
        callbacks: The callbacks; more can be added to ``all``.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.all = list(callbacks)

    def on_stage(self, stage: str, state: StageState, epochs: int = 0) -> None:  # noqa: D102
        for one in self.all:
            one.on_stage(stage, state, epochs)

    def on_epoch(self, stage: str, row: Mapping[str, Any]) -> None:  # noqa: D102
        for one in self.all:
            one.on_epoch(stage, row)

    def on_result(self, result: Mapping[str, Any]) -> None:  # noqa: D102
        for one in self.all:
            one.on_result(result)

    def close(self) -> None:  # noqa: D102
        with ExitStack() as stack:  # an error of one does not leave the others open
            for one in reversed(self.all):
                stack.callback(one.close)


class Lines(Callback):
    """Writes a line for each stage and epoch to the loggers ``microglia.stages`` and ``microglia.epochs``, at level INFO.

    The command line shows them; a program of one's own calls ``logging.basicConfig(level="INFO")``.
    """

    def on_stage(self, stage: str, state: StageState, epochs: int = 0) -> None:  # noqa: D102
        if state == "resumed":
            log_of_stages.info("%s: resumed after epoch %d", stage, epochs)
        elif state == "found":
            log_of_stages.info("%s: already finished", stage)
        else:
            log_of_stages.debug("%s: %s", stage, state)

    def on_epoch(self, stage: str, row: Mapping[str, Any]) -> None:  # noqa: D102
        values = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers(row).items() if name != "epoch")
        log_of_epochs.info("%s: epoch %s, %s", stage, row.get("epoch", "?"), ", ".join(values))


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the entries that are numbers, not truth values."""
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float) and type(v) is not bool}
