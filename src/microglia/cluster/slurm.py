"""Slurm, through submitit: each cell is a job; a job that is killed and started again goes on where it was."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

from microglia.cluster.launcher import ClusterError, launchers, order_of, outcome_of, work
from microglia.core.optional import needs
from microglia.lab.sweep import Cell, CellOutcome

LOGS = ".slurm"
"""Directory, in that of the sweep, of submitit's files."""


@launchers.add("slurm")
class SlurmLauncher:
    """Runs cells as jobs of Slurm.

    Args:
        cpus: Cores, and CPU threads, of each cell.
        minutes: Longest time of a job.
        cluster: ``slurm``, or ``local`` for processes of this machine through the same library.
        parameters: Further parameters of submitit, such as ``slurm_partition="gpu"``.

    Raises:
        ClusterError: There is no Slurm here, or it does not take a parameter.
        MissingLibraryError: submitit is not installed.
    """

    def __init__(self, cpus: int = 1, minutes: int = 24 * 60, cluster: str = "slurm", **parameters: Any) -> None:
        needs("cluster", "submitit", what="The launcher slurm")
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ClusterError("There is no Slurm on this machine (`sbatch` is missing): start the sweep on a login node.")
        self.cpus, self._stopped = cpus, threading.Event()
        self._cluster, self._parameters = cluster, {"cpus_per_task": cpus, "timeout_min": minutes, **parameters}

    def run(self, cell: Cell, directory: Path, *, starts: Path | None = None) -> CellOutcome:
        """Runs a cell as a job to its end."""
        import submitit

        began = time.monotonic()
        try:
            executor = submitit.AutoExecutor(folder=directory.parent.resolve() / LOGS, cluster=self._cluster)
            executor.update_parameters(name=f"microglia-{cell.name}"[:60], **self._parameters)
            job = executor.submit(work, order_of(cell, directory, starts, self.cpus))
            while not job.done():
                if self._stopped.wait(0.5):
                    job.cancel()
                    return CellOutcome(cell.name, "failed", round(time.monotonic() - began, 2), "stopped")
            return outcome_of(job.result())
        except Exception as error:  # the queue refused the job, or the job was killed for good
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return CellOutcome(cell.name, "failed", round(time.monotonic() - began, 2), lines[-1][:400])

    def stop(self) -> None:
        """Cancels every job."""
        self._stopped.set()

    def close(self) -> None:
        """Does nothing: the jobs are over."""
