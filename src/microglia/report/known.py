"""Results that are known already, by the identity of their recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from microglia.core.errors import MicrogliaError
from microglia.lab.recipe import identity_of, resolve
from microglia.report.read import read_results


def known_identities(paths: Sequence[Path]) -> dict[str, str]:
    """Returns the identities of the recipes of results, each with its place, so that a sweep does not run them again.

    Args:
        paths: Run directories, or files and folders of results; see `microglia.report.read.read_results`.

    Raises:
        FileError: A path has no results.
    """
    found: dict[str, str] = {}
    for record in read_results(paths).records if paths else ():
        try:
            found.setdefault(identity_of(resolve(record.recipe)), record.source)
        except MicrogliaError:  # of a method or a field that this version does not have
            continue
    return found
