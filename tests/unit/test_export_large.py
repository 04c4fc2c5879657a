"""A model over the limit of one ONNX file: weights beside it, equal outputs, and what stands in its place afterwards."""

import pytest
import torch
from torch import nn

from microglia.export import export

LIMITS = "torch.onnx._internal.exporter._onnx_program"


@pytest.fixture(scope="module", autouse=True)
def engines():
    """What these tests need, imported when they run: not in every process that collects them."""
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)


def test_above_the_limit_the_weights_lie_beside_the_file(tmp_path, monkeypatch):
    program = pytest.importorskip(LIMITS)
    monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", 4 * 64 * 64)
    torch.manual_seed(0)
    x, path = torch.randn(1, 64), tmp_path / "model.onnx"
    small, large = nn.Linear(64, 63), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    written = export(small, path, x)
    assert written.files == (path,)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx"]

    written = export(large, path, x)
    assert sorted(file.name for file in written.files) == ["model.onnx", "model.onnx.data"]
    assert written.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert path.stat().st_size < 4 * 64 * 64 < written.bytes
    with torch.no_grad():
        torch.testing.assert_close(written.open()(x), large(x))

    (tmp_path / "moved").mkdir()  # the file finds its weights by a relative name
    for file in written.files:
        file.rename(tmp_path / "moved" / file.name)
    from microglia.export import open_onnx

    with torch.no_grad():
        torch.testing.assert_close(open_onnx(tmp_path / "moved" / "model.onnx")(x), large(x))
