"""Work on many small items in threads, with a progress bar if it takes long."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")

_CHUNK = 128
"""Items per task: enough to make the overhead of a task negligible, few enough for the bar to move."""

_PATIENCE = 1.0
"""Seconds before a progress bar appears."""


def map_chunks(work: Callable[[range], T], count: int, label: str) -> list[T]:
    """Returns ``work(chunk)`` for consecutive chunks of ``range(count)``, in order.

    Args:
        work: Called from several threads at once.
        count: Number of items.
        label: Text of the progress bar, which is shown only on a terminal, on standard error.

    Raises:
        Exception: The first error that ``work`` raised; chunks that have not begun are skipped.
    """
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task(label, total=count)
    begun = time.monotonic()
    results = []
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        try:
            for chunk, result in zip(chunks, executor.map(work, chunks), strict=True):
                results.append(result)
                progress.advance(task, len(chunk))
                if time.monotonic() - begun > _PATIENCE:
                    progress.start()
        finally:
            progress.stop()
    return results
