"""Loads a data set into memory by its name."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from microglia.core.errors import DataError
from microglia.core.registry import unknown_name
from microglia.data.augmentation import Augmentation
from microglia.data.cache import cache_path, fingerprint, read_cache, write_cache
from microglia.data.decode import check_memory, decode, decoder, resized, survey
from microglia.data.digits import digits
from microglia.data.folders import folder_source
from microglia.data.hub import hub_source
from microglia.data.images import ImageData, ImageSet
from microglia.data.normalization import Normalization
from microglia.data.sources import Source
from microglia.data.splits import stratified_split
from microglia.data.tables import parquet_files, parquet_source

_TEST_FRACTION = 0.2
_TEST_SEED = 1
_VALIDATION_SEED = 2

_SLOW = 5.0
"""If decoding takes longer than this, in seconds, the result is kept on disk."""


@dataclass(frozen=True)
class _Known:
    """Known properties of a data set: its name on the hub, its statistics, its usual augmentation."""

    hub: str
    normalization: str
    augmentation: Augmentation | None


_KNOWN = {
    "cifar10": _Known("uoft-cs/cifar10", "cifar10", Augmentation(pad=4, flip=True)),
    "mnist": _Known("ylecun/mnist", "mnist", None),
}


def load_data(name: str, *, image_size: int | None = None, validation: float = 0.1, normalize: str | None = None) -> ImageData:
    """Loads an image classification data set into memory.

    The validation split is the data set's own. If there is none, it is carved from the training images: stratified, and the
    same on every machine and for every seed. A missing test split (20 %) is carved first in the same way. If decoding takes
    more than 5 seconds, the decoded images are kept under ``$XDG_CACHE_HOME/microglia`` (``~/.cache/microglia``), and read from
    there until a file changes. While splits are carved, the training images are in memory twice.

    Args:
        name: One of

            - ``digits``: 1,797 real 8x8 digits, built in;
            - ``cifar10``, ``mnist``, or the name of any folder under ``$MICROGLIA_DATA``;
            - ``hf:NAME``: a data set of the Hugging Face hub, such as ``hf:zalando-datasets/fashion_mnist``;
            - a path to a folder of ``train-*.parquet`` and ``test-*.parquet`` files as the hub has them;
            - a path to a folder of images, ``train/CLASS/IMAGE`` beside ``val`` and ``test``, or ``CLASS/IMAGE``.

            A folder ``$MICROGLIA_DATA/NAME`` comes before the hub.
        image_size: Side to scale and centre-crop all images to, in pixels. By default the images' common size, or a
            square of their median shorter side where they differ.
        validation: Share of the training images to carve, in [0, 1); 0 leaves the validation split empty.
        normalize: Name of a normalization (imagenet, cifar10, mnist, half). By default the data set's published one, or
            the statistics of its training images.

    Returns:
        The data set. Only ``cifar10`` comes with an augmentation (pad 4 and flip): only the user knows whether a mirrored image
        still belongs to its class.

    Raises:
        UnknownNameError: When ``name`` or ``normalize`` is unknown.
        DataError: When the data set is missing, empty, unreadable, has one class, or does not fit in memory.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"The image_size is {image_size}; expected 1 pixel or more.")
    chosen = None if normalize is None else Normalization.named(normalize)
    classes, splits = _content(name, image_size)
    if len(classes) < 2:
        raise DataError(f"The data set {name!r} has one class, {classes[0]!r}; expected two or more to tell apart.")
    if "test" not in splits:
        splits["train"], splits["test"] = _carved(splits["train"], _TEST_FRACTION, _TEST_SEED)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _carved(splits["train"], validation, _VALIDATION_SEED)
    known = _KNOWN.get(name)
    if chosen is None:
        chosen = Normalization.named(known.normalization) if known else Normalization.of(splits["train"].images)
    chosen.check(splits["train"].images.shape[1])
    return ImageData(name, classes, **splits, normalization=chosen, augmentation=known.augmentation if known else None)


def _content(name: str, image_size: int | None) -> tuple[tuple[str, ...], dict[str, ImageSet]]:
    """Returns class names and decoded splits in their original form; train is one of them."""
    if name == "digits":
        splits = digits()
        if image_size is not None:
            check_memory(sum(map(len, splits.values())) * image_size**2)
            splits = {split: ImageSet(resized(s.images, image_size), s.labels) for split, s in splits.items()}
        return tuple("0123456789"), splits
    source = _source(name)
    images = _images(source, image_size, name)
    return source.classes, {split: ImageSet(images[split], source.splits[split].labels) for split in images}


def _source(name: str) -> Source:
    """Returns the data set of a name from the first source that has it."""
    root = os.environ.get("MICROGLIA_DATA")
    bare = name.removeprefix("hf:")
    # "./pets" is an explicit path, and an empty name is not the folder of all data sets.
    local = Path(root) / bare if root and bare and not bare.startswith((".", "~")) else None
    if local is not None and local.is_dir():
        return _folder(local)
    if name.startswith("hf:") or name in _KNOWN:
        hub = _KNOWN[name].hub if name in _KNOWN else bare
        try:
            return hub_source(hub)
        except DataError as error:
            raise DataError(
                f"{error} There is no local copy either: "
                + (f"no folder {local}." if local else "the environment variable MICROGLIA_DATA is not set.")
                + f" Set MICROGLIA_DATA to a folder that holds {bare!r}, or mend the access to the hub."
            ) from error
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _folder(path)
    if path.name != name:
        raise DataError(
            f"There is no folder {path}; expected parquet files or images in class folders there. "
            "A data set of the Hugging Face hub is written hf:NAME."
        )
    entries = [entry for entry in Path(root).iterdir() if entry.is_dir()] if root and Path(root).is_dir() else []
    names = [entry.name for entry in entries if _readable(entry)]
    raise unknown_name("data set", name, {"digits", *_KNOWN, "hf:NAME", *names})


def _readable(root: Path) -> bool:
    """Returns whether a folder holds images of classes, so that its name can be suggested."""
    try:
        _folder(root)
    except DataError:
        return False
    return True


def _folder(root: Path) -> Source:
    files = parquet_files(root)
    return parquet_source(files) if files else folder_source(root)


def _images(source: Source, image_size: int | None, name: str) -> dict[str, Tensor]:
    """Returns the decoded images of each split, from the cache where it has them."""
    path = cache_path(fingerprint(source.files, image_size, decoder())) if source.files else None
    counts = {split: len(encoded) for split, encoded in source.splits.items()}
    if not counts["train"]:
        raise DataError(f"The data set {name!r} has no training images; expected some.")
    if path and path.exists():
        check_memory(path.stat().st_size)
        kept = read_cache(path)
        if kept and {split: len(images) for split, images in kept.items()} == counts:
            return kept
    begun = time.monotonic()
    layout = survey(source.splits["train"], image_size, f"looking at {name}")
    channels, height, width = layout.shape
    check_memory(sum(counts.values()) * channels * height * width)
    images = {split: decode(part, layout, f"decoding {name} {split}") for split, part in source.splits.items()}
    if path and time.monotonic() - begun > _SLOW:
        write_cache(path, images)
    return images


def _carved(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    kept, carved = stratified_split(images.labels, fraction, seed)
    return images.subset(kept), images.subset(carved)
