"""Slurm, through submitit: each cell is a job. A job that reaches its time limit is submitted again, and goes on there."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microglia.cluster.launcher import AT_ONCE, ClusterError, check_amount, launchers, order_of, outcome_of, work
from microglia.core.optional import needs
from microglia.lab.sweep import Cell, CellOutcome

LOGS = ".slurm"
"""Directory, in that of the sweep, of submitit's files."""


class Work:
    """`work` as submitit calls it; a job that is ended by its time limit or for another one is submitted again."""

    def __call__(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a cell; see `work`."""
        return work(order)

    def checkpoint(self, order: Mapping[str, Any]) -> Any:
        """Returns the same work to submit again; the cell's directory holds how far it is."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, order)


@launchers.add("slurm")
class SlurmLauncher:
    """Runs cells as jobs of Slurm.

    Args:
        cpus: Cores, and CPU threads, of each cell.
        minutes: Longest time of a job; a cell that needs more goes on in further jobs (submitit submits it three more times).
        cluster: ``slurm``, or ``local`` for processes of this machine through the same library.
        parameters: Further parameters of submitit, such as ``slurm_partition="gpu"``.

    Raises:
        ClusterError: There is no Slurm here, or it does not take a parameter.
        MissingLibraryError: submitit is not installed.
    """

    jobs = AT_ONCE

    def __init__(self, cpus: int = 1, minutes: int = 24 * 60, cluster: str = "slurm", **parameters: Any) -> None:
        needs("cluster", "submitit", what="The launcher slurm")
        check_amount("cpus", cpus, whole=True)
        check_amount("minutes", minutes, whole=True)
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise ClusterError("There is no Slurm on this machine (`sbatch` is missing): start the sweep on a login node.")
        self.cpus, self._stopped = cpus, threading.Event()
        self._cluster, self._parameters = cluster, {"cpus_per_task": cpus, "timeout_min": minutes, **parameters}
        try:
            self._executor(Path(LOGS), "check")
        except (NameError, ValueError, AssertionError) as error:
            raise ClusterError(f"submitit does not take these settings: {str(error).splitlines()[0]}") from error

    def run(self, cell: Cell, directory: Path, *, starts: Path | None = None) -> CellOutcome:
        """Runs a cell as a job to its end."""
        began = time.monotonic()
        try:
            executor = self._executor(directory.parent.resolve() / LOGS, f"microglia-{cell.name}"[:60])
            # A job has the environment of the login node; submitit keeps the order as a file, which holds no token.
            job = executor.submit(Work(), order_of(cell, directory, starts, self.cpus, secrets=False))
            while not job.done():
                if self._stopped.wait(0.5):
                    job.cancel()
                    return CellOutcome(cell.name, "failed", round(time.monotonic() - began, 2), "stopped")
            return outcome_of(job.result())
        except Exception as error:  # the queue refused the job, or the job was killed for good
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return CellOutcome(cell.name, "failed", round(time.monotonic() - began, 2), lines[-1][:400])

    def _executor(self, folder: Path, name: str) -> Any:
        """Returns submitit's executor with the parameters of the jobs; nothing is written."""
        import submitit

        executor = submitit.AutoExecutor(folder=folder, cluster=self._cluster)
        executor.update_parameters(name=name, **self._parameters)
        return executor

    def stop(self) -> None:
        """Cancels every job."""
        self._stopped.set()

    def close(self) -> None:
        """Does nothing: the jobs are over."""
