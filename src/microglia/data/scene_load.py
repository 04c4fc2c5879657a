"""Loads a data set for segmentation by its name, checks every mask, and leaves out or refuses the bad ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.core.optional import needs
from microglia.core.registry import unknown_name
from microglia.data.parallel import map_chunks
from microglia.data.scene_folders import Pair, SceneFolder, scene_folder
from microglia.data.scenes import IGNORED, Scene, SceneData, SceneSet
from microglia.data.splits import stratified_split

Bad = Literal["refuse", "drop"]
"""Treatment of an image with a bad annotation."""
KEPT = 2 * 2**30
"""Decoded scenes are kept in memory up to this many bytes in all; those of a larger data set are read on every access."""
LARGEST = 255
"""Largest number in a mask."""
FRACTIONS = {"test": (0.2, 1), "validation": (0.1, 2)}
"""Missing split -> (the part of the training images that it gets, seed)."""


@dataclass(frozen=True)
class _Known:
    """Known properties of a data set: class names, and the number of a pixel without a class."""

    classes: tuple[str, ...]
    ignore: int


_KNOWN = {
    "camvid": _Known(
        ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"), 11
    )
}


def load_scenes(name: str, *, ignore: int = IGNORED, bad: Bad = "refuse", carve: bool = True) -> SceneData:
    """Loads a data set for segmentation; every mask is checked.

    Args:
        name: ``camvid`` or the name of another folder under ``$MICROGLIA_DATA``, or a path to a folder; see
            `microglia.data.scene_folders.scene_folder` for the layouts.
        ignore: Number of a pixel without a class; CamVid and Cityscapes have their own.
        bad: ``refuse`` the data set if an image has no mask, or a mask has another size, colours or an unknown number;
            or ``drop`` such images with one warning.
        carve: Whether a missing test or validation split is carved from the training images.

    Raises:
        DataError: The data set is missing, empty or unreadable, has a bad annotation, or has one class.
        UnknownNameError: The name is unknown.
    """
    needs("data", "PIL", what="Reading images")
    root = _place(name)
    folder, known = scene_folder(root), _KNOWN.get(name)
    own = known.ignore if known else ignore
    table = _table(folder, known.classes if known else folder.classes, own)
    kept = _bytes(folder) <= KEPT
    splits: dict[str, _Read] = {split: _read(pairs, table, name, kept) for split, pairs in folder.splits.items()}
    left_out = _judge([problem for read in splits.values() for problem in read.problems], sum(map(len, splits.values())), bad)
    numbers = sorted({number for read in splits.values() for number in read.numbers} - {own})
    classes = known.classes if known else folder.classes
    classes = classes or tuple(str(number) for number in range(1 + max(numbers, default=0)))
    if len(classes) < 2:
        raise DataError(f"The masks of {name!r} have one class; expected two or more to tell apart.")
    found: dict[str, Sequence[Scene]] = {split: read.scenes for split, read in splits.items()}
    for split, (fraction, seed) in FRACTIONS.items():
        if split not in found and carve and (split == "test" or folder.numbers is None):
            found["train"], found[split] = _carved(found["train"], fraction, seed)
    if not found["train"] or not found.get("test"):
        raise DataError(f"The data set {name!r} has no {'test' if found['train'] else 'training'} scenes left; expected some.")
    sets = {split: SceneSet(found.get(split, ())) for split in ("train", "validation", "test")}
    return SceneData(name, classes, **sets, left_out=left_out)


def _place(name: str) -> Path:
    """Returns the folder of a data set."""
    root = os.environ.get("MICROGLIA_DATA")
    local = Path(root) / name if root and name and not name.startswith((".", "~")) else None
    if local is not None and local.is_dir():
        return local
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.name != name:
        raise DataError(f"There is no folder {path}; expected images with masks there.")
    if name in _KNOWN:
        where = f"there is no folder {local}" if local else "the environment variable MICROGLIA_DATA is not set"
        raise DataError(f"The data set {name!r} is not here: {where}. Set MICROGLIA_DATA to a folder that holds {name!r}.")
    raise unknown_name("data set with masks", name, {*_KNOWN, "a folder of images and masks"})


def _table(folder: SceneFolder, classes: Sequence[str] | None, ignore: int) -> npt.NDArray[np.int16]:
    """Returns the class of every number of a mask, int16 [256]; -1 for an unknown number."""
    if not 0 <= ignore <= LARGEST:
        raise DataError(f"ignore is the number of a pixel without a class, 0 to {LARGEST}; got {ignore}.")
    table = np.full(LARGEST + 1, -1, dtype=np.int16)
    numbers: Mapping[int, int | None] = folder.numbers or {i: i for i in range(LARGEST if classes is None else len(classes))}
    for number, index in numbers.items():
        table[number] = IGNORED if index is None else index
    table[ignore] = IGNORED
    return table


def _bytes(folder: SceneFolder) -> int:
    """Returns about how many bytes the decoded scenes take, from the size of the first image."""
    from PIL import Image

    first = folder.splits["train"][0][0]
    try:
        with Image.open(first) as image:
            pixels = image.width * image.height
    except Exception as error:  # Pillow raises many types for damaged bytes
        raise DataError(f"The image {first} cannot be read ({error}); replace or remove it.") from error
    return 4 * pixels * sum(map(len, folder.splits.values()))


@dataclass(frozen=True)
class _Read:
    """One split after the check: good scenes, what is wrong with the others, and every number of the masks."""

    scenes: Sequence[Scene]
    problems: list[str]
    numbers: set[int]

    def __len__(self) -> int:
        return len(self.scenes) + len(self.problems)


@dataclass(frozen=True)
class SceneFiles(Sequence[Scene]):
    """Scenes that are read from their files on every access.

    Attributes:
        pairs: Image and mask of each scene.
        table: Class of every number of a mask, int16 [256].
    """

    pairs: Sequence[Pair]
    table: npt.NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Scene:  # type: ignore[override]
        image, mask = self.pairs[index]
        return read_image(image), torch.from_numpy(self.table[read_mask(mask)].astype(np.uint8))


def _read(pairs: Sequence[Pair], table: npt.NDArray[np.int16], name: str, keep: bool) -> _Read:
    def look(chunk: range) -> list[tuple[str | None, set[int], Scene | None]]:
        return [_look(*pairs[index], table, keep=keep) for index in chunk]

    found = [one for chunk in map_chunks(look, len(pairs), f"reading {name}") for one in chunk]
    problems = [problem for problem, _, _ in found if problem]
    good = [pair for pair, (problem, _, _) in zip(pairs, found, strict=True) if not problem]
    scenes: Sequence[Scene] = [scene for _, _, scene in found if scene is not None] if keep else SceneFiles(good, table)
    return _Read(scenes, problems, {number for _, numbers, _ in found for number in numbers})


def _look(image: Path, mask: Path, table: npt.NDArray[np.int16], *, keep: bool) -> tuple[str | None, set[int], Scene | None]:
    """Returns what is wrong with an annotation or None, the numbers of a good mask, and the scene if it is kept."""
    from PIL import Image

    if not mask.is_file():
        return f"the image {image} has no mask {mask}", set(), None
    try:
        numbers = read_mask(mask)
    except DataError as error:
        return f"{str(error)[0].lower()}{str(error)[1:].rstrip('.')}", set(), None
    try:
        with Image.open(image) as opened:
            size = opened.height, opened.width
        pixels = read_image(image) if keep else None
    except Exception as error:  # Pillow raises many types for damaged bytes
        return f"the image {image} cannot be read ({error})", set(), None
    if size != numbers.shape:
        height, width = numbers.shape
        return f"the mask {mask} is {width} x {height} pixels and its image {size[1]} x {size[0]}", set(), None
    present = np.unique(numbers)
    if (unknown := present[table[present] < 0]).size:
        return f"the mask {mask} has the number {unknown[0]}, which is no class", set(), None
    scene = None if pixels is None else (pixels, torch.from_numpy(table[numbers].astype(np.uint8)))
    return None, {int(number) for number in present if table[number] != IGNORED}, scene


def read_image(path: Path) -> Tensor:
    """Returns an image file as uint8 [3, H, W]."""
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_mask(path: Path) -> npt.NDArray[np.uint8]:
    """Returns the numbers of a mask file, uint8 [H, W]; those of a palette are its indices.

    Raises:
        DataError: The file cannot be read, has colours, or has numbers above 255.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, numbers = image.mode, np.asarray(image)
    except Exception as error:  # Pillow raises many types for damaged bytes
        raise DataError(f"The mask {path} cannot be read ({error}).") from error
    if numbers.ndim != 2:
        raise DataError(f"The mask {path} has colours (Pillow's mode {mode!r}); expected one number for each pixel.")
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) <= LARGEST:
        raise DataError(f"The mask {path} has the number {int(numbers.max())}; expected 0 to {LARGEST}.")
    return numbers.astype(np.uint8)


