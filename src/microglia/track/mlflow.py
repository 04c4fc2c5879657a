"""MLflow: to the store of ``MLFLOW_TRACKING_URI``, or to a database beside the run directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from microglia.track.tracker import Tracker, trackers

EXPERIMENT = "microglia"
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow alone would try an unreachable server for minutes."""
LONGEST = 500
"""Characters of a parameter that every store takes."""


@trackers.add("mlflow")
class MLflow(Tracker):
    """Writes parameters and metrics as one run of the experiment `EXPERIMENT`, or of ``MLFLOW_EXPERIMENT_NAME``."""

    name: ClassVar[str] = "mlflow"
    modules: ClassVar[tuple[str, ...]] = ("mlflow",)

    def open(self) -> None:  # noqa: D102
        for key, value in PATIENCE.items():
            os.environ.setdefault(key, value)
        from mlflow.tracking import MlflowClient

        store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.place.directory.resolve().parent / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=store)
        self._run: str = self._found() or self._new()

    def _found(self) -> str | None:
        """Returns the run of an earlier process in this store, which goes on."""
        known = self.place.known().get(self.name)
        if known is None:
            return None
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(known, status="RUNNING")
        except MlflowException:  # another store
            return None
        return known

    def _new(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        run: str = self._client.create_run(number, run_name=self.place.name).info.run_id
        for key, value in self.place.flat.items():
            self._client.log_param(run, key, str(value)[:LONGEST])
        self.place.remember(self.name, run)
        return run

    def write(self, values: Mapping[str, float], epoch: int | None) -> None:  # noqa: D102
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=epoch or 0)

    def on_result(self, result: Mapping[str, Any]) -> None:  # noqa: D102
        super().on_result(result)
        self._safely(lambda: self._client.set_terminated(self._run, "FINISHED"))

    def end(self) -> None:  # noqa: D102
        if self._client.get_run(self._run).info.status == "RUNNING":
            self._client.set_terminated(self._run, "KILLED")
