"""Decoded images kept on disk, and the threads that decode them."""

import io
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data_folders import all_images, as_tensor, pixels, write_folder

from microglia.core.errors import DataError
from microglia.data import load_data
from microglia.data.parallel import map_chunks


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path_factory):
    monkeypatch.delenv("MICROGLIA_DATA", raising=False)
    monkeypatch.delenv("MICROGLIA_MEMORY_GIB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# The cache of decoded images


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """A data set slow enough to be kept, the function that loads it, and the list of decodings done."""
    write_folder(tmp_path / "pets", each=10)
    monkeypatch.setattr("microglia.data.load._SLOW", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from microglia.data import load

    done = []
    decode = load.decode
    monkeypatch.setattr(load, "decode", lambda *arguments: done.append(1) or decode(*arguments))
    return tmp_path, lambda **options: load_data(str(tmp_path / "pets"), **options), done


def kept_files(top):
    return sorted((top / "cache" / "microglia").iterdir())


def test_second_load_comes_from_the_cache(cached):
    top, load, done = cached
    first, second = load(), load()
    assert len(done) == 1
    assert len(kept_files(top)) == 1
    for one, two in ((first.train, second.train), (first.validation, second.validation), (first.test, second.test)):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)
    load(image_size=4)
    assert len(done) == 2


def test_cache_notices_a_changed_file(cached):
    top, load, done = cached
    load()
    new = pixels(1234)
    Image.fromarray(new).save(top / "pets" / "cat" / "0.png")
    data = load()
    assert len(done) == 2
    assert as_tensor(new).numpy().tobytes() in all_images(data) | {image.numpy().tobytes() for image in data.test.images}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_damaged_cache_is_rebuilt(cached, damage):
    top, load, done = cached
    first = load()
    (path,) = kept_files(top)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-50]), "empty": b"", "foreign": b"hello" * 99}[damage])
    second = load()
    assert len(done) == 2
    assert torch.equal(first.train.images, second.train.images)
    load()
    assert len(done) == 2


def test_unwritable_cache_is_skipped(cached, monkeypatch):
    top, load, done = cached
    (top / "cache").write_text("a file where the folder should be")
    load()
    load()
    assert len(done) == 2
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    load()
    assert len(done) == 3


def test_full_disk_leaves_nothing_behind(cached, monkeypatch):
    top, load, _ = cached

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert len(load().train) == 14
    assert kept_files(top) == []


def test_cache_respects_the_memory_limit(cached, monkeypatch):
    _, load, _ = cached
    load()
    monkeypatch.setenv("MICROGLIA_MEMORY_GIB", "1e-6")
    with pytest.raises(DataError, match="Pass a smaller image_size"):
        load()


def test_fast_data_sets_are_not_cached(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets", each=10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_data(str(tmp_path / "pets"))
    assert not (tmp_path / "cache").exists()


# Threads


def test_chunks_come_back_in_order():
    results = map_chunks(list, 1000, "counting")
    assert len(results) > 1
    assert [index for chunk in results for index in chunk] == list(range(1000))
    assert map_chunks(list, 0, "counting") == []


def test_first_error_ends_the_work():
    begun = []

    def work(chunk):
        begun.append(chunk.start)
        if chunk.start == 0:
            raise ValueError("the first chunk")
        time.sleep(0.02)

    with pytest.raises(ValueError, match="the first chunk"):
        map_chunks(work, 100_000, "failing")
    assert len(begun) < 100_000 // 128


@pytest.mark.parametrize(("patience", "shown"), [(-1.0, True), (60.0, False)])
def test_progress_bar_appears_for_slow_work_on_a_terminal(monkeypatch, patience, shown):
    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr("microglia.data.parallel._PATIENCE", patience)
    monkeypatch.setattr("microglia.data.parallel.Console", lambda stderr: Console(file=screen, force_terminal=True))
    map_chunks(list, 300, "decoding things")
    assert ("decoding things" in screen.getvalue()) is shown
