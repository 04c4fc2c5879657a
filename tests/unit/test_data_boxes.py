"""Images with boxes: VOC and COCO to one form, what is left out or refused, letterbox, augmentation, batches."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from microglia.core.errors import DataError
from microglia.data.box_augmentation import AUGMENTATIONS, BoxAugmentation, Scene, mirrored, mosaic, moved, placed
from microglia.data.box_folders import load_boxes
from microglia.data.box_samples import BoxSamples, collate_boxes
from microglia.data.boxes import BoxSet, LeftOut
from microglia.data.letterbox import Placement, fitted, letterbox
from microglia.data.samples import SampleBatches

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    "</bndbox></object>"
)


def picture(path, size=(60, 40), box=None):
    """Writes an image of (width, height), black, with a white rectangle."""
    image = Image.new("RGB", size)
    if box is not None:
        image.paste((255, 255, 255), box)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def voc(root, images, lists=None):
    """Writes a VOC folder: name -> list of (class, difficult, corners)."""
    (root / "Annotations").mkdir(parents=True)
    for name, objects in images.items():
        picture(root / "JPEGImages" / f"{name}.png")
        text = "".join(OBJECT.format(kind, difficult, *corners) for kind, difficult, corners in objects)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
    for split, names in (lists or {}).items():
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n")
    return root


LISTS = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
IMAGES = {
    "a": [("cat", 0, (2, 3, 20, 30)), ("dog", 1, (5, 5, 15, 15))],
    "b": [],
    "c": [("dog", 0, (0, 0, 60, 40))],
    "d": [("cat", 0, (10.5, 10, 30, 20))],
}


def coco(root, layout="annotations"):
    """Writes the same content as `IMAGES` in a layout of COCO, with ids in another order than names."""
    ids = {"cat": 7, "dog": 3}
    for split, names in LISTS.items():
        annotations = [
            {"image_id": number, "category_id": ids[kind], "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": difficult}
            for number, name in enumerate(names)
            for kind, difficult, (x0, y0, x1, y1) in IMAGES[name]
        ]
        content = {
            "images": [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate(names)],
            "annotations": annotations,
            "categories": [{"id": number, "name": kind} for kind, number in ids.items()],
        }
        folder = root / split if layout == "beside" else root / "images" / split
        for name in names:
            picture(folder / f"{name}.png")
        path = folder / "_annotations.coco.json" if layout == "beside" else root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def content(boxes, classes):
    return {
        name: [(classes[k], bool(c), tuple(b)) for k, c, b in zip(ls.tolist(), cs.tolist(), bs.tolist(), strict=True)]
        for name, ls, cs, bs in zip(boxes.names, boxes.labels, boxes.crowd, boxes.boxes, strict=True)
    }


def test_voc_and_both_layouts_of_coco_read_the_same(tmp_path):
    first = load_boxes(voc(tmp_path / "voc", IMAGES, LISTS))
    assert first.classes == ("cat", "dog")
    assert content(first.train, first.classes) == {
        "a": [("cat", False, (2, 3, 20, 30)), ("dog", True, (5, 5, 15, 15))],
        "b": [],
    }
    assert first.left_out == LeftOut(boxes=4)
    for layout in ("annotations", "beside"):
        second = load_boxes(coco(tmp_path / layout, layout))
        assert second.classes == ("dog", "cat")  # ascending ids
        for split in ("train", "validation", "test"):
            named = {f"{name}.png": objects for name, objects in content(getattr(first, split), first.classes).items()}
            assert content(getattr(second, split), second.classes) == named


def test_original_voc_starts_at_one(tmp_path):
    root = voc(tmp_path, IMAGES, LISTS)
    assert load_boxes(root, origin=1).train.boxes[0][0].tolist() == [1, 2, 20, 30]


def test_splits_are_carved_where_there_are_no_lists(tmp_path):
    root = voc(tmp_path, {f"i{k}": [("cat", 0, (0, 0, 9, 9))] for k in range(20)})
    data = load_boxes(root)
    assert (len(data.train), len(data.validation), len(data.test)) == (14, 2, 4)
    assert data.test.names == load_boxes(root).test.names
    assert not {*data.train.names, *data.validation.names} & {*data.test.names}


BAD = {
    "no_area": [("cat", 0, (5, 5, 5, 9))],
    "outside": [("cat", 0, (70, 5, 90, 9))],
    "unknown_class": [("cow", 0, (5, 5, 10, 9))],
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_boxes_are_counted_or_refused_by_name(reason, tmp_path):
    images = {**IMAGES, "a": [*IMAGES["a"], *BAD[reason]]}
    root = voc(tmp_path, images, LISTS)
    with pytest.warns(UserWarning, match="1 of 5 boxes .* left out"):
        data = load_boxes(root, classes=("cat", "dog"))
    assert data.left_out == LeftOut(boxes=5, **{reason: 1})
    assert len(data.train.boxes[0]) == 2
    with pytest.raises(DataError, match="The image a has a box"):
        load_boxes(root, classes=("cat", "dog"), strict=True)


def test_a_box_that_sticks_out_is_clipped(tmp_path):
    images = {**IMAGES, "a": [("cat", 0, (-5, 5, 90, 9))]}
    assert load_boxes(voc(tmp_path, images, LISTS)).train.boxes[0].tolist() == [[0, 5, 60, 9]]


def test_missing_files(tmp_path):
    root = voc(tmp_path, IMAGES, LISTS)
    (root / "JPEGImages" / "b.png").unlink()
    with pytest.warns(UserWarning, match="1 images have no file"):
        assert load_boxes(root).left_out.no_image == 1
    with pytest.raises(DataError, match="The image b has no file"):
        load_boxes(root, strict=True)
    (root / "Annotations" / "a.xml").unlink()
    with pytest.raises(DataError, match=r"The image a has no annotation .*a\.xml"):
        load_boxes(root)


BOMB = '<!DOCTYPE a [<!ENTITY b "{}">]><annotation>&b;</annotation>'.format("x" * 50)
HOSTILE = {
    "refused: it declares a document type": BOMB,
    "document type": '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
    "deeper than 32": "<a>" * 99 + "</a>" * 99,
    "cannot be read as XML": "<annotation>",
    "lacks a number": "<a>" + OBJECT.format("cat", 0, "x", 1, 2, 3) + "</a>",
    "four finite numbers": "<a>" + OBJECT.format("cat", 0, "nan", 1, 2, 3) + "</a>",
    "no name or no bndbox": "<a><object><name>cat</name></object></a>",
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_hostile_and_damaged_xml_ends_in_a_sentence(reason, tmp_path):
    root = voc(tmp_path, IMAGES, LISTS)
    (root / "Annotations" / "a.xml").write_text(HOSTILE[reason])
    with pytest.raises(DataError, match=reason):
        load_boxes(root)


def test_an_annotation_names_no_file_outside(tmp_path):
    root = coco(tmp_path / "coco")
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for name in ("../../secret.png", "/etc/passwd", ""):
        content["images"][0]["file_name"] = name
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match="expected a file below"):
            load_boxes(root)
    root = voc(tmp_path / "voc", IMAGES, {**LISTS, "train": ["../a"]})
    with pytest.raises(DataError, match="names the image"):
        load_boxes(root)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{}", '{"images": 1, "annotations": 2, "categories": 3}', "nothing"],
    ids=["deep", "empty", "ints", "text"],
)
def test_damaged_json_ends_in_a_sentence(text, tmp_path):
    root = coco(tmp_path)
    (root / "annotations" / "instances_train.json").write_text(text)
    with pytest.raises(DataError, match=r"instances_train\.json"):
        load_boxes(root)


def test_names_and_folders(tmp_path, monkeypatch):
    voc(tmp_path / "shared" / "pets", IMAGES, LISTS)
    monkeypatch.setenv("MICROGLIA_DATA", str(tmp_path / "shared"))
    assert load_boxes("pets").name == "pets"
    with pytest.raises(DataError, match="There is no folder cells"):
        load_boxes("cells")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images with boxes"):
        load_boxes(tmp_path / "empty")
    (tmp_path / "shared" / "pets" / "JPEGImages" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        load_boxes("pets")


@pytest.mark.data
@pytest.mark.skipif("MICROGLIA_DATA" not in os.environ, reason="MICROGLIA_DATA is not set")
def test_bccd_has_two_boxes_without_area():
    with pytest.warns(UserWarning, match="2 of 4,888 boxes have no area"):
        data = load_boxes("bccd", fit=(320, 320))
    assert data.classes == ("Platelets", "RBC", "WBC")
    assert (len(data.train), len(data.validation), len(data.test)) == (205, 87, 72)
    labels = torch.cat([label for part in (data.train, data.validation, data.test) for label in part.labels])
    assert labels.bincount().tolist() == [361, 4153, 372]
    assert data.train.images[0].shape == (3, 240, 320)
    assert data.train.sizes[0].tolist() == [480, 640]


# ------------------------------------------------------------------------------------------------------------- geometry
sides = st.integers(1, 500)


@settings(deadline=None, max_examples=50)
@given(sides, sides, sides, sides)
def test_letterbox_keeps_proportions_never_enlarges_and_can_be_undone(height, width, high, wide):
    size, canvas = (height, width), (high, wide)
    fit = fitted(size, canvas)
    assert fit[0] <= min(high, height)
    assert fit[1] <= min(wide, width)
    assert fit == size or high in fit or wide in fit
    boxes = torch.tensor([[0.0, 0.0, width, height], [0.0, 0.0, width / 2, height / 3]])
    place = Placement.of(size, canvas)
    on = place.apply(boxes)
    assert (on >= 0).all()
    assert (on[:, 2:] <= torch.tensor([wide, high]) + 1e-3).all()
    torch.testing.assert_close(place.undo(on), boxes, atol=1e-2, rtol=1e-4)


def rectangle(scene_image, threshold=200):
    """Returns the corners of the white pixels of an image."""
    rows, columns = torch.where((scene_image > threshold).all(0))
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def marked(size, box):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, box[1] : box[3], box[0] : box[2]] = 255
    return Scene(image, torch.tensor([box]).float(), torch.tensor([1]), torch.tensor([False]))


def one_set(scene):
    size = torch.tensor([scene.image.shape[-2:]])
    return BoxSet([scene.image], size, (scene.boxes,), (scene.labels,), (scene.crowd,), ("x",))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**20))
def test_boxes_follow_the_marked_pixels(seed):
    torch.manual_seed(seed)
    scene = marked((60, 80), (20, 15, 60, 45))
    found = mirrored(scene)
    assert torch.equal(found.boxes[0], rectangle(found.image))
    vary = BoxAugmentation(scale=0.3, translate=0.1)
    found = moved(scene, (64, 64), vary)
    assert len(found.boxes) == 1
    assert (found.boxes[0] - rectangle(found.image)).abs().max() <= 1.5
    nothing = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    empty = Scene(torch.zeros(3, 64, 64, dtype=torch.uint8), *nothing)
    four = mosaic([scene, empty, empty, empty], (64, 64))
    assert four.image.shape == (3, 128, 128)
    assert torch.equal(four.boxes[0], rectangle(four.image))
    sample, target = BoxSamples(one_set(scene), (64, 96))[0]
    pixels = target["boxes"] * torch.tensor([96, 64, 96, 64])
    corners = torch.cat([pixels[:, :2] - pixels[:, 2:] / 2, pixels[:, :2] + pixels[:, 2:] / 2], 1)
    assert (corners[0] - rectangle(sample)).abs().max() <= 1


def test_geometry_is_that_of_torchvision():
    from microglia.zoo.external import import_torchvision

    pytest.importorskip("torchvision")
    import_torchvision()
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    scene = marked((40, 60), (10, 5, 40, 30))
    boxes = tv_tensors.BoundingBoxes(scene.boxes, format="XYXY", canvas_size=(40, 60))
    image, theirs = v2.RandomHorizontalFlip(1.0)(tv_tensors.Image(scene.image), boxes)
    ours = mirrored(scene)
    assert torch.equal(ours.image, image)
    assert torch.equal(ours.boxes, theirs.as_subclass(torch.Tensor))
    height, width, scale, shift = 40, 60, 1.2, (7.0, -3.0)
    moved_boxes = v2.functional.affine(boxes, angle=0.0, translate=[7, -3], scale=scale, shear=[0.0, 0.0])
    offset = (width / 2 - scale * width / 2 + shift[0], height / 2 - scale * height / 2 + shift[1])
    found = placed(scene, (height, width), scale, offset)
    torch.testing.assert_close(found.boxes, v2.ClampBoundingBoxes()(moved_boxes).as_subclass(torch.Tensor), atol=1e-4, rtol=0)


def test_small_and_thin_rests_of_boxes_are_left_out():
    scene = Scene(
        torch.zeros(3, 100, 100, dtype=torch.uint8),
        torch.tensor([[0.0, 0, 50, 50], [90.0, 0, 100, 50], [0.0, 0, 1.5, 80], [95.0, 95, 100, 100]]),
        torch.arange(4),
        torch.zeros(4, dtype=torch.bool),
    )
    kept = placed(scene, (100, 100), 1.0, (-46.0, 0.0))  # the first keeps 4 of 50 columns: less than a tenth
    assert kept.labels.tolist() == [1, 3]
    assert placed(scene, (100, 100), 1.0, (0.0, 0.0)).labels.tolist() == [0, 1, 3]


# -------------------------------------------------------------------------------------------------------------- batches
@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    generator = np.random.default_rng(0)
    images = {}
    for k in range(6):
        corners = np.sort(generator.uniform(0, 40, (k, 2, 2)), 1).reshape(k, 4)
        images[f"i{k}"] = [("cat", 0, tuple(c)) for c in corners if c[2] > c[0] and c[3] > c[1]]
    lists = {"train": sorted(images), "val": ["i1"], "test": ["i2", "i0", "i3"]}
    return load_boxes(voc(tmp_path_factory.mktemp("voc"), images, lists))


def test_a_batch_says_whose_each_box_is(scenes):
    batches = SampleBatches(BoxSamples(scenes.test, (64, 64)), 2, collate=collate_boxes)
    (images, first), (_, second) = batches.epoch(0)
    assert images.shape == (2, 3, 64, 64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= images.min() <= images.max() <= 1
    counts = [len(boxes) for boxes in scenes.test.boxes]
    assert first["image"].tolist() == [0] * counts[0] + [1] * counts[1]
    assert second["index"].tolist() == [2]
    assert first["size"].tolist() == [[40, 60]] * 2
    assert torch.equal(first["pixels"], torch.cat(scenes.test.boxes[:2]))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_a_function_of_seed_epoch_and_sample(name, scenes):
    data = BoxSamples(scenes.train, (32, 64), AUGMENTATIONS[name])

    def seen(epoch, seed=0, **parts):
        found = {}
        batches = SampleBatches(data, 2, collate=collate_boxes, shuffle=True, seed=seed, **parts)
        for images, targets in batches.epoch(epoch):
            for place, index in enumerate(targets["index"].tolist()):
                found[index] = (images[place], targets["boxes"][targets["image"] == place])
        return found

    first, again = seen(3), seen(3)
    ranks = {**seen(3, rank=0, world=2), **seen(3, rank=1, world=2)}
    for index, (image, boxes) in first.items():
        for other in (again, ranks):
            assert torch.equal(image, other[index][0])
            assert torch.equal(boxes, other[index][1])
        assert boxes.min() >= 0 if len(boxes) else True
        assert (boxes[:, :2] + boxes[:, 2:] / 2 <= 1 + 1e-5).all()
    varied = any(not torch.equal(first[index][0], image) for index, (image, _) in seen(4).items())
    assert varied == (name in ("affine", "mosaic"))  # black images look the same after a flip


def test_wrong_strengths_are_refused():
    with pytest.raises(DataError, match="scale is 1"):
        BoxAugmentation(scale=1)
    with pytest.raises(DataError, match="mosaic is -1"):
        BoxAugmentation(mosaic=-1)


def test_letterbox_is_grey():
    boxed = letterbox(torch.zeros(3, 10, 20, dtype=torch.uint8), (20, 20))
    assert boxed[:, :5].unique().tolist() == [114]
    assert boxed[:, 5:15].unique().tolist() == [0]
