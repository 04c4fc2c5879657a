"""load_data: the built-in digits, names, options and limits."""

import pytest
import torch
from sklearn.datasets import load_digits
from test_data_folders import write_folder

from microglia.core.errors import DataError, UnknownNameError
from microglia.data import Normalization, load_data


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path_factory):
    monkeypatch.delenv("MICROGLIA_DATA", raising=False)
    monkeypatch.delenv("MICROGLIA_MEMORY_GIB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# Digits


def test_digits_are_the_real_ones():
    data = load_data("digits")
    assert data.shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert (len(data.train), len(data.validation), len(data.test)) == (1294, 144, 359)
    assert data.augmentation is None
    assert data.normalization == Normalization.of(data.train.images)
    original = load_digits()
    assert int(original.target[0]) == 0
    expected = sorted((label, image.tobytes()) for label, image in zip(original.target, original.images, strict=True))
    parts = (data.train, data.validation, data.test)
    found = [
        (int(label), (image[0].double() / 15).numpy().tobytes())
        for part in parts
        for label, image in zip(part.labels, part.images, strict=True)
    ]
    assert sorted(found) == expected
    first = (torch.from_numpy(original.images[0]) * 15).to(torch.uint8)
    matches = [int(part.labels[k]) for part in parts for k in range(len(part)) if torch.equal(part.images[k, 0], first)]
    assert matches == [0]


def test_digits_split_is_stratified_and_the_same_each_time():
    one, two = load_data("digits"), load_data("digits")
    assert torch.equal(one.train.images, two.train.images)
    assert torch.equal(one.validation.labels, two.validation.labels)
    for part, share in ((one.test, 0.2), (one.validation, 0.08)):
        counts = torch.bincount(part.labels, minlength=10)
        assert ((counts - torch.bincount(torch.from_numpy(load_digits().target)) * share).abs() <= 1.5).all()


def test_digits_options():
    data = load_data("digits", image_size=16, validation=0.25, normalize="half")
    assert data.shape == (1, 16, 16)
    assert data.normalization == Normalization.named("half")
    assert len(data.validation) == round(0.25 * 1438)
    assert len(load_data("digits", validation=0.0).validation) == 0


# Names


def test_unknown_names(monkeypatch, tmp_path):
    with pytest.raises(UnknownNameError, match=r"no data set named 'cifar11'\. Did you mean 'cifar10'"):
        load_data("cifar11")
    (tmp_path / "flowers" / "rose").mkdir(parents=True)
    (tmp_path / "flowers" / "rose" / "one.png").touch()
    (tmp_path / "checkpoints").mkdir()  # no data set, so it is not offered
    monkeypatch.setenv("MICROGLIA_DATA", str(tmp_path))
    with pytest.raises(UnknownNameError, match=r"Did you mean 'flowers'\? Known: cifar10, digits, flowers, hf:NAME, mnist"):
        load_data("flower")
    with pytest.raises(UnknownNameError, match="no data set named ''"):
        load_data("")
    with pytest.raises(DataError, match=r"There is no folder .*nowhere; expected parquet .* is written hf:NAME"):
        load_data(str(tmp_path / "nowhere"))
    with pytest.raises(UnknownNameError, match="no normalization named 'imagenot'"):
        load_data("digits", normalize="imagenot")
    with pytest.raises(DataError, match="has 3 channels and the images have 1"):
        load_data("digits", normalize="imagenet")
    with pytest.raises(DataError, match="image_size is 0; expected 1 pixel or more"):
        load_data("digits", image_size=0)
    with pytest.raises(DataError, match="expected 0 <= fraction < 1"):
        load_data("digits", validation=1.0)


def test_too_large_for_memory(monkeypatch, tmp_path):
    write_folder(tmp_path, each=10)
    monkeypatch.setenv("MICROGLIA_MEMORY_GIB", "1e-6")
    with pytest.raises(
        DataError, match=r"would take 2.01e-06 GiB of memory and the limit is 1e-06 GiB\. Pass a smaller image_size"
    ):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), image_size=4).shape == (3, 4, 4)
    with pytest.raises(DataError, match="Pass a smaller image_size"):
        load_data("digits", image_size=100)
    monkeypatch.setenv("MICROGLIA_MEMORY_GIB", "lots")
    with pytest.raises(DataError, match="MICROGLIA_MEMORY_GIB is 'lots'; expected a number of GiB"):
        load_data(str(tmp_path))
