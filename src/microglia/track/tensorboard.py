"""TensorBoard: the event files lie in ``tensorboard/`` of the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from microglia.track.tracker import Tracker, trackers


@trackers.add("tensorboard")
class TensorBoard(Tracker):
    """Writes scalars and the recipe; ``tensorboard --logdir runs`` shows the runs below a folder."""

    name: ClassVar[str] = "tensorboard"
    modules: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def open(self) -> None:  # noqa: D102
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.place.directory / "tensorboard"))  # type: ignore[no-untyped-call]
        rows = "\n".join(f"| {key} | {value} |" for key, value in self.place.flat.items())
        self._writer.add_text("recipe", f"| setting | value |\n| --- | --- |\n{rows}")  # type: ignore[no-untyped-call]

    def write(self, values: Mapping[str, float], epoch: int | None) -> None:  # noqa: D102
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch or 0)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def end(self) -> None:  # noqa: D102
        self._writer.close()  # type: ignore[no-untyped-call]
