"""Image folders: ``root/train/class/image.png`` with or without the split level."""

from __future__ import annotations

from pathlib import Path

import torch

from microglia.core.errors import DataError
from microglia.data.sources import Encoded, Source, split_names

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def folder_source(root: Path) -> Source:
    """Returns the images under a folder, classes and files in alphabetical order.

    Args:
        root: Holds ``train`` and perhaps ``val`` or ``validation`` and ``test``, each with one folder per class; or the class
            folders directly. Names that start with a dot are skipped.

    Raises:
        DataError: When there are no class folders, or a training class has no images. Also when a test or validation split has
            no train split beside it, or a class that the train split lacks.
    """
    splits = split_names((path.name for path in _folders(root)), f"The folder {root}")
    if splits and "train" not in splits:
        raise DataError(f"The folder {root} has {', '.join(splits.values())} but no 'train' folder; expected one.")
    tops = {split: root / name for split, name in splits.items()} or {"train": root}
    classes = tuple(path.name for path in _folders(tops["train"]))
    if not classes:
        raise DataError(
            f"The folder {tops['train']} holds no images in class folders and no parquet files; expected "
            "train/CLASS/IMAGE, CLASS/IMAGE, or train-*.parquet."
        )
    found = {split: _paths(top, classes, split) for split, top in tops.items()}
    files = tuple(path for members in found.values() for paths in members for path in paths)
    return Source(classes, {split: _encoded(members) for split, members in found.items()}, files)


def _paths(top: Path, classes: tuple[str, ...], split: str) -> list[list[Path]]:
    """Returns the image paths of each class in one split."""
    extra = [path.name for path in _folders(top) if path.name not in classes]
    if extra:
        raise DataError(f"The folder {top} has the class {extra[0]!r}, which the train folder lacks; expected the same.")
    found = [_images(top / name) for name in classes]
    for name, paths in zip(classes, found, strict=True):
        if split == "train" and not paths:
            raise DataError(
                f"The class folder {top / name} holds no images ({', '.join(sorted(_SUFFIXES))}); "
                "add some or remove the folder."
            )
    if not any(found):
        raise DataError(f"The folder {top} holds no images; add some or remove the folder.")
    return found


def _encoded(members: list[list[Path]]) -> Encoded:
    """Returns the split that consists of each class's paths."""
    paths = [path for group in members for path in group]
    labels = torch.repeat_interleave(torch.arange(len(members)), torch.tensor([len(group) for group in members]))
    return Encoded(labels, lambda: paths.__getitem__, lambda index: str(paths[index]))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
