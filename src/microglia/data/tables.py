"""Hugging Face tables of images: local parquet files or tables of the hub. The only file that imports pyarrow."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.core.optional import needs
from microglia.data.sources import Encoded, Source, split_names

_LABELS = ("label", "labels", "fine_label", "class", "target")
"""Names of label columns, in order of preference."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table by their content.

    Attributes:
        image: Name of the image column.
        label: Name of the label column.
        classes: Class names, or None when the labels are plain integers.
    """

    image: str
    label: str
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class Table:
    """One split.

    Attributes:
        schema: A ``pyarrow.Schema``.
        read: Returns the named column, a ``pyarrow.ChunkedArray``.
        where: Name of the table in errors.
    """

    schema: Any
    read: Callable[[str], Any]
    where: str


def parquet_files(root: Path) -> dict[str, list[Path]]:
    """Returns the parquet files of each split, in order, from ``root`` or else from ``root/data``.

    The part of a file's name before the first ``-`` is the split: ``train.parquet``, ``test-00000-of-00001.parquet``.
    """
    paths = sorted(root.glob("*.parquet")) or sorted(root.glob("data/*.parquet"))
    stems = {path: path.stem.split("-")[0] for path in paths}
    names = split_names(set(stems.values()), f"The folder {root}")
    return {split: [path for path in paths if stems[path] == name] for split, name in names.items()}


def parquet_source(files: dict[str, list[Path]]) -> Source:
    """Returns the data set in these parquet files, one or more for each split.

    Raises:
        DataError: When there is no train split, a file is damaged, or there is no image column or no label column.
    """
    tables = {split: _parquet_table(paths) for split, paths in files.items()}
    return table_source(tables, tuple(path for paths in files.values() for path in paths))


def table_source(tables: dict[str, Table], files: tuple[Path, ...]) -> Source:
    """Returns the data set in these tables.

    A test or validation split whose labels are all negative counts as absent: the hub hides labels in this way.

    Args:
        tables: Tables by split: train, validation, test.
        files: The files that hold the images.

    Raises:
        DataError: When there is no train split, no image column or no label column, or a label that is not a class.
    """
    if "train" not in tables:
        raise DataError(f"There is no train split beside {', '.join(tables) or 'nothing'}; expected train-*.parquet.")
    columns = find_columns(tables["train"].schema, tables["train"].where)
    labels = {split: _labels(table, columns.label) for split, table in tables.items()}
    labels = {split: found for split, found in labels.items() if split == "train" or not (found < 0).all()}
    values = torch.unique(labels["train"]) if columns.classes is None else torch.arange(len(columns.classes))
    classes = columns.classes or tuple(str(value) for value in values.tolist())
    splits = {
        split: _encoded(tables[split], columns.image, _indices(found, values, tables[split].where))
        for split, found in labels.items()
    }
    return Source(classes, splits, files)


def find_columns(schema: Any, where: str) -> Columns:
    """Returns the image and the label column of a schema, by Hugging Face feature type or by Arrow type.

    Raises:
        DataError: When there is none, or several that could be the label; it lists the columns.
    """
    import pyarrow as pa

    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {field.name: features.get(field.name, {}).get("_type") for field in schema if _plain(features, field.name)}
    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    images = [name for name in kinds if kinds[name] == "Image"] or [f.name for f in schema if _image_struct(f.type)]
    if not images:
        raise DataError(
            f"{where} has no image column among: {listed}; expected one of Hugging Face's type Image, "
            "or a struct of bytes and path."
        )
    labels = [name for name in kinds if kinds[name] == "ClassLabel"] or [
        field.name for field in schema if pa.types.is_integer(field.type)
    ]
    preferred = [name for name in _LABELS if name in labels] or (labels if len(labels) == 1 else [])
    if not preferred:
        raise DataError(
            f"{where} has no column that is clearly the label among: {listed}; "
            "expected a ClassLabel or integers, in a column named label where there are several."
        )
    names = features.get(preferred[0], {}).get("names")
    return Columns(images[0], preferred[0], tuple(names) if names else None)


def _plain(features: dict[str, Any], name: str) -> bool:
    """Returns whether a column's feature is a single value, not a list."""
    return isinstance(features.get(name, {}), dict)


def _image_struct(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind)) and {"bytes", "path"} <= {field.name for field in kind}


def _parquet_table(paths: list[Path]) -> Table:
    """Returns the table in these files, one after the other; a column is read on demand."""
    needs("data", "pyarrow", what="Reading parquet files")
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(name: str) -> Any:
        try:
            return pa.concat_tables([pq.read_table(path, columns=[name]) for path in paths]).column(name)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(paths, error) from error

    try:
        return Table(pq.read_schema(paths[0]), read, str(paths[0]))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(paths, error) from error


def _damaged(paths: list[Path], error: Exception) -> DataError:
    names = ", ".join(str(path) for path in paths)
    return DataError(f"The parquet files {names} cannot be read ({error}); fetch them again.")


def _column(table: Table, name: str) -> Any:
    """Returns a column, a ``pyarrow.ChunkedArray``."""
    if name not in table.schema.names:
        raise DataError(f"{table.where} has no column {name!r}, which the train split has; expected the same columns.")
    return table.read(name)


def _labels(table: Table, name: str) -> Tensor:
    """Returns a column of integers, int64 [N]."""
    column = _column(table, name)
    if column.null_count:
        raise DataError(f"{table.where} has {column.null_count} rows without a {name!r}; expected one in each row.")
    return torch.from_numpy(column.to_numpy().astype(np.int64))


def _indices(labels: Tensor, values: Tensor, where: str) -> Tensor:
    """Returns the position of each label among the ascending values."""
    known = torch.isin(labels, values)
    if not known.all():
        wrong = int(labels[~known][0])
        raise DataError(f"{where} has the label {wrong}; expected one of the {len(values)} classes of the train split.")
    return torch.searchsorted(values, labels)


def _encoded(table: Table, image: str, labels: Tensor) -> Encoded:
    """Returns a split of images in the rows of a table."""

    def open_images() -> Callable[[int], bytes | Path]:
        column = _column(table, image)
        return lambda index: _content(column[index].as_py())

    return Encoded(labels, open_images, lambda index: f"in row {index} of {table.where}")


def _content(value: Any) -> bytes | Path:
    """Returns the image file in one cell: bytes, or {bytes, path}, one of which may be missing."""
    if not isinstance(value, dict):
        value = {"bytes": value}
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    if value.get("path") is None:
        raise ValueError("it has neither bytes nor a path")
    return Path(value["path"])
