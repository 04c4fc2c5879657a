"""examples/serve as a real process under real concurrent requests."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

APP = Path(__file__).parents[2] / "examples" / "serve" / "app.py"
LIMIT = 90
"""Seconds after which a server counts as hanging."""
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The model as ONNX with a free batch, and as OpenVINO IR."""
    folder = tmp_path_factory.mktemp("files")
    free = ({0: torch.export.Dim("batch")},)
    x = torch.zeros(2, 1, 8, 8)
    torch.onnx.export(model, (x,), folder / "net.onnx", dynamo=True, verbose=False, dynamic_shapes=free, external_data=False)
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.convert_model(folder / "net.onnx"), folder / "net.xml", compress_to_fp16=False)
    return folder


class Served:
    """A server process on a free port."""

    def __init__(self, path, *words):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, APP, path, "--port", self.port, *words]
        self.process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def ask(self, path, body=None):
        """Returns status and answer; None while nobody listens."""
        data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"} if data else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except urllib.error.URLError:
            return None, ""

    def statuses(self):
        """Returns the answers of /health until it is ready, each once."""
        seen, end = [], time.monotonic() + LIMIT
        while time.monotonic() < end:
            assert self.process.poll() is None, self.process.stdout.read().decode()
            status, text = self.ask("/health")
            if status is not None and (status, text) not in seen:
                seen.append((status, text))
            if status == 200:
                return seen
            time.sleep(0.02)
        raise AssertionError(f"not ready: {seen}")

    def metrics(self):
        return {line.split()[0]: int(line.split()[1]) for line in self.ask("/metrics")[1].splitlines()}

    def stop(self):
        self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture(scope="module", params=["net.onnx", "net.xml"])
def served(request, files):
    one = Served(files / request.param, "--max-batch", 8, "--max-wait-ms", 1000, "--warm-seconds", 0.1)
    try:
        one.statuses()
        yield one
    finally:
        status = one.stop()
    assert status in (0, -15)  # ended at once, and not by force


def test_concurrent_requests_are_answered_right_and_in_batches(served, model):
    x = torch.randn(24, 1, 8, 8)
    before = served.metrics()
    with ThreadPoolExecutor(12) as pool:
        parts = [x[n : n + 2] for n in range(0, 24, 2)]
        answers = list(pool.map(lambda part: served.ask("/predict", {"inputs": part.tolist()}), parts))
    assert [status for status, _ in answers] == [200] * 12
    outputs = torch.cat([torch.tensor(json.loads(text)["outputs"]) for _, text in answers])
    assert torch.allclose(outputs, model(x).detach(), atol=1e-3, rtol=1e-3)
    after = served.metrics()
    gained = {name: after[name] - before[name] for name in before}
    assert gained["serve_requests_total"] == 12
    assert gained["serve_examples_total"] == 24
    assert 3 <= gained["serve_batches_total"] < 12
    assert 2 < after["serve_largest_batch"] <= 8


def test_one_request_alone_does_not_wait_for_others_for_ever(served, model):
    x = torch.randn(1, 1, 8, 8)
    status, text = served.ask("/predict", {"inputs": x.tolist()})
    assert status == 200
    assert torch.allclose(torch.tensor(json.loads(text)["outputs"]), model(x).detach(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (torch.zeros(1, 1, 8, 7).tolist(), "Each example has the shape (1, 8, 8); got (1, 8, 7)."),
        (torch.zeros(8, 8).tolist(), "Each example has the shape (1, 8, 8); got (8,)."),
        (torch.zeros(9, 1, 8, 8).tolist(), "A request has 1 to 8 examples; got 9."),
        ([[[1.0], [1.0, 2.0]]], "lists of numbers alone"),
        (["a picture"], "lists of numbers alone"),
        ([], "Each example has the shape (1, 8, 8); got ()."),
    ],
)
def test_wrong_inputs_are_refused_in_a_sentence_and_the_server_goes_on(served, inputs, sentence):
    status, text = served.ask("/predict", {"inputs": inputs})
    assert status == 422
    assert sentence in json.loads(text)["detail"]
    assert served.ask("/health")[0] == 200


@pytest.mark.parametrize("body", [b"no JSON", b"{}", b'{"inputs": 3}'])
def test_wrong_bodies_are_refused(served, body):
    assert served.ask("/predict", body)[0] == 422


def test_ready_only_after_the_warm_up(files):
    one = Served(files / "net.onnx", "--warm-seconds", 4)
    try:
        early, end = (None, ""), time.monotonic() + LIMIT
        while early[0] is None and time.monotonic() < end:
            early = one.ask("/predict", {"inputs": [[[0.0] * 8] * 8]})
        assert early[0] == 503
        assert "warming up" in early[1]
        assert one.statuses() == [(503, '{"status":"warming up"}'), (200, '{"status":"ready"}')]
        assert one.ask("/predict", {"inputs": torch.zeros(1, 1, 8, 8).tolist()})[0] == 200
    finally:
        one.stop()


def test_a_file_that_is_no_model_says_so(tmp_path):
    (tmp_path / "bad.onnx").write_text("no model")
    one = Served(tmp_path / "bad.onnx")
    try:
        end, status, text = time.monotonic() + LIMIT, None, ""
        while status in (None, 503) and time.monotonic() < end:
            status, text = one.ask("/health")
            time.sleep(0.02)
        assert status == 500
        assert "bad.onnx failed" in text
    finally:
        one.stop()
    missing = Served(tmp_path / "none.onnx")
    assert missing.process.wait(LIMIT) == 2
    assert b"there is no file" in missing.process.stdout.read()
    missing.process.stdout.close()
