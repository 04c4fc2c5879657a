"""YOLOv5: golden counts, the traps of its table, sizes, and a user's own file read without its code."""

import io
import pickle
import sys
import types
import zipfile

import pytest
import torch
from torch import nn

from microglia.core.errors import CheckpointError, MicrogliaError
from microglia.tasks.kinds import kind_of_model
from microglia.zoo import ModelError, build, load_checkpoint, model_names
from microglia.zoo.yolo_checkpoint import is_pickled_model, load_yolov5, read_yolov5
from microglia.zoo.yolov5 import SCALES, STRIDES

COUNTS = {  # size -> parameters with 80 and with 3 classes
    "n": (1_872_157, 1_767_976),
    "s": (7_235_389, 7_027_720),
    "m": (21_190_557, 20_879_400),
    "l": (46_563_709, 46_149_064),
    "x": (86_749_405, 86_231_272),
}


@pytest.mark.parametrize("size", COUNTS)
def test_parameters_are_those_published(size):
    for classes, expected in zip((80, 3), COUNTS[size], strict=True):
        with torch.device("meta"):
            model = build(f"yolov5{size}", classes=classes, shape=(3, 64, 64))
        assert sum(p.numel() for p in model.parameters()) == expected


def test_operations_are_those_measured():
    from microglia.measure import measure

    model = build("yolov5n", classes=80, shape=(3, 640, 640))
    assert measure(model, torch.zeros(1, 3, 640, 640), latency=False).macs.total == pytest.approx(2.234e9, rel=1e-3)


def test_widths_round_up_and_depths_to_nearest():
    with torch.device("meta"):
        middle = build("yolov5m", classes=3, shape=(3, 64, 64))
        large = build("yolov5x", classes=3, shape=(3, 64, 64))
        narrow = build("yolov5n", classes=3, shape=(3, 64, 64), width=0.2)
    assert [len(middle.model[k].m) for k in (2, 4, 6, 8)] == [2, 4, 6, 2]
    assert [len(large.model[k].m) for k in (2, 4, 6, 8)] == [4, 8, 12, 4]
    assert middle.model[0].conv.out_channels == 48
    assert narrow.model[0].conv.out_channels == 16  # 12.8 rounds up, not to 8


def test_norms_heads_and_activation():
    model = build("yolov5n", classes=3, shape=(3, 64, 64), activation="relu")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}
    assert not any(isinstance(m, nn.SiLU) for m in model.modules())
    assert any(isinstance(m, nn.SiLU) for m in build("yolov5n", classes=3, shape=(3, 64, 64)).modules())
    with torch.no_grad():
        maps = model.eval()(torch.zeros(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 3, 64 // s, 96 // s, 8) for s in STRIDES]
    biases = torch.stack([head.bias.detach().view(3, 8) for head in model.heads])
    assert float(biases[0, :, 4].mean()) == pytest.approx(-6.68, abs=0.3)  # ln(8 / 80^2)
    assert float(biases[:, :, 5:].mean()) == pytest.approx(-1.2, abs=0.15)  # ln(0.6 / 2)


def test_it_is_no_classifier():
    names = {f"yolov5{size}" for size in SCALES}
    assert names <= set(model_names(None))
    assert not names & set(model_names())
    assert model_names("detection") == sorted(names)
    assert [kind_of_model(name) for name in ("yolov5n", "resnet20", "timm:resnet18")] == ["detection", *["classification"] * 2]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shape": (3, 100, 64)}, "both sides are multiples of 32, such as 128x64"),
        ({"shape": (3, 16, 16)}, "too small"),
        ({"activation": "gelu"}, "silu or relu, not 'gelu'"),
        ({"width": 9}, r"a factor in \(0, 4\]"),
        ({"depth": 1}, "takes no option 'depth'"),
    ],
)
def test_wrong_input_is_one_sentence(options, told):
    with pytest.raises(ModelError, match=told):
        build("yolov5n", **{"classes": 3, "shape": (3, 64, 64), **options})


