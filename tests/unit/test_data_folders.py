"""Folders of images, written small and read back."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from microglia.core.errors import DataError
from microglia.data import Normalization, load_data


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path_factory):
    monkeypatch.delenv("MICROGLIA_DATA", raising=False)
    monkeypatch.delenv("MICROGLIA_MEMORY_GIB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pixels(seed, height=6, width=6, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_folder(top, classes=("cat", "dog"), each=5, start=0, **shape):
    """Writes PNG files class by class; image k has the content of pixels(start + k)."""
    for index, name in enumerate(classes):
        (top / name).mkdir(parents=True)
        for number in range(each):
            seed = start + index * each + number
            Image.fromarray(pixels(seed, **shape)).save(top / name / f"{number}.png")


def as_tensor(array):
    return torch.from_numpy(array.transpose(2, 0, 1) if array.ndim == 3 else array[None])


def all_images(data):
    """Every image of the train and validation splits as a set of bytes."""
    return {image.numpy().tobytes() for part in (data.train, data.validation) for image in part.images}


def test_image_folder_with_splits_keeps_every_pixel(tmp_path):
    write_folder(tmp_path / "train", each=5)
    write_folder(tmp_path / "val", each=2, start=50)
    write_folder(tmp_path / "test", each=3, start=80)
    data = load_data(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 6, 6)
    for part, start, each in ((data.train, 0, 5), (data.validation, 50, 2), (data.test, 80, 3)):
        assert torch.equal(part.images, torch.stack([as_tensor(pixels(start + k)) for k in range(2 * each)]))
        assert part.labels.tolist() == [0] * each + [1] * each
    assert data.normalization == Normalization.of(data.train.images)
    assert data.augmentation is None


def test_image_folder_without_splits_is_split(tmp_path):
    write_folder(tmp_path, each=20)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (29, 3, 8)
    assert torch.bincount(data.test.labels).tolist() == [4, 4]
    everything = all_images(data) | {image.numpy().tobytes() for image in data.test.images}
    assert everything == {as_tensor(pixels(k)).numpy().tobytes() for k in range(40)}


def test_folder_under_microglia_data_and_by_path_are_the_same(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets", each=8)
    by_path = load_data(str(tmp_path / "pets"))
    monkeypatch.setenv("MICROGLIA_DATA", str(tmp_path))
    assert torch.equal(load_data("pets").train.images, by_path.train.images)
    assert torch.equal(load_data("hf:pets").train.images, by_path.train.images)
    write_folder(tmp_path / "here" / "pets", each=8, start=100)
    monkeypatch.chdir(tmp_path / "here")
    assert torch.equal(load_data("pets").train.images, by_path.train.images)
    assert not torch.equal(load_data("./pets").train.images, by_path.train.images)
    monkeypatch.delenv("MICROGLIA_DATA")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_data("./pets").train.images, by_path.train.images)
    assert torch.equal(load_data("pets").train.images, by_path.train.images)


def test_sizes_that_differ_become_the_median_square(tmp_path):
    write_folder(tmp_path / "train", each=3, height=10, width=14)
    for number, (height, width) in enumerate([(8, 30), (20, 12), (12, 12)]):
        Image.fromarray(pixels(number, height, width)).save(tmp_path / "train" / "cat" / f"x{number}.png")
    write_folder(tmp_path / "test", each=1, height=40, width=30)
    data = load_data(str(tmp_path))
    # Shorter sides: 10 six times, 8, 12, 12.
    assert data.shape == (3, 10, 10)
    assert data.test.images.shape[1:] == (3, 10, 10)


def test_resize_scales_the_shorter_side_and_cuts_the_centre(tmp_path):
    # Left third red, middle green, right blue; 12 rows by 36 columns: the centre 12 columns are all green.
    array = np.zeros((12, 36, 3), dtype=np.uint8)
    for third in range(3):
        array[:, 12 * third : 12 * third + 12, third] = 200
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.fromarray(array).save(tmp_path / name / f"{number}.png")
    assert load_data(str(tmp_path)).shape == (3, 12, 36)
    cut = load_data(str(tmp_path), image_size=12).train.images[0]
    assert torch.equal(cut, torch.tensor([0, 200, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 12, 12))
    small = load_data(str(tmp_path), image_size=6).train.images[0]
    assert (small[1, :, 1:-1] == 200).all()
    assert small.shape == (3, 6, 6)


@pytest.mark.parametrize(("grey", "channels"), [(4, 1), (3, 3), (2, 3)])
def test_colour_or_grey_is_the_majority(tmp_path, grey, channels):
    for name, count in (("a", 3), ("b", 3)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(count):
            index = number + 3 * (name == "b")
            array = pixels(index, channels=1 if index < grey else 3)
            Image.fromarray(array).save(tmp_path / "train" / name / f"{number}.png")
    write_folder(tmp_path / "test", classes=("a", "b"), each=1)
    data = load_data(str(tmp_path), validation=0.0)
    assert data.shape == (channels, 6, 6)
    first = as_tensor(pixels(0, channels=1))
    assert torch.equal(data.train.images[0], first.expand(channels, 6, 6))
    if channels == 1:
        luma = pixels(5) @ np.array([0.299, 0.587, 0.114])
        assert np.abs(data.train.images[5, 0].numpy() - luma).max() <= 1


def test_sixteen_bits_palettes_and_transparency(tmp_path):
    write_folder(tmp_path / "train", each=4, channels=1)
    deep = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800
    Image.fromarray(deep).save(tmp_path / "train" / "cat" / "0.png")
    data = load_data(str(tmp_path), validation=0.0)
    both = torch.cat([data.train.images, data.test.images])
    assert any(np.array_equal(image[0].numpy(), deep >> 8) for image in both)
    colour = tmp_path / "colour"
    write_folder(colour, each=4)
    opaque = np.dstack([pixels(0), np.full((6, 6), 9, dtype=np.uint8)])
    Image.fromarray(opaque, "RGBA").save(colour / "cat" / "0.png")
    data = load_data(str(colour), validation=0.0)
    both = torch.cat([data.train.images, data.test.images])
    assert any(torch.equal(image, as_tensor(pixels(0))) for image in both)


def test_mixed_file_formats_in_one_folder(tmp_path):
    write_folder(tmp_path, each=10)
    for number, suffix in enumerate(("webp", "bmp", "gif", "jpg", "ppm", "tiff")):
        array = np.full((6, 6, 3), 40 * number, dtype=np.uint8)
        options = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(array).save(tmp_path / "dog" / f"z{number}.{suffix}", **options)
    data = load_data(str(tmp_path), validation=0.0)
    images = torch.cat([data.train.images, data.test.images])
    assert len(images) == 26
    flat = {int(image[0, 0, 0]) for image in images if image.unique().numel() == 1}
    assert flat == {0, 40, 80, 120, 160, 200}


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="holds no images in class folders and no parquet files"):
        load_data(str(tmp_path))
    write_folder(tmp_path / "one", classes=("cat",))
    with pytest.raises(DataError, match="has one class, 'cat'; expected two or more"):
        load_data(str(tmp_path / "one"))
    write_folder(tmp_path / "hole")
    (tmp_path / "hole" / "bird").mkdir()
    with pytest.raises(DataError, match=r"class folder .*bird holds no images"):
        load_data(str(tmp_path / "hole"))
    write_folder(tmp_path / "extra" / "train")
    write_folder(tmp_path / "extra" / "test", classes=("cat", "eel"))
    with pytest.raises(DataError, match="has the class 'eel', which the train folder lacks"):
        load_data(str(tmp_path / "extra"))
    write_folder(tmp_path / "testless" / "test")
    with pytest.raises(DataError, match="has test but no 'train' folder"):
        load_data(str(tmp_path / "testless"))
    write_folder(tmp_path / "twice" / "train")
    write_folder(tmp_path / "twice" / "val")
    write_folder(tmp_path / "twice" / "valid")
    with pytest.raises(DataError, match="has both 'val' and 'valid' as its validation split"):
        load_data(str(tmp_path / "twice"))
    write_folder(tmp_path / "hollow" / "train")
    (tmp_path / "hollow" / "test").mkdir()
    with pytest.raises(DataError, match=r"hollow/test holds no images"):
        load_data(str(tmp_path / "hollow"))


@pytest.mark.parametrize("content", [b"", b"not an image", encoded(pixels(0, 64, 64))[:300]])
def test_unreadable_image_is_named(tmp_path, content):
    write_folder(tmp_path, height=64, width=64)
    (tmp_path / "dog" / "3.png").write_bytes(content)
    with pytest.raises(DataError, match=r"The image .*dog/3\.png cannot be read"):
        load_data(str(tmp_path))


def test_too_deep_image_is_named(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(np.zeros((6, 6), dtype=np.float32)).save(tmp_path / "dog" / "f.tiff")
    with pytest.raises(DataError, match=r"dog/f\.tiff cannot be read \(its pixels are of Pillow's mode 'F'"):
        load_data(str(tmp_path))
