"""Other engines for the same dense network: ONNX Runtime and OpenVINO, where they are installed."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Call = Callable[[], object]


def engines(model: nn.Module, x: Tensor, threads: int) -> dict[str, Call]:
    """Returns the engines at hand, each with the same outputs on ``x``, bound to it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), file, dynamo=True, external_data=False, verbose=False)
        calls = {"ONNX Runtime": onnx_runtime(file, x, threads)}
        if importlib.util.find_spec("openvino") is not None:
            calls["OpenVINO"] = openvino(file, x, threads)
    with torch.no_grad():
        expected = model(x)
    for name, call in calls.items():
        torch.testing.assert_close(torch.as_tensor(call()), expected, rtol=1e-3, atol=1e-3, msg=f"{name} differs")
    return calls


def onnx_runtime(file: Path, x: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)[0]


def openvino(file: Path, x: Tensor, threads: int) -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(str(file), "CPU", settings).create_infer_request()
    given = x.numpy()
    return lambda: request.infer({0: given})[0]
