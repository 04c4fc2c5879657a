"""Processes of a program: children that end with it, its cores, and signals that end it in order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO


class Children:
    """Running processes that can be ended together, such as the cells of a sweep."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, command: Sequence[str], log: TextIO, lock: TextIO, environment: Mapping[str, str]) -> int:
        """Runs a command to its end and returns its status; the child holds ``lock`` while it lives."""
        with self._lock:
            if self.stopped.is_set():
                return -signal.SIGKILL
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C reaches only the sweep, which ends every child with its own children
            )
            self._running.add(child)
        status = child.wait()
        with self._lock:
            self._running.discard(child)
        return status

    def stop(self) -> None:
        """Ends every child immediately: a run is durable at any moment, so a gentle stop has no advantage."""
        self.stopped.set()
        with self._lock:
            for child in self._running:
                if child.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Makes unhandled SIGTERM and SIGHUP end the program like Ctrl-C, through its ``finally`` clauses."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    ours = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
