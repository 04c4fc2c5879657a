"""Shifts of images: bytes in, bytes out, stronger with the severity, the same for the same seed."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from microglia.core.errors import DataError, UnknownNameError
from microglia.data import load_data
from microglia.data.shifts import BLUR, CHUNK, CONTRAST, NOISE, QUALITY, SEVERITIES, SHIFTS, shifted


def pictures(count=6, channels=3, side=32, seed=0):
    """Smooth random images: what natural ones have and noise has not, neighbours that are alike."""
    small = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, size=(side, side), mode="bicubic")
    return (255 * large).clamp(0, 255).to(torch.uint8)


def distance(one, other):
    return float((one.double() - other.double()).pow(2).mean().sqrt())


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 96)])
def test_every_shift_changes_more_with_its_severity(name, channels, side):
    images = pictures(channels=channels, side=side)
    before = images.clone()
    far = []
    for severity in SEVERITIES:
        made = shifted(images, name, severity)
        assert (made.dtype, made.shape) == (torch.uint8, images.shape)
        far.append(distance(images, made))
    assert far[0] > 0
    assert far == sorted(far)
    assert far[-1] > 2 * far[0]
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", SHIFTS)
def test_the_same_seed_gives_the_same_bytes(name):
    images = pictures()
    first, again, other = (shifted(images, name, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name != "noise")


@pytest.mark.parametrize("name", ["blur", "jpeg", "contrast"])
def test_an_image_does_not_depend_on_those_beside_it(name):
    images = pictures()
    whole = shifted(images, name, 4)
    alone = torch.cat([shifted(images[i : i + 1], name, 4) for i in range(len(images))])
    assert torch.equal(whole, alone)


def test_more_images_than_a_chunk():
    images = pictures(1, 1, 8).repeat(CHUNK + 5, 1, 1, 1)
    made = shifted(images, "noise", 2)
    assert made.shape == images.shape
    assert not torch.equal(made[0], made[CHUNK])  # the generator goes on


def test_noise_has_the_deviation_it_says():
    grey = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    for severity, deviation in zip(SEVERITIES[:3], NOISE[:3], strict=True):  # the stronger ones are clipped
        found = (shifted(grey, "noise", severity).double() - 128).std()
        assert float(found) == pytest.approx(255 * deviation, rel=0.01)


def test_blur_by_hand():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 4] = 255
    sigma = BLUR[2]
    weight = [math.exp(-0.5 * (d / sigma) ** 2) for d in (-2, -1, 0, 1, 2)]
    weight = [w / sum(weight) for w in weight]
    made = shifted(image, "blur", 3)[0, 0]
    for row in range(9):
        for column in range(9):
            near = max(abs(row - 4), abs(column - 4)) <= 2
            expected = 255 * weight[row - 2] * weight[column - 2] if near else 0
            assert abs(int(made[row, column]) - expected) <= 0.5 + 1e-3
    flat = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    assert torch.equal(shifted(flat, "blur", 5), flat)  # also at the border


def test_contrast_by_hand():
    image = torch.tensor([[0, 100], [200, 100]], dtype=torch.uint8).reshape(1, 1, 2, 2)  # mean 100
    for severity, left in zip(SEVERITIES, CONTRAST, strict=True):
        low, high = round(100 - 100 * left), round(100 + 100 * left)
        assert shifted(image, "contrast", severity).flatten().tolist() == [low, 100, high, 100]


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_a_file_of_that_quality_holds(channels):
    images = pictures(channels=channels)
    made = shifted(images, "jpeg", 5)
    file = io.BytesIO()
    pixels = images[2].permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, "jpeg", quality=QUALITY[4])
    expected = np.asarray(Image.open(io.BytesIO(file.getvalue()))).reshape(32, 32, channels)
    assert np.array_equal(made[2].permute(1, 2, 0).numpy(), expected)


def test_the_images_of_a_data_set_are_what_is_shifted():
    images = load_data("digits").test.images
    assert images.dtype == torch.uint8
    assert all(shifted(images, name, 1).shape == images.shape for name in SHIFTS)
    assert shifted(images[:0], "noise", 1).shape == images[:0].shape


def test_wrong_arguments():
    images = pictures()
    with pytest.raises(UnknownNameError, match=r"no shift named 'nois'.*'noise'"):
        shifted(images, "nois", 1)
    with pytest.raises(DataError, match=r"severity of a shift is 6; expected a whole number from 1"):
        shifted(images, "noise", 6)
    with pytest.raises(DataError, match=r"float32 of shape.*before the normalization"):
        shifted(images.float(), "noise", 1)
    with pytest.raises(DataError, match="1 or 3 channels; these have 2"):
        shifted(images[:, :2], "jpeg", 1)
