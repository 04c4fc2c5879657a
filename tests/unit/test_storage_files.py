"""Files of states: what is written comes back bit for bit, what is damaged is refused, what fails leaves the old file."""

import contextlib
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from microglia.core.errors import FileError
from microglia.storage import files
from microglia.storage.files import digest, read_state, read_tensors, write_atomic, write_state, write_tensors

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int64)


@st.composite
def tensors(draw):
    """Any bits in any shape, 0-d and empty ones included, contiguous or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        content = bytes(byte & 1 for byte in content)
    flat = torch.frombuffer(bytearray(content), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    tensor = flat.clone().reshape(shape)
    return tensor.transpose(0, -1) if tensor.ndim > 1 and draw(st.booleans()) else tensor


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | tensors()
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
    ),
    max_leaves=8,
)


def assert_same(value, other):
    if isinstance(value, torch.Tensor):
        assert value.dtype == other.dtype
        assert value.shape == other.shape
        raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (value, other))
        assert torch.equal(*raw)  # by bytes, so that NaN equals itself
    elif isinstance(value, dict):
        assert isinstance(other, dict)
        assert [(type(key), key) for key in value] == [(type(key), key) for key in other]
        for key in value:
            assert_same(value[key], other[key])
    elif isinstance(value, list | tuple):
        assert isinstance(other, list)
        assert len(value) == len(other)
        for mine, theirs in zip(value, other, strict=True):
            assert_same(mine, theirs)
    elif isinstance(value, float) and math.isnan(value):
        assert math.isnan(other)
    else:
        assert type(value) is type(other)
        assert repr(value) == repr(other)  # tells -0.0 from 0.0


@RELAXED
@given(states)
def test_a_state_comes_back_bit_for_bit(tmp_path, state):
    write_state(tmp_path / "state", state)
    assert_same(state, read_state(tmp_path / "state"))


@RELAXED
@given(states)
def test_equal_states_are_equal_files(tmp_path, state):
    write_state(tmp_path / "one", state)
    write_state(tmp_path / "two", state)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_optimizer_goes_on_from_its_file(tmp_path):
    def step(model, optimizer):
        model(torch.arange(8.0).reshape(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    write_state(tmp_path / "state", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    before = (tmp_path / "state").read_bytes()
    twin = torch.nn.Linear(4, 3)
    other = torch.optim.AdamW(twin.parameters())
    state = read_state(tmp_path / "state")
    twin.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    step(model, optimizer)
    step(twin, other)
    assert torch.equal(model.weight, twin.weight)
    assert (tmp_path / "state").read_bytes() == before, "training wrote into the file it was read from"


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", 1j])
def test_what_a_state_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(TypeError, match=type(value).__name__):
        write_state(tmp_path / "state", {"deep": [value]})
    assert not list(tmp_path.iterdir())


SAMPLE = {"weights": torch.arange(12.0).reshape(3, 4), "more": [torch.tensor(True), {7: None, "text": "é"}], "epoch": 3}


@RELAXED
@given(st.data())
def test_no_damage_is_read_as_something_else(tmp_path, data):
    """A flipped byte is refused, or (in the padding of the header) changes nothing."""
    path = tmp_path / "state"
    write_state(path, SAMPLE)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(FileError):
        assert_same(SAMPLE, read_state(path))


@RELAXED
@given(st.data())
def test_a_cut_file_is_refused(tmp_path, data):
    path = tmp_path / "state"
    write_state(path, SAMPLE)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(FileError, match="damaged"):
        read_state(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileError, match="There is no file"):
        read_state(path)
    path.write_text("hello")
    with pytest.raises(FileError, match="damaged or not a safetensors file"):
        read_state(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(FileError, match=r"not a file of this library; expected microglia\.state"):
        read_state(path)
    save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(FileError, match=r"not a file of this library; expected microglia\.state"):
        read_state(path)
    write_tensors(path, {}, kind="weights")
    with pytest.raises(FileError, match=r"a microglia\.weights file; expected microglia\.state"):
        read_state(path)


@pytest.mark.parametrize(
    "header",
    [[], "text", {"format": "microglia.state"}, {"format": "microglia.state", "version": 1}, {"version": 1, "digest": ""}],
)
def test_a_header_that_lacks_something_is_refused(tmp_path, header):
    save_file({"0": torch.ones(2)}, tmp_path / "file", metadata={files.ENTRY: json.dumps(header)})
    with pytest.raises(FileError):
        read_state(tmp_path / "file")


def test_a_newer_file_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "VERSION", 999)
        write_state(tmp_path / "state", SAMPLE)
    with pytest.raises(FileError, match="has version 999, this library reads up to 2: upgrade microglia"):
        read_state(tmp_path / "state")


@RELAXED
@given(tensors(), st.data())
def test_the_digest_changes_with_any_byte(tensor, data):
    raw = bytearray(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assume(raw and tensor.dtype != torch.bool)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    changed = torch.frombuffer(raw, dtype=tensor.dtype).reshape(tensor.shape)
    assert digest({"a": tensor}) == digest({"a": tensor.clone()})
    assert digest({"a": tensor}) != digest({"a": changed})


def test_the_digest_covers_names_shapes_dtypes_and_text():
    base = torch.zeros(2, 3)
    others = [
        digest({"b": base}),
        digest({"a": base.reshape(3, 2)}),
        digest({"a": base.int()}),
        digest({"a": base}, "text"),
        digest({}),
        digest({"a": base, "b": torch.empty(0)}),
    ]
    assert len({digest({"a": base}), *others}) == len(others) + 1
    assert digest({"a": base, "b": base}) == digest({"b": base, "a": base})


def test_shared_memory_is_written_once_per_name(tmp_path):
    tied = torch.arange(6.0)
    write_tensors(tmp_path / "file", {"a": tied, "b": tied, "c": tied[2:4]}, kind="weights", document=[1])
    found, document, mark = read_tensors(tmp_path / "file", kind="weights")
    assert document == [1]
    assert mark == digest(found, json.dumps([1]))
    assert all(torch.equal(found[name], value) for name, value in {"a": tied, "b": tied, "c": tied[2:4]}.items())


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt(), MemoryError()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    path = tmp_path / "deep" / "file"
    write_atomic(path, "old")

    def failing(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, failing)
        expected = FileError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected, match="Cannot write" if isinstance(error, OSError) else None):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="Cannot write"):
        write_atomic(tmp_path / "file" / "below", "content")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="Cannot write"):
        write_atomic(tmp_path / "folder", "content")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
