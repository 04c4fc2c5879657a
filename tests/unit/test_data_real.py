"""The real CIFAR-10 and MNIST, decoded once for all tests of this file."""

import numpy as np
import pytest
import torch

from microglia.core.errors import DataError
from microglia.data import Augmentation, Normalization, load_data

pytestmark = [pytest.mark.data, pytest.mark.slow]

EXPECTED = {
    "cifar10": {"shape": (3, 32, 32), "sizes": (45_000, 5_000, 10_000), "augmentation": Augmentation(4, True)},
    "mnist": {"shape": (1, 28, 28), "sizes": (54_000, 6_000, 10_000), "augmentation": None},
}


@pytest.fixture(scope="module", params=EXPECTED)
def real(request, data_root, tmp_path_factory):
    """(name, data set, the same loaded a second time)."""
    if not (data_root / request.param).is_dir():
        pytest.skip(f"there is no folder {request.param} under MICROGLIA_DATA")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield request.param, load_data(request.param), load_data(request.param)


def test_counts_and_shapes(real):
    name, data, _ = real
    expected = EXPECTED[name]
    assert data.shape == expected["shape"]
    assert (len(data.train), len(data.validation), len(data.test)) == expected["sizes"]
    assert data.augmentation == expected["augmentation"]
    assert data.normalization == Normalization.named(name)
    assert len(data.classes) == 10


def test_statistics_of_the_whole_training_set_are_the_published_ones(real):
    name, data, _ = real
    found = Normalization.of(torch.cat([data.train.images, data.validation.images]))
    np.testing.assert_allclose(found.mean, Normalization.named(name).mean, atol=1e-3)
    np.testing.assert_allclose(found.std, Normalization.named(name).std, atol=1e-3)


def test_validation_split_is_stratified(real):
    _, data, _ = real
    carved = torch.bincount(data.validation.labels, minlength=10).double()
    total = carved + torch.bincount(data.train.labels, minlength=10)
    assert ((carved - total / 10).abs() <= 1).all()


def test_second_load_is_the_same(real):
    _, one, two = real
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(one, part).images, getattr(two, part).images)
        assert torch.equal(getattr(one, part).labels, getattr(two, part).labels)


def test_a_folder_that_is_no_classification_set_is_refused(data_root):
    if not (data_root / "camvid").is_dir():
        pytest.skip("there is no folder camvid under MICROGLIA_DATA")
    with pytest.raises(DataError, match="holds no images"):
        load_data("camvid")
