"""A data set that was found but not yet decoded: the common form of every kind of file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from microglia.core.errors import DataError

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, eq=False)
class Encoded:
    """One split of encoded images.

    Attributes:
        labels: int64 [N], class indices.
        open: Makes the images readable; returns a function from an index to the bytes of an image file or to its path.
            It is separate from the labels, so that images are read only if they must be decoded.
        describe: Names the source of image i, for error messages.
    """

    labels: Tensor
    open: Callable[[], Callable[[int], bytes | Path]]
    describe: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set on disk.

    Attributes:
        classes: Class names.
        splits: Some of train (always), validation and test.
        files: Every file the images come from; their names, sizes and times stand for the content.
    """

    classes: tuple[str, ...]
    splits: dict[str, Encoded]
    files: tuple[Path, ...]


def split_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Returns {train, validation or test: the name that stands for it}, for those of the names that are splits.

    Args:
        names: Names, such as those of folders; some are splits in a common spelling (``val``, ``valid``, ``dev`` ...).
        where: The container of these names, for the error.

    Raises:
        DataError: When two names stand for the same split.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        split = _SPLITS.get(name)
        if split in found:
            raise DataError(f"{where} has both {found[split]!r} and {name!r} as its {split} split; expected one of them.")
        if split:
            found[split] = name
    return found
