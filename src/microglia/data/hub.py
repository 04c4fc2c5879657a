"""Data sets of the Hugging Face hub. The only file that imports ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    found = _loaded(name)
    splits = split_names(found, f"The data set {name}")
    tables = {}
    for split, key in splits.items():
        table = found[key].with_format("arrow")[:]
        tables[split] = Table(table.schema, table.column, f"{name} ({key})")
    files = tuple(Path(entry["filename"]) for key in splits.values() for entry in found[key].cache_files)
    return table_source(tables, files)


def hub_text(name: str) -> str:
    """Returns the text of a data set of the hub, or of a local folder that ``datasets`` reads; an empty line between two rows.

    Args:
        name: ``NAME``, ``NAME,CONFIGURATION`` or ``NAME,CONFIGURATION,SPLIT``, such as
            ``Salesforce/wikitext,wikitext-2-raw-v1,test``. The split is ``train`` where left out.

    Raises:
        DataError: The hub has no such data set, or it has no such split or no column ``text``.
    """
    plain, configuration, split = (*name.split(","), "", "")[:3]
    found = _loaded(plain, *([configuration] if configuration else []))
    split = split or "train"
    if split not in found:
        raise DataError(f"The data set {plain!r} has the splits {', '.join(found)}, and not {split!r}.")
    if "text" not in found[split].column_names:
        raise DataError(f"The data set {plain!r} has the columns {', '.join(found[split].column_names)}, and none named text.")
    return "\n\n".join(found[split]["text"])


def _loaded(name: str, *more: str) -> Any:
    needs("data", "datasets", what=f"The data set {name!r} of the Hugging Face hub")
    import datasets

    try:
        return datasets.load_dataset(name, *more)
    # For every error in another library's network code the advice is the same.
    except Exception as error:
        raise DataError(
            f"The Hugging Face hub could not give the data set {name!r} ({type(error).__name__}: {error})."
        ) from error