def _judge(problems: Sequence[str], total: int, bad: str) -> int:
    """Returns the number of images to leave out, with a warning; raises if they are refused."""
    if bad not in ("refuse", "drop"):
        raise DataError(f"bad is 'refuse' or 'drop'; got {bad!r}.")
    if not problems:
        return 0
    first = f"{problems[0][0].upper()}{problems[0][1:]}"
    more = f" and {len(problems) - 1} more of {total:,} annotations are bad" if len(problems) > 1 else ""
    if bad == "refuse":
        raise DataError(f"{first}{more}; mend it, or leave such images out with bad=drop.")
    warnings.warn(f"{len(problems)} of {total:,} images are left out; the first one: {problems[0]}.", stacklevel=4)
    return len(problems)


def _carved(scenes: Sequence[Scene], fraction: float, seed: int) -> tuple[Sequence[Scene], Sequence[Scene]]:
    kept, carved = stratified_split(torch.zeros(len(scenes), dtype=torch.int64), fraction, seed)
    return _chosen(scenes, kept.tolist()), _chosen(scenes, carved.tolist())


def _chosen(scenes: Sequence[Scene], indices: Sequence[int]) -> Sequence[Scene]:
    if isinstance(scenes, SceneFiles):
        return SceneFiles([scenes.pairs[index] for index in indices], scenes.table)
    return [scenes[index] for index in indices]
