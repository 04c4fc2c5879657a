"""A packed file of version 1 loads for ever, to the bit. A test that fails here tells of a broken file: mend the change."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import microglia as mg
from microglia.compress import inspect
from microglia.core.errors import FileError
from microglia.storage.files import digest

WHERE = Path(__file__).parent / "packed_version_1"
sys.path.insert(0, str(WHERE))
from freeze import Frozen  # noqa: E402


def test_the_frozen_file_loads_to_the_bit() -> None:
    model = mg.unpack(WHERE / "model.mgpack", Frozen()).eval()
    with safe_open(WHERE / "outputs.safetensors", framework="pt") as outputs:
        assert digest(model.state_dict()) == outputs.metadata()["digest"]
        torch.testing.assert_close(model(outputs.get_tensor("x")), outputs.get_tensor("y"), atol=1e-5, rtol=1e-5)
    assert mg.masks_of(model).kept == 733


def test_it_holds_every_form() -> None:
    contents = inspect(WHERE / "model.mgpack")
    assert {e.name: e.form for e in contents.entries if e.form != "raw"} == {
        "first.weight": "shared", "second.weight": "sparse", "short": "shared", "flags": "bits", "head.weight": "same",
    }  # fmt: skip


def test_the_same_model_gives_the_same_tensors(tmp_path: Path) -> None:
    """The bytes may differ only where another zlib packs the table."""
    again = mg.pack(mg.unpack(WHERE / "model.mgpack", Frozen()), tmp_path / "again")
    assert again.entries == inspect(WHERE / "model.mgpack").entries


@pytest.mark.parametrize(("version", "text"), [(0, "is damaged"), (3, "reads up to 2: upgrade microglia")])
def test_another_version_is_refused_in_a_sentence(tmp_path: Path, version: int, text: str) -> None:
    shutil.copy(WHERE / "model.mgpack", tmp_path / "m")
    data = bytearray((tmp_path / "m").read_bytes())
    data[8] = version
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(FileError, match=text):
        mg.unpack(tmp_path / "m", Frozen())
