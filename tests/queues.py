"""Queues of studies without results, for tests of their recipes."""

from dataclasses import replace
from pathlib import Path

from microglia.studies.evidence.files import Queue
from microglia.studies.evidence.ledger import Ledger
from microglia.studies.evidence.plan import Job, Planner


def jobs_of_first_seed(queue: Queue, nothing: Path) -> list[Job]:
    """Returns all jobs of the first seed, none of them done; the others differ in the seed alone.

    Args:
        queue: The queue.
        nothing: An empty folder.
    """
    first = {name: replace(study, seeds=study.seeds[:1]) for name, study in queue.studies.items()}
    parts = [part for part in queue.parts if part.seeds is None or 0 in part.seeds]
    return Planner(replace(queue, studies=first, parts=parts), Ledger(nothing)).jobs()
