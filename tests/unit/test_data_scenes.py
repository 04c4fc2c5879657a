"""Images with masks: layouts of folders, bad annotations, variation by sample, batches."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from microglia.core.errors import DataError, UnknownNameError
from microglia.data.normalization import Normalization
from microglia.data.samples import SampleBatches
from microglia.data.scene_augmentation import SceneAugmentation
from microglia.data.scene_folders import CITYSCAPES, scene_folder
from microglia.data.scene_load import load_scenes
from microglia.data.scenes import IGNORED, SceneCollate, SceneSet

HEIGHT, WIDTH = 24, 40


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def scene(root, split, name, numbers=(0, 1, 2), images="images", masks="annotations", size=(HEIGHT, WIDTH)):
    generator = np.random.default_rng(len(name))
    put(root / images / split / f"{name}.png", generator.integers(0, 255, (HEIGHT, WIDTH, 3)))
    mask = np.resize(np.array(numbers), size)
    put(root / masks / split / f"{name}.png", mask)
    return mask


@pytest.fixture
def root(tmp_path):
    for split, name in itertools.product(("train", "val", "test"), ("a", "bb", "ccc")):
        scene(tmp_path, split, name)
    return tmp_path


def test_folders_of_images_and_masks(root):
    data = load_scenes(str(root))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [3, 3, 3]
    assert data.classes == ("0", "1", "2")
    image, classes = data.train[0]
    assert (image.shape, classes.shape, classes.dtype) == ((3, HEIGHT, WIDTH), (HEIGHT, WIDTH), torch.uint8)
    (root / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    assert load_scenes(str(root)).classes == ("sky", "road", "tree", "car")


@pytest.mark.parametrize("masks", ["masks", "labels"])
def test_flat_folders_get_their_splits_from_the_names_order(tmp_path, masks):
    for index in range(20):
        scene(tmp_path, "", f"image{index:02d}", masks=masks)
    first, again = load_scenes(str(tmp_path)), load_scenes(str(tmp_path))
    assert [len(part) for part in (first.train, first.validation, first.test)] == [14, 2, 4]
    assert torch.equal(first.test[0][0], again.test[0][0])


def test_the_layout_of_cityscapes_and_its_19_classes(tmp_path):
    for split, name in (("train", "aachen_000000"), ("train", "aachen_000001"), ("val", "munster_000000")):
        city = name.partition("_")[0]
        put(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", np.zeros((HEIGHT, WIDTH, 3)))
        put(tmp_path / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", np.resize(np.arange(34), (HEIGHT, WIDTH)))
    data = load_scenes(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 0, 1)
    assert (len(data.classes), data.classes[0], data.classes[-1]) == (19, "road", "bicycle")
    of = data.train[0][1].flatten()[:34].tolist()
    assert [of[number] for number in CITYSCAPES] == list(range(19))
    assert {of[number] for number in range(34) if number not in CITYSCAPES} == {IGNORED}


def _without_mask(root):
    (root / "annotations" / "train" / "bb.png").unlink()
    return "bb.png has no mask"


def _of_another_size(root):
    scene(root, "train", "bb", size=(HEIGHT, WIDTH + 1))
    return "is 41 x 24 pixels and its image 40 x 24"


def _with_an_unknown_number(root):
    scene(root, "train", "bb", numbers=(0, 7))
    (root / "classes.txt").write_text("a\nb\nc\n")
    return "has the number 7, which is no class"


def _with_colours(root):
    put(root / "annotations" / "train" / "bb.png", np.zeros((HEIGHT, WIDTH, 3)))
    return "has colours"


def _damaged(root):
    (root / "annotations" / "train" / "bb.png").write_bytes(b"no image")
    return "cannot be read"


BAD = [_without_mask, _of_another_size, _with_an_unknown_number, _with_colours, _damaged]


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_a_bad_annotation_is_refused_by_name_or_dropped_and_counted(root, spoil):
    told = spoil(root)
    with pytest.raises(DataError, match=told) as error:
        load_scenes(str(root))
    assert "bad=drop" in str(error.value)
    assert str(error.value).count(". ") == 0  # one sentence
    with pytest.warns(UserWarning, match=f"1 of 9 images are left out.*{told}"):
        data = load_scenes(str(root), bad="drop")
    assert (len(data.train), data.left_out) == (2, 1)


def test_ignored_numbers(root):
    scene(root, "train", "bb", numbers=(0, 9))
    data = load_scenes(str(root), ignore=9)
    assert set(data.train[1][1].unique().tolist()) == {0, IGNORED}
    assert data.classes == ("0", "1", "2")


def test_what_is_no_data_set(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="holds no images with masks"):
        load_scenes(str(tmp_path))
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="no training images"):
        load_scenes(str(tmp_path))
    with pytest.raises(DataError, match="There is no folder"):
        load_scenes("no/where")
    monkeypatch.delenv("MICROGLIA_DATA", raising=False)
    with pytest.raises(DataError, match="MICROGLIA_DATA is not set"):
        load_scenes("camvid")
    with pytest.raises(UnknownNameError, match="camvid"):
        load_scenes("camvit")


def test_large_data_sets_are_read_on_access(root, monkeypatch):
    whole = load_scenes(str(root))
    monkeypatch.setattr("microglia.data.scene_load.KEPT", 0)
    read = load_scenes(str(root))
    assert type(read.train.scenes).__name__ == "SceneFiles"
    assert all(
        torch.equal(a, b) for one, other in zip(whole.train, read.train, strict=False) for a, b in zip(one, other, strict=True)
    )


def marked(height=40, width=56):
    """A black image with a white square of class 1, on class 0."""
    image, classes = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(height, width, dtype=torch.uint8)
    image[:, 10:22, 20:36], classes[10:22, 20:36] = 255, 1
    return image, classes


@pytest.mark.skipif(not __import__("importlib").util.find_spec("torchvision"), reason="torchvision is missing")
class TestVariation:
    def test_the_mask_follows_the_image(self):
        vary = SceneAugmentation((64, 64), (0.5, 2.0), colour=0.0)
        seen = set()
        for seed in range(12):
            torch.manual_seed(seed)
            image, classes = vary(*marked())
            assert (tuple(image.shape), tuple(classes.shape)) == ((3, 64, 64), (64, 64))
            assert set(classes.unique().tolist()) <= {0, 1, IGNORED}  # nearest: no class between two
            bright = (image[0] > 127) & (classes != IGNORED)
            border = (bright != (classes == 1)).sum()
            assert border <= 64  # a pixel along two edges: both are scaled by other rules
            seen.add(int((classes == 1).sum()))
        assert len(seen) > 6

    def test_it_is_a_pure_function_of_seed_epoch_and_sample(self):
        data = SceneSet([marked(), marked(48, 48), marked(40, 64), marked()], SceneAugmentation((32, 32)))
        collate = SceneCollate(Normalization.named("half"))

        def epoch(number, world=1):
            parts = [
                list(SampleBatches(data, 4, collate=collate, seed=3, shuffle=True, rank=r, world=world).epoch(number))
                for r in range(world)
            ]
            return [torch.cat([own[0][k] for own in parts]) for k in (0, 1)]

        before = torch.get_rng_state()
        once, again, other = epoch(2), epoch(2, world=2), epoch(3)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        assert not torch.equal(once[0], other[0])
        assert torch.equal(before, torch.get_rng_state())

    def test_sizes_that_are_no_multiple_of_32(self):
        with pytest.raises(DataError, match=r"The crop is 240 x 320 pixels.*such as 256 x 320"):
            SceneAugmentation((240, 320))


def test_batches_are_padded_to_a_multiple_of_32_with_the_ignored_class():
    inputs, targets = SceneCollate(Normalization.named("half"))([marked(24, 40), marked(33, 30)])
    assert tuple(inputs.shape) == (2, 3, 64, 64)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert targets.dtype == torch.int64
    assert (targets[0, :24, :40] != IGNORED).all()
    assert (targets[0, 24:] == IGNORED).all()
    assert (targets[:, :, 40:] == IGNORED).all()
    assert not inputs[0, :, 24:].any()


def test_scenes_of_another_form_are_refused():
    with pytest.raises(DataError, match=r"expected torch.uint8"):
        SceneSet([(torch.zeros(3, 4, 4), torch.zeros(4, 4))])[0]


@pytest.mark.data
def test_camvid(data_root, tmp_path, monkeypatch):
    if not (data_root / "camvid").is_dir():
        pytest.skip("camvid is not there")
    root = data_root / "camvid"
    assert [len(pairs) for pairs in scene_folder(root).splits.values()] == [233, 367, 101]
    for kind, split in itertools.product(("images", "annotations"), ("train", "val", "test")):
        place = tmp_path / "camvid" / kind / split
        place.mkdir(parents=True)
        for file in sorted((root / kind / split).iterdir())[:8]:
            (place / file.name).symlink_to(file)
    monkeypatch.setenv("MICROGLIA_DATA", str(tmp_path))
    data = load_scenes("camvid")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 8, 8]
    assert (data.classes[3], len(data.classes), data.left_out) == ("road", 11, 0)
    assert tuple(data.test[0][0].shape) == (3, 240, 320)
    seen = torch.cat([data.test[index][1].unique() for index in range(8)]).unique().tolist()
    assert seen[-1] == IGNORED  # 11, void, in the files
    assert max(seen[:-1]) <= 10
