"""A Ray cluster: each cell is a task of Ray; if its node dies, the cell goes on on another one, to the same bits."""

from __future__ import annotations

import os
import socket
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microglia.cluster.launcher import AT_ONCE, ClusterError, check_amount, launchers, order_of, outcome_of, work
from microglia.core.optional import needs
from microglia.lab.sweep import Cell, CellOutcome

TRIES = 5
"""Times that a cell is given to a node."""
PATIENCE = 5.0
"""Seconds after which a cluster that does not answer counts as not reachable."""


@launchers.add("ray")
class RayLauncher:
    """Runs cells on the nodes of a Ray cluster, which share the directory of the sweep.

    Args:
        address: ``HOST:PORT`` of the head, as ``ray start --head`` prints it; by default ``RAY_ADDRESS``.
        cpus: Cores, and CPU threads, of each cell.
        gpus: GPUs of each cell; a fraction shares one.

    Ray gets the cells at the same time, and keeps them until a node has room; a node that joins later takes part.

    Raises:
        ClusterError: No address is known, nothing answers there, or a number is none.
        MissingLibraryError: Ray is not installed.
    """

    jobs = AT_ONCE

    def __init__(self, address: str | None = None, cpus: int = 1, gpus: float = 0) -> None:
        needs("cluster", "ray", what="The launcher ray")
        check_amount("cpus", cpus, whole=True)
        check_amount("gpus", gpus, whole=False)
        address = address or os.environ.get("RAY_ADDRESS")
        if not address:
            raise ClusterError(
                "Which Ray cluster? Start one by `ray start --head`, then give its address by RAY_ADDRESS or "
                "--launcher-setting address=HOST:PORT."
            )
        _reach(address)
        import ray

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(f"The Ray cluster at {address} cannot be used: {str(error).splitlines()[0]}") from error
        self.cpus, self._ray, self._stopped = cpus, ray, threading.Event()
        self._remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1)(work)
        _warn_of_no_room(ray.nodes(), cpus, gpus)

    def run(self, cell: Cell, directory: Path, *, starts: Path | None = None) -> CellOutcome:
        """Runs a cell to its end; a node that dies is replaced by another."""
        began, problem = time.monotonic(), ""
        for attempt in range(TRIES):
            task = self._remote.remote(order_of(cell, directory, starts, self.cpus))
            try:
                return outcome_of(self._wait(task), again=attempt > 0)
            except self._ray.exceptions.RayError as error:
                problem = str(error).strip().splitlines()[-1]
                if self._stopped.is_set() or isinstance(error, self._ray.exceptions.RayTaskError):
                    break
        return CellOutcome(cell.name, "failed", round(time.monotonic() - began, 2), problem)

    def stop(self) -> None:
        """Ends every cell immediately."""
        self._stopped.set()

    def close(self) -> None:
        """Leaves the cluster."""
        self._ray.shutdown()

    def _wait(self, task: Any) -> Any:
        """Returns what a task tells; a stop ends it."""
        while not self._ray.wait([task], timeout=0.5)[0]:
            if self._stopped.is_set():
                self._ray.cancel(task, force=True)
        return self._ray.get(task)


def _warn_of_no_room(nodes: Sequence[Mapping[str, Any]], cpus: int, gpus: float) -> None:
    """Warns if no node is large enough for a cell: Ray would wait for one in silence."""
    sizes = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
    if not any(size.get("CPU", 0) >= cpus and size.get("GPU", 0) >= gpus for size in sizes):
        here = ", ".join(f"{size.get('CPU', 0):g} and {size.get('GPU', 0):g}" for size in sizes) or "none"
        warnings.warn(
            f"No node of the Ray cluster has {cpus} cores and {gpus:g} GPUs now (there are {here}): the cells wait for one.",
            stacklevel=4,
        )


def _reach(address: str) -> None:
    """Raises unless something listens at an address; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise ClusterError(f"The address of a Ray cluster looks like 10.0.0.1:6379; got {address!r}.")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        why = error.strerror or error
        raise ClusterError(f"No Ray cluster answers at {address} ({why}): is `ray start --head` running?") from error
