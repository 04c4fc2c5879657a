"""Int8 by NNCF: calibrated on real inputs, held against float32, within a limit that is kept or refused."""

import json

import pytest
import torch
from torch import nn

from microglia.core.errors import MicrogliaError
from microglia.export import Int8, Int8Report, export, open_openvino, to_openvino
from microglia.export.int8 import accuracy, float_layers, is_transformer, quantize, quantizers


@pytest.fixture(scope="module", autouse=True)
def engines():
    """What these tests need, imported when they run: not in every process that collects them."""
    for name in ("openvino", "nncf"):
        pytest.importorskip(name)


def trained():
    """A small network with labels that are its own predictions, so that its accuracy is 1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    images = torch.randn(64, 3, 12, 12)
    with torch.no_grad():
        return model, images, model(images).argmax(1)


@pytest.fixture(scope="module")
def given():
    model, images, labels = trained()
    return model, images, labels, to_openvino(model, images[:1])


def test_quantized_calibrated_and_compared(given):
    model, images, labels, converted = given
    before = len(converted.get_ops())
    loader = [(images[:16], labels[:16]), (images[16:32], labels[16:32])]
    evaluation = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]
    small, report = quantize(converted, Int8(loader, count=20, evaluation=evaluation, max_drop=0.2))
    assert len(converted.get_ops()) == before
    assert report.calibrated == 20
    assert report.scores[0] == 1.0
    assert report.scores[1] == report.agreement[0] / report.agreement[1] > 0.8
    assert report.agreement[1] == 64
    assert report.drop == pytest.approx(1 - report.scores[1])
    assert not report.restored
    assert report.kept_float == () == float_layers(small)
    assert len(float_layers(converted)) == 3
    with torch.no_grad():
        expected = model(images)
    assert not torch.equal(open_openvino(small)(images), expected)  # it was rounded
    torch.testing.assert_close(open_openvino(small)(images), expected, rtol=0, atol=0.1 * float(expected.abs().max()))


def test_the_same_calibration_gives_the_same_bits(given):
    _, images, _, converted = given
    outputs = [open_openvino(quantize(converted, Int8([images[:8]]))[0])(images) for _ in range(2)]
    assert torch.equal(*outputs)


def test_batches_of_a_fixed_size_are_kept(given):
    model, images, _, _ = given
    converted = to_openvino(model, images[:4], dynamic=())
    small, report = quantize(converted, Int8([images[:10]], count=100))
    assert report.calibrated == 8
    assert open_openvino(small)(images[:4]).shape == (4, 10)


def test_where_the_limit_does_not_hold_layers_go_back_to_float32(given):
    _, images, labels, converted = given
    scores = iter([1.0, 0.5])  # float32 and int8; then what accuracy is

    def score(pairs):
        pairs = list(pairs)
        return next(scores, None) or accuracy(pairs)

    evaluation = [(images[:32], labels[:32])]
    _, report = quantize(converted, Int8([images[:8]], evaluation=evaluation, score=score, max_drop=0.4))
    assert report.restored
    assert report.drop <= 0.4


def test_a_limit_that_nothing_holds_is_refused(given):
    _, images, labels, converted = given
    worse = iter(range(1000, 0, -1))  # every evaluation is worse than the one before
    wish = Int8([images[:4]], evaluation=[(images[:8], labels[:8])], score=lambda pairs: float(next(worse)), max_drop=0.001)
    with pytest.raises(MicrogliaError, match="max_drop"):
        quantize(converted, wish)


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        ([], "calibration set is empty"),
        ([torch.zeros(0, 3, 12, 12)], "calibration set is empty"),
        ([torch.zeros(4, 1, 12, 12)], r"shape \(1, 1, 12, 12\).*the model takes"),
        ([torch.zeros(4, 3, 20, 12)], "the model takes"),
        ([(torch.zeros(4, 3, 12, 12),) * 3], "gives 3 tensors at a time, but the model takes 1"),
        ([3.0], "gives 0 tensors"),
        (True, "such as a loader, not True"),
        (torch.zeros(0, 3, 12, 12), "calibration set is empty"),
    ],
)
def test_wrong_calibration_sets_are_refused_in_a_sentence(given, calibration, text):
    _, _, _, converted = given
    with pytest.raises(MicrogliaError, match=text):
        quantize(converted, Int8(calibration))


def test_empty_evaluation_data_are_refused(given):
    _, images, _, converted = given
    with pytest.raises(MicrogliaError, match="evaluation data are empty"):
        quantize(converted, Int8([images[:2]], evaluation=[]))


def test_without_nncf_the_extra_is_named(given, monkeypatch):
    _, images, _, converted = given
    monkeypatch.setattr("microglia.core.optional.find_spec", lambda name: None)
    with pytest.raises(MicrogliaError, match=r"nncf.*pip install 'microglia\[export\]'"):
        quantize(converted, Int8([images[:2]]))


def test_attention_is_known_and_quantized():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    tokens = torch.randn(4, 6, 16)
    converted = to_openvino(layer, tokens[:1])
    assert is_transformer(converted)
    small, _ = quantize(converted, Int8([tokens]))
    assert open_openvino(small)(tokens).shape == (4, 6, 16)


def test_an_exported_file_in_int8_is_smaller_verified_and_told(given, tmp_path):
    model, images, labels, _ = given
    plain = export(model, tmp_path / "plain.xml", images[:1])
    loader = [(images[:16], labels[:16])]
    wish = Int8(loader, evaluation=[(images, labels)], max_drop=0.3)
    written = export(model, tmp_path / "small.xml", images[:1], int8=wish, data=iter([images[:4]]))
    assert written.int8.calibrated == 16
    assert written.int8.agreement[1] == 64
    assert plain.difference < 1e-4 < written.difference
    assert written.examples == plain.examples + 4
    assert written.to_dict()["int8"]["drop"] == written.int8.drop
    assert json.dumps(written.to_dict()["int8"])
    assert plain.to_dict()["int8"] is None
    assert (tmp_path / "small.bin").stat().st_size < (tmp_path / "plain.bin").stat().st_size
    assert {file.name for file in tmp_path.iterdir()} == {"plain.xml", "plain.bin", "small.xml", "small.bin"}
    with torch.no_grad():
        wanted = model(images)
    torch.testing.assert_close(written.open()(images), wanted, rtol=0, atol=0.1 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("name", "wish", "text"),
    [
        ("a.onnx", [torch.zeros(2, 3, 12, 12)], "no export target with int8 named 'onnx'"),
        ("a.xml", [], "calibration set is empty"),
        ("a.xml", [torch.zeros(2, 1, 12, 12)], "the model takes"),
    ],
)
def test_an_export_that_cannot_be_quantized_leaves_nothing(given, tmp_path, name, wish, text):
    with pytest.raises(MicrogliaError, match=text):
        export(given[0], tmp_path / name, given[1][:1], int8=wish)
    assert not list(tmp_path.iterdir())


def test_a_target_of_ones_own_has_int8_where_it_registers_it(given, tmp_path, monkeypatch):
    model, images, _, _ = given
    monkeypatch.setattr(quantizers, "_items", dict(quantizers._items))
    asked = []

    @quantizers.add("onnx")
    def quantize_toy(path, wish, structure):
        asked.append((path.name, wish.count))
        return Int8Report(calibrated=7)

    written = export(model, tmp_path / "a.onnx", images[:1], int8=[images[:7]])
    assert asked == [("a.onnx", 300)]
    assert written.int8 == Int8Report(calibrated=7)