# --------------------------------------------------------------------------------------------------- a user's own file
@pytest.fixture
def foreign(monkeypatch):
    """The two modules that a public file names, as the user's machine has them."""
    found = {}
    for name in ("models", "models.yolo", "models.common"):
        found[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, found[name])

    def add(place, name):
        made = type(name, (nn.Module,), {"__module__": place})
        setattr(found[place], name, made)
        return made

    return {name: add(place, name) for place, name in
            [("models.yolo", "DetectionModel"), ("models.yolo", "Detect"), ("models.common", "Conv"), ("models.common", "C3"),
             ("models.common", "Concat")]}  # fmt: skip


def public(model, foreign, tmp_path, **entries):
    """Writes a model of ours in the layout of a public file: renamed classes, half precision, the last layer inside."""
    kinds = {"Unit": "Conv", "Join": "Concat"}

    def renamed(module):
        name = kinds.get(type(module).__name__, "C3")
        made = module if type(module).__module__.startswith("torch.nn") else foreign[name]()
        if made is not module:
            for key, parameter in module._parameters.items():
                made.register_parameter(key, parameter)
            for key, child in module._modules.items():
                made.add_module(key, renamed(child))
        else:
            for key, child in module._modules.items():
                module._modules[key] = renamed(child)
        return made

    head = foreign["Detect"]()
    head.m = model.heads
    head.register_buffer("anchors", model.anchors)
    head.register_buffer("stride", torch.tensor([8.0, 16.0, 32.0]))
    whole = foreign["DetectionModel"]()
    whole.model = nn.Sequential(*(renamed(layer) for layer in model.model), head)
    path = tmp_path / "yolov5n.pt"
    torch.save({"epoch": -1, "best_fitness": None, "model": whole.half(), "ema": None, "date": "2026-01-01", **entries}, path)
    return path


def made(classes=3, **options):
    torch.manual_seed(0)
    return build("yolov5n", classes=classes, shape=(3, 64, 64), width=0.05, **options)


def test_a_public_file_loads_without_its_code(foreign, tmp_path, monkeypatch):
    path = public(made(), foreign, tmp_path)
    for name in ("models", "models.yolo", "models.common"):
        monkeypatch.delitem(sys.modules, name)
    assert is_pickled_model(path)
    with pytest.raises(CheckpointError, match="holds a Python object"):
        load_checkpoint(made(), path)
    model = made()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_yolov5(model, path)
    for name, tensor in made().state_dict().items():
        wanted = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(model.state_dict()[name], wanted), name
    assert "models" not in sys.modules
    with pytest.raises(CheckpointError, match="does not fit"):
        load_yolov5(made(classes=5), path)
    other = made(classes=5)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    load_yolov5(other, path, head="fresh")
    assert torch.equal(other.heads[0].weight, before["heads.0.weight"])
    assert not torch.equal(other.model[0].conv.weight, before["model.0.conv.weight"])
    torch.save(made().state_dict(), tmp_path / "plain.pt")
    load_yolov5(made(), tmp_path / "plain.pt")


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_a_malicious_file_is_refused_and_does_not_run(foreign, tmp_path):
    mark = tmp_path / "ran"
    path = public(made(), foreign, tmp_path, opt=Bomb(mark))
    with pytest.raises(CheckpointError, match=r"names \w*io\.open, which is no module of YOLOv5"):
        read_yolov5(path)
    assert not mark.exists()


def test_other_files_are_refused_in_one_sentence(foreign, tmp_path):
    empty = foreign["DetectionModel"]()
    torch.save({"model": empty}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="holds no YOLOv5 of version 6 or 7"):
        read_yolov5(tmp_path / "empty.pt")
    round_about = foreign["C3"]()
    round_about._modules["x"] = round_about
    torch.save({"model": round_about}, tmp_path / "loop.pt")
    with pytest.raises(CheckpointError, match="nested deeper"):
        read_yolov5(tmp_path / "loop.pt")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"model": 1})[:-3])
    (tmp_path / "cut.pt").write_bytes(content.getvalue())
    for path in (tmp_path / "cut.pt", tmp_path / "none.pt"):
        with pytest.raises(MicrogliaError, match=r"\.pt"):
            load_yolov5(made(), path)
