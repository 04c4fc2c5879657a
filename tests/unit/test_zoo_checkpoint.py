"""Loading published weights: what fits is loaded, what does not is explained, and no code of a file is run."""

import os
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from microglia.core.errors import CheckpointError
from microglia.zoo import build, load_checkpoint


@pytest.fixture
def source():
    torch.manual_seed(1)
    return build("resnet8", width=4)


@pytest.fixture
def target():
    torch.manual_seed(2)
    return build("resnet8", width=4)


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def refuse(model, path, text, **options):
    """Expects a one-sentence refusal that leaves the model as it was; returns its text."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=text) as caught:
        load_checkpoint(model, path, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("place", [None, "state_dict", "model", "net"])
def test_every_usual_form(tmp_path, source, target, prefix, place):
    state = OrderedDict((prefix + name, tensor) for name, tensor in source.state_dict().items())
    torch.save({place: state, "epoch": 3} if place else state, tmp_path / "weights.pt")
    load_checkpoint(target, tmp_path / "weights.pt")
    assert_same(target, source)


def test_safetensors(tmp_path, source, target):
    save_file({f"module.{name}": tensor for name, tensor in source.state_dict().items()}, tmp_path / "w.safetensors")
    load_checkpoint(target, str(tmp_path / "w.safetensors"))
    assert_same(target, source)


def test_the_old_file_format(tmp_path, source, target):
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.th", _use_new_zipfile_serialization=False)
    load_checkpoint(target, tmp_path / "w.th")
    assert_same(target, source)


def test_num_batches_tracked_may_be_missing(tmp_path, source, target):
    state = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pt")
    load_checkpoint(target, tmp_path / "w.pt")
    assert torch.equal(target.conv1.weight, source.conv1.weight)


def test_a_wrapped_model(tmp_path, source, target):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_checkpoint(nn.DataParallel(target), tmp_path / "w.pt")
    assert_same(target, source)


def test_a_child_that_happens_to_be_called_module(tmp_path):
    source, target = (nn.Sequential(OrderedDict(module=nn.Linear(3, 2))) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_checkpoint(target, tmp_path / "w.pt")
    assert_same(target, source)


@pytest.mark.parametrize("prefix", ["backbone", "backbone."])
def test_a_given_prefix(tmp_path, source, target, prefix):
    state = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": state | {"loss.weight": torch.ones(10)}}, tmp_path / "w.pt")
    load_checkpoint(target, tmp_path / "w.pt", prefix=prefix)
    assert_same(target, source)
    refuse(target, tmp_path / "w.pt", "begins with 'head.'; it has backbone.conv1.weight", prefix="head")


def test_missing_and_unexpected_names(tmp_path, source, target):
    state = source.state_dict()
    state["extra.weight"] = state.pop("linear.weight")
    torch.save(state, tmp_path / "w.pt")
    text = refuse(target, tmp_path / "w.pt", "does not fit ResNet: 1 missing: linear.weight; 1 unexpected: extra.weight")
    assert "another architecture" not in text


def test_another_number_of_classes(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = build("resnet8", width=4, classes=100)
    text = refuse(model, tmp_path / "w.pt", r"2 of another shape: linear.weight \(10, 16\) in the file, \(100, 16\) in")
    assert "Only the last layer differs: the file seems to have 10 classes" in text


def test_another_width(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    text = refuse(build("resnet8", width=8), tmp_path / "w.pt", "the same architecture with another width or input")
    assert text.count(" in the file") == 5
    assert "and 31 more" in text


@pytest.mark.parametrize("other", ["resnet14", "resnet20-projection", "wrn-16-2", "lenet-5"])
def test_another_architecture_is_named(tmp_path, other):
    torch.save(build(other).state_dict(), tmp_path / "w.pt")
    refuse(build("resnet8"), tmp_path / "w.pt", f"looks like another architecture: {other}[.]")


def test_an_architecture_outside_the_zoo(tmp_path):
    torch.save(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(4, 2)).state_dict(), tmp_path / "w.pt")
    refuse(build("resnet8"), tmp_path / "w.pt", "The file looks like another architecture[.]$")


def test_a_masked_model_is_told_to_load_first(tmp_path, source, target):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    nn.utils.parametrize.register_parametrization(target.conv1, "weight", nn.Identity())
    refuse(target, tmp_path / "w.pt", "load the checkpoint first, then prune")


@pytest.mark.parametrize("suffix", [".pt", ".th", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file(tmp_path, source, target, suffix, kept):
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refuse(target, path, "damaged, cut short")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"hello world", b"\x80\x02}q\x00.", b"PK\x03\x04", b"\x00" * 4000])
def test_a_foreign_file(tmp_path, target, suffix, content):
    (tmp_path / f"w{suffix}").write_bytes(content)
    refuse(target, tmp_path / f"w{suffix}", "damaged, cut short|holds no weights")


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_refused_and_not_run(tmp_path, target):
    trap = tmp_path / "trap"
    torch.save({"state_dict": RunsCode(str(trap))}, tmp_path / "w.pt")
    refuse(target, tmp_path / "w.pt", r"holds a Python object \(posix.mkdir\) that would have to run code.*refused")
    with (tmp_path / "plain.pkl").open("wb") as file:
        pickle.dump(RunsCode(str(trap)), file, protocol=2)
    refuse(target, tmp_path / "plain.pkl", "posix.mkdir|damaged")
    assert not trap.exists()


def test_a_whole_pickled_model_is_refused(tmp_path, target):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    refuse(target, tmp_path / "w.pt", r"torch.nn.modules.linear.Linear.*Save the weights alone")


@pytest.mark.parametrize(
    ("content", "found"), [({"epoch": 3, "lr": 0.1}, "a mapping with epoch, lr"), ([torch.ones(2)], "list"), ({}, "mapping")]
)
def test_a_file_without_weights(tmp_path, target, content, found):
    torch.save(content, tmp_path / "w.pt")
    refuse(target, tmp_path / "w.pt", f"holds no weights: .*under state_dict, model.*found .*{found}")


def test_a_missing_file_and_a_directory(tmp_path, target):
    refuse(target, tmp_path / "none.pt", "There is no checkpoint .*none.pt")
    refuse(target, tmp_path, "is a directory")


@pytest.mark.data
def test_the_public_checkpoints(data_root):
    folder = data_root / "checkpoints"
    for name, file in (("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")):
        model = build(name)
        load_checkpoint(model, folder / file)
        published = torch.load(folder / file, map_location="cpu", weights_only=True)["state_dict"]
        assert torch.equal(model.linear.weight, published["module.linear.weight"])
    refuse(build("resnet20"), folder / "resnet56-4bfd9763.th", "180 unexpected: layer1.3.conv1.weight.*: resnet56[.]")
    refuse(build("resnet56"), folder / "resnet20-12fca82f.th", "180 missing: layer1.3.conv1.weight.*: resnet20[.]")
