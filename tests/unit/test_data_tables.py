"""Parquet files and the hub, written small and read back."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_data_folders import all_images, as_tensor, encoded, pixels

from microglia.core.errors import DataError
from microglia.data import load_data


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path_factory):
    monkeypatch.delenv("MICROGLIA_DATA", raising=False)
    monkeypatch.delenv("MICROGLIA_MEMORY_GIB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_parquet(path, count=20, start=0, features=None, image="img", label="label", labels=None, **shape):
    rows = {
        image: [{"bytes": encoded(pixels(start + k, **shape)), "path": f"{k}.png"} for k in range(count)],
        label: [k % 2 for k in range(count)] if labels is None else labels,
    }
    table = pa.table(rows)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


FEATURES = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["even", "odd"]}}


# Parquet


def test_parquet_keeps_every_pixel(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", 12, features=FEATURES)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", 8, start=12, features=FEATURES)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", 6, start=50, features=FEATURES)
    data = load_data(str(tmp_path), validation=0.0)
    assert data.classes == ("even", "odd")
    assert torch.equal(data.train.images, torch.stack([as_tensor(pixels(k)) for k in range(20)]))
    assert data.train.labels.tolist() == [k % 2 for k in range(20)]
    assert torch.equal(data.test.images, torch.stack([as_tensor(pixels(50 + k)) for k in range(6)]))


def test_parquet_without_feature_types_by_struct_and_integer(tmp_path):
    labels = [7 if k % 2 else 3 for k in range(20)]
    write_parquet(tmp_path / "data" / "train.parquet", image="picture", label="kind", labels=labels)
    data = load_data(str(tmp_path), validation=0.0)
    assert data.classes == ("3", "7")
    assert set(data.train.labels.tolist()) == {0, 1}
    by_content = {as_tensor(pixels(k)).numpy().tobytes(): k % 2 for k in range(20)}
    assert [by_content[image.numpy().tobytes()] for image in data.train.images] == data.train.labels.tolist()


def test_parquet_validation_split_and_hidden_test_labels(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 30, features=FEATURES)
    write_parquet(tmp_path / "validation-0.parquet", 4, start=90, features=FEATURES)
    write_parquet(tmp_path / "test-0.parquet", 5, start=60, features=FEATURES, labels=[-1] * 5)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 4, 6)
    assert torch.equal(data.validation.images[0], as_tensor(pixels(90)))


def test_parquet_image_stored_as_a_path(tmp_path):
    rows = []
    for k in range(10):
        (tmp_path / f"{k}.bin").write_bytes(encoded(pixels(k)))
        rows.append({"bytes": None, "path": str(tmp_path / f"{k}.bin")})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, type=kind), "label": [0, 1] * 5})
    pq.write_table(table, tmp_path / "train.parquet")
    data = load_data(str(tmp_path), validation=0.0)
    assert all_images(data) <= {as_tensor(pixels(k)).numpy().tobytes() for k in range(10)}
    assert len(data.train) == 8


def test_parquet_column_errors(tmp_path):
    def with_columns(name, columns):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(columns), tmp_path / name / "train.parquet")
        return str(tmp_path / name)

    images = [{"bytes": encoded(pixels(k)), "path": None} for k in range(4)]
    with pytest.raises(DataError, match=r"no image column among: text \(string\), label \(int64\)"):
        load_data(with_columns("imageless", {"text": ["a", "b"], "label": [0, 1]}))
    with pytest.raises(DataError, match=r"clearly the label among: image .*, a \(int64\), b \(int64\)"):
        load_data(with_columns("unclear", {"image": images, "a": [0, 1, 0, 1], "b": [0, 1, 0, 1]}))
    with pytest.raises(DataError, match="clearly the label among: image"):
        load_data(with_columns("labelless", {"image": images, "text": list("abab")}))
    with pytest.raises(DataError, match="has 1 rows without a 'label'"):
        load_data(with_columns("null", {"image": images, "label": [0, 1, None, 1]}))
    with pytest.raises(DataError, match=r"in row 2 of .*train\.parquet cannot be read"):
        load_data(
            with_columns("broken", {"image": [*images[:2], {"bytes": b"x", "path": None}, images[3]], "label": [0, 1, 0, 1]})
        )
    with pytest.raises(DataError, match=r"in row 0 of .* neither bytes nor a path"):
        load_data(with_columns("nothing", {"image": [{"bytes": None, "path": None}, *images[1:]], "label": [0, 1, 0, 1]}))
    preferred = load_data(with_columns("clear", {"image": images, "id": [5, 6, 7, 8], "label": [0, 1, 0, 1]}), validation=0.0)
    assert preferred.classes == ("0", "1")


def test_parquet_split_errors(tmp_path):
    write_parquet(tmp_path / "a" / "test.parquet")
    with pytest.raises(DataError, match="no train split beside test"):
        load_data(str(tmp_path / "a"))
    write_parquet(tmp_path / "b" / "train.parquet")
    write_parquet(tmp_path / "b" / "test.parquet", 3, labels=[0, 1, 2])
    with pytest.raises(DataError, match=r"test\.parquet has the label 2; expected one of the 2 classes"):
        load_data(str(tmp_path / "b"))
    write_parquet(tmp_path / "c" / "train.parquet")
    write_parquet(tmp_path / "c" / "test.parquet", label="other")
    with pytest.raises(DataError, match=r"test\.parquet has no column 'label'"):
        load_data(str(tmp_path / "c"))
    write_parquet(tmp_path / "d" / "train.parquet", 0, labels=[], features=FEATURES)
    with pytest.raises(DataError, match="has no training images"):
        load_data(str(tmp_path / "d"))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "train.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"e/train\.parquet cannot be read"):
        load_data(str(tmp_path / "e"))
    write_parquet(tmp_path / "f" / "train-0.parquet")
    whole = (tmp_path / "f" / "train-0.parquet").read_bytes()
    (tmp_path / "f" / "train-1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"f/train-1\.parquet cannot be read"):
        load_data(str(tmp_path / "f"))


# The hub


def fake_hub(monkeypatch, **splits):
    """Lets the hub hold one data set, ``some/set``, of images numbered from the given starts."""
    import datasets  # here, for it takes a second in every process that collects this file

    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["even", "odd"]))
    found = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "image": [{"bytes": encoded(pixels(start + k)), "path": None} for k in range(10)],
                    "label": [k % 2 for k in range(10)],
                },
                features=features,
            )
            for split, start in splits.items()
        }
    )
    asked = []

    def load_dataset(name):
        asked.append(name)
        if name != "some/set":
            raise ConnectionError("no route to the hub")
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_data_set(monkeypatch):
    asked = fake_hub(monkeypatch, train=0, valid=30, test=60, unsupervised=90)
    data = load_data("hf:some/set")
    assert asked == ["some/set"]
    assert data.classes == ("even", "odd")
    for part, start in ((data.train, 0), (data.validation, 30), (data.test, 60)):
        assert torch.equal(part.images, torch.stack([as_tensor(pixels(start + k)) for k in range(10)]))
        assert part.labels.tolist() == [0, 1] * 5


@pytest.mark.parametrize(("name", "hub"), [("cifar10", "uoft-cs/cifar10"), ("mnist", "ylecun/mnist"), ("hf:a/b", "a/b")])
def test_missing_data_set_says_where_it_was_looked_for(monkeypatch, tmp_path, name, hub):
    asked = fake_hub(monkeypatch, train=0)
    bare = name.removeprefix("hf:")
    with pytest.raises(DataError, match=rf"hub could not give the data set '{hub}' \(ConnectionError: no route") as caught:
        load_data(name)
    assert "MICROGLIA_DATA is not set" in str(caught.value)
    assert f"Set MICROGLIA_DATA to a folder that holds '{bare}'" in str(caught.value)
    monkeypatch.setenv("MICROGLIA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"no folder {tmp_path / bare}"):
        load_data(name)
    assert asked == [hub, hub]
