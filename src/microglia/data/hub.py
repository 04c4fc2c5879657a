"""Data sets of the Hugging Face hub. The only file that imports ``datasets``."""

from __future__ import annotations

from pathlib import Path

from microglia.core.errors import DataError
from microglia.core.optional import needs
from microglia.data.sources import Source, split_names
from microglia.data.tables import Table, table_source


def hub_source(name: str) -> Source:
    """Returns an image classification data set of the hub, downloaded to Hugging Face's own cache at the first call.

    Args:
        name: Name on the hub, such as ``uoft-cs/cifar10``.

    Raises:
        DataError: When the hub has no such data set or cannot be reached, or it is not for image classification.
    """
    needs("data", "datasets", what=f"The data set {name!r} of the Hugging Face hub")
    import datasets

    try:
        found = datasets.load_dataset(name)
    # For every error in another library's network code the advice is the same.
    except Exception as error:
        raise DataError(
            f"The Hugging Face hub could not give the data set {name!r} ({type(error).__name__}: {error})."
        ) from error
    splits = split_names(found, f"The data set {name}")
    tables = {}
    for split, key in splits.items():
        table = found[key].with_format("arrow")[:]
        tables[split] = Table(table.schema, table.column, f"{name} ({key})")
    files = tuple(Path(entry["filename"]) for key in splits.values() for entry in found[key].cache_files)
    return table_source(tables, files)
