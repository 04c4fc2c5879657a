"""Images of classes that are read from their files on access, with the augmentation of trainings on ImageNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.core.optional import needs
from microglia.core.vision import import_torchvision
from microglia.data.folders import folder_source
from microglia.data.normalization import Normalization
from microglia.data.scene_load import read_image
from microglia.data.sources import Encoded

Sample = tuple[Tensor, int, int]
"""Image, uint8 [3, side, side], its class, and a random number that only the sample's own generator decides."""


@dataclass(frozen=True)
class Variation:
    """Random variation of training images, as in trainings of transformers on ImageNet.

    Attributes:
        scale: Smallest and largest part of the image's area that a crop takes.
        flip: Whether half of the images are mirrored.
        randaugment: Magnitude of RandAugment with two operations, 0 to 30; 0 for none.
        erasing: Probability that a rectangle of an image is erased.
        mixup: Alpha of MixUp; 0 for none.
        cutmix: Alpha of CutMix; 0 for none. With both, each batch takes one of them.

    Raises:
        DataError: A number is out of range.

    Source: Touvron et al. 2021, "Training data-efficient image transformers", table 9.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    randaugment: int = 0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 <= self.randaugment <= 30 or not 0 <= self.erasing <= 1:
            raise DataError(
                "scale is two numbers in (0, 1] in ascending order, randaugment is in 0 to 30 and erasing in [0, 1]; got "
                f"{list(self.scale)}, {self.randaugment} and {self.erasing}."
            )
        if min(self.mixup, self.cutmix) < 0:
            raise DataError(f"mixup and cutmix are at least 0; got {self.mixup} and {self.cutmix}.")


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """One split of images in files, a map-style dataset of `Sample`.

    Attributes:
        encoded: The files and their classes.
        side: Side of the images, in pixels.
        variation: Random variation; None for the centre of each image.
        fraction: Side over the shorter side of the image before its centre is cut out.
    """

    encoded: Encoded
    side: int
    variation: Variation | None = None
    fraction: float = 0.875

    def __len__(self) -> int:
        """Number of images."""
        return len(self.encoded)

    def __getitem__(self, index: int) -> Sample:
        """Returns one image; its randomness comes from torch's global generator.

        Raises:
            DataError: The image cannot be read; the text names it.
        """
        path = self.encoded.open()(index)
        try:
            image = read_image(Path(path))  # type: ignore[arg-type]  # folders hold paths
        except Exception as error:  # Pillow raises many types for damaged bytes
            told = f"The image {self.encoded.describe(index)} cannot be read ({error}); replace or remove it."
            raise DataError(told) from error
        import_torchvision()
        from torchvision.transforms import v2

        if self.variation is None:
            steps = [v2.Resize(round(self.side / self.fraction)), v2.CenterCrop(self.side)]
        else:
            steps = [v2.RandomResizedCrop(self.side, self.variation.scale)]
            steps += [v2.RandomHorizontalFlip()] if self.variation.flip else []
            steps += [v2.RandAugment(2, self.variation.randaugment)] if self.variation.randaugment else []
        varied: Tensor = v2.Compose(steps)(image)
        return varied, int(self.encoded.labels[index]), int(torch.randint(2**31, ()))


@dataclass(frozen=True)
class MixCollate:
    """Combines samples to a batch, (inputs float32 [B, 3, S, S], labels int64 [B] or, if mixed, float32 [B, classes]).

    Erasing and mixing draw from a generator that the samples decide, so they are reproducible.

    Attributes:
        normalization: Turns bytes into network inputs.
        classes: Number of classes.
        variation: Random variation; None for none.
    """

    normalization: Normalization
    classes: int
    variation: Variation | None = None

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Returns the batch of samples."""
        inputs = self.normalization.apply(torch.stack([image for image, _, _ in samples]))
        labels = torch.tensor([label for _, label, _ in samples])
        if self.variation is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sum(number for _, _, number in samples))
                inputs, labels = self._mixed(inputs, labels, self.variation)
        return inputs.contiguous(memory_format=torch.channels_last), labels

    def _mixed(self, inputs: Tensor, labels: Tensor, variation: Variation) -> tuple[Tensor, Tensor]:
        import_torchvision()
        from torchvision.transforms import v2

        if variation.erasing:
            erase = v2.RandomErasing(variation.erasing, value=0)
            inputs = torch.stack([erase(image) for image in inputs])
        wanted = ((v2.MixUp, variation.mixup), (v2.CutMix, variation.cutmix))
        mixing: list[Callable[..., Any]] = [kind(alpha=alpha, num_classes=self.classes) for kind, alpha in wanted if alpha]
        if mixing:
            inputs, labels = mixing[int(torch.randint(len(mixing), ()))](inputs, labels)
        return inputs, labels


@dataclass(frozen=True, eq=False)
class ImageFolders:
    """Images of classes in folders, which are not decoded before they are used.

    Attributes:
        classes: Class names.
        train: Training images.
        validation: Images to choose hyperparameters on, or None.
        test: Images to report numbers on.
    """

    classes: tuple[str, ...]
    train: Encoded
    validation: Encoded | None
    test: Encoded


def image_folders(root: Path) -> ImageFolders:
    """Returns the images under a folder, ``train/CLASS/IMAGE`` beside ``val`` and perhaps ``test``.

    As usual for ImageNet, ``val`` is the test split where there is no ``test``; then there is no validation split.

    Raises:
        DataError: The folder does not exist, or has another layout.
    """
    needs("zoo", "torchvision", what="Varying images")
    needs("data", "PIL", what="Reading images")
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; expected train/CLASS/IMAGE beside val/CLASS/IMAGE.")
    source = folder_source(root)
    splits = source.splits
    test = splits.get("test", splits.get("validation"))
    if test is None:
        raise DataError(f"The folder {root} has neither 'val' nor 'test' beside its training images; expected one.")
    return ImageFolders(source.classes, splits["train"], splits.get("validation") if "test" in splits else None, test)
