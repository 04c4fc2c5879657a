"""Unpacking tensor by tensor: the dense model is in memory once, and models with a loading of their own still load."""

from __future__ import annotations

import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.compress import container as module
from microglia.compress import open_packed
from microglia.compress.stored import Stored
from microglia.core.errors import FileError

LAYERS, SIDE = 16, 128


def net() -> nn.Module:
    return nn.Sequential(*(nn.Linear(SIDE, SIDE) for _ in range(LAYERS)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = net().eval()
    mg.mask(model, {f"{n}.weight": torch.rand(SIDE, SIDE) < 0.2 for n in range(LAYERS)})
    return model


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "m.mgpack"
    mg.pack(model, path, bits=4)
    return path


def test_one_decoded_tensor_at_a_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = []
    usual = module.decode_tensor

    def noted(*given: object) -> tuple[Tensor, Tensor]:
        most.append(sum(one() is not None for one in alive))
        found = usual(*given)  # type: ignore[arg-type]
        alive.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(module, "decode_tensor", noted)
    back = mg.unpack(file, net())
    assert len(most) == 2 * LAYERS  # each tensor once
    assert max(most) == 0  # none of an earlier tensor when the next one is decoded
    assert back[3].weight.count_nonzero() > 0


def test_the_peak_is_a_part_of_the_model(file: Path) -> None:
    """tracemalloc counts what is decoded, which NumPy allocates, and not the model's own tensors, which torch does."""
    mg.unpack(file, net())
    fresh, dense = net(), 4 * LAYERS * SIDE * SIDE
    tracemalloc.start()
    mg.unpack(file, fresh)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = Stored(open_packed(file))
    tracemalloc.start()
    kept = dict(whole)
    _, all_at_once = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 3 * LAYERS
    assert all_at_once > dense > 1.5 * most


def test_a_tied_weight_is_decoded_once_and_stays_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"first": nn.Linear(20, 20, bias=False), "second": nn.Linear(20, 20, bias=False)})
        model["second"].weight = model["first"].weight
        return model

    given, calls = tied(), []
    mg.pack(given, tmp_path / "m.mgpack")
    usual = module.decode_tensor
    monkeypatch.setattr(module, "decode_tensor", lambda *a: calls.append(1) or usual(*a))  # type: ignore[func-returns-value]
    back = mg.unpack(tmp_path / "m.mgpack", tied())
    assert len(calls) == 1
    assert back["first"].weight is back["second"].weight
    assert torch.equal(back["first"].weight, given["first"].weight)
    loose = nn.ModuleDict({"first": nn.Linear(20, 20, bias=False), "second": nn.Linear(20, 20, bias=False)})
    mg.unpack(tmp_path / "m.mgpack", loose)
    assert torch.equal(loose["second"].weight, given["first"].weight)


class Doubled(nn.Linear):
    """A layer with a loading of its own, which reads another name."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}half") * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}half"] = destination.pop(f"{prefix}weight") / 2


def test_a_loading_of_ones_own_is_used(tmp_path: Path) -> None:
    given = nn.Sequential(Doubled(6, 6))
    mg.pack(given, tmp_path / "m.mgpack")
    back = mg.unpack(tmp_path / "m.mgpack", nn.Sequential(Doubled(6, 6)))
    assert torch.equal(back[0].weight, given[0].weight)


def test_another_kind_of_numbers_is_converted(tmp_path: Path) -> None:
    given = nn.Sequential(nn.Linear(6, 6)).half()
    mg.pack(given, tmp_path / "m.mgpack")
    back = mg.unpack(tmp_path / "m.mgpack", nn.Sequential(nn.Linear(6, 6)))
    assert back[0].weight.dtype == torch.float32
    assert torch.equal(back[0].weight, given[0].weight.float())


def test_damage_leaves_the_given_model_as_it_was(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    (tmp_path / "m").write_bytes(data)
    fresh = net()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(FileError, match="does not match its check"):
        mg.unpack(tmp_path / "m", fresh)
    assert fresh.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
