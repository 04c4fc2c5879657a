"""Weights & Biases: online where a key is known, else offline in ``wandb/`` of the run directory (``wandb sync`` sends it)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from microglia.track.tracker import Tracker, trackers

PROJECT = "microglia"


@trackers.add("wandb")
class WeightsAndBiases(Tracker):
    """Writes the recipe and metrics as one run of the project `PROJECT`, or of ``WANDB_PROJECT``."""

    name: ClassVar[str] = "wandb"
    modules: ClassVar[tuple[str, ...]] = ("wandb",)

    def open(self) -> None:  # noqa: D102
        import wandb

        known = self.place.known().get(self.name)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.place.name,
            id=known,
            resume="allow",
            mode=mode,
            dir=self.place.directory,
            config=self.place.flat,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="epoch")
        if known is None:
            self.place.remember(self.name, self._run.id)

    def write(self, values: Mapping[str, float], epoch: int | None) -> None:  # noqa: D102
        if epoch is None:
            self._run.summary.update(dict(values))
        else:
            self._run.log({**values, "epoch": epoch})

    def end(self) -> None:  # noqa: D102
        self._run.finish(exit_code=0 if self.finished else 1)
