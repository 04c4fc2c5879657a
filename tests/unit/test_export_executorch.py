"""ExecuTorch programs: opened by its own runtime, with the model's outputs in the model's structure."""

import json
from copy import deepcopy

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import ExportError, MissingLibraryError
from microglia.export import export
from microglia.export.executorch import INPUTS


class Heads(nn.Module):
    """Two arguments, and several outputs in a structure of their own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x, add):
        maps = self.norm(self.conv(x)).relu() + add
        return {"logits": self.linear(maps.mean((2, 3))), "maps": [maps.sum(1)]}


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(0)
    model = Heads().eval()
    model.norm.running_mean.normal_()
    return model, {"x": torch.randn(2, 3, 8, 8), "add": torch.randn(2, 8, 8, 8)}


def test_a_program_returns_what_the_model_does_and_tells_what_it_is(heads, tmp_path):
    from executorch.runtime import Runtime

    model, inputs = heads
    written = export(model, tmp_path / "model.pte", inputs)
    assert written.target == "executorch"
    assert written.engine.startswith("ExecuTorch ")
    assert (written.batch, written.notes) == (2, ("The file takes inputs of the example's shapes alone.",))
    assert written.examples == 2
    assert [file.name for file in written.files] == ["model.pte"]
    with torch.no_grad():
        torch.testing.assert_close(written.open()(add=inputs["add"], x=inputs["x"]), model(**inputs))
    program = Runtime.get().load_program(str(written.path))
    told = {name: program.load_method(name).execute(())[0] for name in program.method_names if name.startswith("microglia_")}
    assert json.loads(told[INPUTS]) == ["x", "add"]
    assert json.loads(told["microglia_input_shapes"]) == [[2, 3, 8, 8], [2, 8, 8, 8]]
    assert told["microglia_changes"] == "none"


def test_removed_channels_are_no_part_of_the_program_and_masks_are_zeros(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 5)).eval()
    x = torch.randn(1, 3, 8, 8)
    whole = export(model, tmp_path / "whole.pte", x)
    small = mg.prune_channels(model, x, mg.Budget(density=0.5), round_to=4)
    cut = export(small, tmp_path / "small.pte", x)
    assert cut.bytes < whole.bytes - 4 * 8 * 8 * 9
    mg.mask(small, {"2.weight": torch.rand_like(small[2].weight) > 0.5})
    written = export(small, tmp_path / "masked.pte", x, data=[torch.randn(3, 3, 8, 8)])
    assert written.examples == 1 + 3
    with torch.no_grad():
        torch.testing.assert_close(written.open()(x), small(x))


def test_a_network_that_was_trained_in_channels_last_layout(heads, tmp_path):
    model, inputs = heads
    turned = deepcopy(model).to(memory_format=torch.channels_last)
    given = {name: tensor.to(memory_format=torch.channels_last) for name, tensor in inputs.items()}
    written = export(turned, tmp_path / "model.pte", given)
    assert turned.conv.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(written.open()(**given), model(**inputs))


def test_a_damaged_file_and_other_shapes_are_one_sentence(heads, tmp_path):
    from microglia.export.targets import targets

    model, inputs = heads
    written = export(model, tmp_path / "model.pte", inputs)
    broken = tmp_path / "broken.pte"
    broken.write_bytes(written.path.read_bytes()[:700])
    with pytest.raises(ExportError, match=r"ExecuTorch does not open .*broken\.pte"):
        targets["executorch"].open(broken)
    with pytest.raises(ExportError, match=r"takes inputs of the shapes \[\(2, 3, 8, 8\).* alone; got \[\(1, 3, 8, 8\)"):
        written.open()(x=inputs["x"][:1], add=inputs["add"])
    with pytest.raises(ExportError, match="has no option 'opset'"):
        export(model, tmp_path / "other.pte", inputs, opset=17)
    assert not (tmp_path / "other.pte").exists()


def test_without_the_library_the_sentence_names_its_extra(heads, tmp_path, monkeypatch):
    monkeypatch.setattr("microglia.core.optional.present", lambda module: module != "executorch")
    model, inputs = heads
    with pytest.raises(MissingLibraryError, match=r"pip install 'microglia\[mobile\]'"):
        export(model, tmp_path / "model.pte", inputs)
    assert not (tmp_path / "model.pte").exists()
