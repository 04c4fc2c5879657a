"""Masks in files take a bit for each weight; files of before, with a byte for each, are read as ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import microglia as mg
from microglia.core.errors import FileError
from microglia.storage import files
from microglia.storage.archive import WEIGHTS, saved_bytes
from microglia.storage.files import digest, read_state, read_tensors, write_state, write_tensors

OLD = Path(__file__).parents[1] / "golden" / "files_version_1"  # written by the library before it stored bits
MASK = "0.parametrizations.weight.0.mask"


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def masked(outputs: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(125, outputs, bias=False), nn.ReLU(), nn.Linear(outputs, 3))
    mg.mask(model, {"0.weight": torch.rand(outputs, 125) > 0.5})
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)


def header_of(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[files.ENTRY])  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(), (1,), (8,), (9,), (3, 5), (2, 3, 4, 5), (0,), (4, 0)])
def test_booleans_of_any_shape_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"mask": torch.rand(shape) > 0.5, "bytes": torch.arange(7, dtype=torch.uint8), "weight": torch.randn(shape)}
    mark = write_tensors(tmp_path / "file", tensors, kind="weights")
    found, _, read = read_tensors(tmp_path / "file", kind="weights")
    assert same(tensors, found)
    assert mark == read == digest(tensors, "null")
    stored = load_file(tmp_path / "file")
    assert stored["mask"].dtype == torch.uint8
    assert stored["mask"].numel() == -(-tensors["mask"].numel() // 8)


def test_the_layout_is_the_one_that_is_documented(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False, False], [False, False, False], [False, True, True], [False, True, False]])
    write_tensors(tmp_path / "file", {"m": mask}, kind="weights")
    assert load_file(tmp_path / "file")["m"].tolist() == [0b10000001, 0b10100000]
    assert header_of(tmp_path / "file")["bits"] == {"m": [4, 3]}


def test_a_mask_costs_a_bit_for_each_weight(tmp_path: Path) -> None:
    model = masked()
    mg.save(model, tmp_path / "masked")
    mg.save(mg.fold(masked()), tmp_path / "dense")
    more = saved_bytes(tmp_path / "masked") - saved_bytes(tmp_path / "dense")  # type: ignore[operator]
    assert 64 * 125 / 8 <= more < 64 * 125 / 8 + 400  # of the header
    assert same(mg.load(tmp_path / "masked", masked()).state_dict(), model.state_dict())


def test_checkpoints_of_a_run_hold_bits_too(tmp_path: Path) -> None:
    state = {"model": dict(masked().state_dict()), "rows": []}
    write_state(tmp_path / "state", state)
    assert (tmp_path / "state").stat().st_size < 64 * 125 * 4.2 + 2500
    assert same(read_state(tmp_path / "state")["model"], state["model"])


def test_a_model_saved_before_is_read() -> None:
    assert header_of(OLD / WEIGHTS)["version"] == 1
    model = mg.load(OLD, network())
    assert model[0].parametrizations.weight.original.tolist() == [[11, 12, 13], [14, 15, 16], [17, 18, 19], [20, 21, 22]]
    assert model[0].weight.tolist() == [[11, 0, 0], [0, 0, 16], [0, 0, 0], [0, 0, 22]]
    assert model[2].weight.tolist() == [[31, 32, 33, 0], [35, 0, 0, 0]]
    assert same(read_state(OLD / "state.safetensors")["model"], model.state_dict())


def test_a_model_saved_before_has_the_same_digest_when_it_is_saved_again(tmp_path: Path) -> None:
    mg.save(mg.load(OLD, network()), tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads((OLD / "plan.json").read_text())
    assert header_of(tmp_path / WEIGHTS)["version"] == 2


def test_a_file_without_masks_stays_one_that_older_libraries_read(tmp_path: Path) -> None:
    mg.save(network(), tmp_path)
    header = header_of(tmp_path / WEIGHTS)
    assert header["version"] == 1
    assert "bits" not in header


DAMAGED = {
    "no mapping": [],
    "no shape": {MASK: "x"},
    "negative": {MASK: [-2, -4]},
    "other size": {MASK: [5, 4]},
    "fewer entries in as many bytes": {MASK: [3, 3]},
    "far too large": {MASK: [10**9, 10**9, 10**9]},
    "a boolean size": {MASK: [True, 12]},
    "of a weight": {MASK: [4, 3], "0.bias": [4]},
    "of nothing": {MASK: [4, 3], "none": [0]},
    "without the mask": {},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_shapes_of_bits_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    mg.save(mg.load(OLD, network()), tmp_path)
    header = {**header_of(tmp_path / WEIGHTS), "bits": DAMAGED[case]}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={files.ENTRY: json.dumps(header)})
    with pytest.raises(FileError, match="damaged"):
        mg.load(tmp_path, network())


def test_bits_behind_the_last_entry_are_refused(tmp_path: Path) -> None:
    mg.save(mg.load(OLD, network()), tmp_path)
    header, stored = header_of(tmp_path / WEIGHTS), load_file(tmp_path / WEIGHTS)
    stored[MASK][-1] |= 1
    save_file(stored, tmp_path / WEIGHTS, metadata={files.ENTRY: json.dumps(header)})
    with pytest.raises(FileError, match="go on behind its last entry"):
        mg.load(tmp_path, network())


def test_folded_on_request_the_file_has_no_masks_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    model, x = masked(), torch.randn(2, 125)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mg.save(model, tmp_path, fold=True)
    assert same(before, model.state_dict())
    loaded = mg.load(tmp_path, masked())
    assert not mg.masks_of(loaded)
    assert list(loaded.state_dict()) == ["0.weight", "2.weight", "2.bias"]
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_folded_a_shrunk_and_masked_model_stays_shrunk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = mg.tasks.build("conv-2", classes=4, shape=(1, 4, 4))
    model = mg.prune_channels(dense, torch.ones(1, 1, 4, 4), mg.Budget(params=0.5), round_to=1)
    name = next(n for n, p in model.named_parameters() if p.ndim == 2)
    mg.mask(model, {name: torch.rand_like(model.get_parameter(name)) > 0.5})
    loaded = mg.load(mg.save(model, tmp_path, fold=True))
    assert same(loaded.state_dict(), mg.fold(model).state_dict())
