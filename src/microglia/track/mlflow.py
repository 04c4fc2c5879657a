"""MLflow: to the store of ``MLFLOW_TRACKING_URI``, or to a database beside the run directory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from microglia.track.tracker import Tracker, trackers

EXPERIMENT = "microglia"
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow alone would try an unreachable server for minutes."""
LONGEST, MOST = 500, 100
"""Characters of a parameter, and parameters of one request, that every store takes."""


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
        from mlflow.entities import Param

        run: str = self._client.create_run(self._experiment(), run_name=self.place.name).info.run_id
        flat = [Param(named(key), str(value)[:LONGEST]) for key, value in self.place.flat.items()]
        for start in range(0, len(flat), MOST):
            self._client.log_batch(run, params=flat[start : start + MOST])
        self.place.remember(self.name, run)
        return run

    def _experiment(self) -> str:
        """Returns the number of the experiment, which another process may make at the same moment."""
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def write(self, values: Mapping[str, float], epoch: int | None) -> None:  # noqa: D102
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(named(name), value, now, epoch or 0) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self) -> None:  # noqa: D102
        self._client.set_terminated(self._run, "FINISHED" if self.finished else "KILLED")


def named(name: str) -> str:
    """Returns a name that MLflow takes: it refuses the signs of names such as ``mAP@50`` or ``top 5 %``."""
    return re.sub(r"[^\w\-. :/]", "_", name)
