"""Serve an exported model over HTTP: requests that arrive together run as one batch.

    python examples/serve/app.py model.onnx --port 8000 --max-batch 16 --max-wait-ms 2

``POST /predict`` takes ``{"inputs": [...]}``, one or more examples, and answers ``{"outputs": [...]}``. ``GET /health`` answers
503 until the model is loaded and warm, then 200. ``GET /metrics`` counts requests, examples and batches for Prometheus.
It needs fastapi and uvicorn, and onnxruntime for a ``.onnx`` file or openvino for a ``.xml`` one.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Engine:
    """A loaded model.

    Attributes:
        run: (batch, *shape) -> the first output, (batch, ...).
        shape: Of one example; None for a size that is free.
        dtype: Of the input.
        batch: The only size of batches that it takes; None for any.
    """

    run: Callable[[Array], Array]
    shape: tuple[int | None, ...]
    dtype: npt.DTypeLike
    batch: int | None


def load(path: Path, threads: int) -> Engine:
    """Returns the engine of an ONNX file or an OpenVINO IR with one input."""
    if path.suffix == ".xml":
        import openvino

        # Without the hint, processors with bfloat16 round a float32 model.
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        port = compiled.input()
        sizes = [None if size.is_dynamic else size.get_length() for size in port.partial_shape]
        return Engine(lambda x: compiled(x)[0].copy(), tuple(sizes[1:]), port.element_type.to_dtype(), sizes[0])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (only,) = session.get_inputs()
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}[only.type]
    sizes = [size if isinstance(size, int) else None for size in only.shape]
    return Engine(lambda x: session.run(None, {only.name: x})[0], tuple(sizes[1:]), dtype, sizes[0])


@dataclass
class Server:
    """One worker that takes requests from a queue and joins those of one shape into batches."""

    path: Path
    max_batch: int = 16
    max_wait: float = 0.002
    threads: int = 1
    warm_seconds: float = 1.0
    engine: Engine | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("requests", "examples", "batches", "largest"), 0))
    queue: asyncio.Queue[tuple[Array, asyncio.Future[Array]]] = field(default_factory=lambda: asyncio.Queue(1024))

    async def work(self) -> None:
        """Loads the model, runs it until it is warm, then serves for ever."""
        engine = await asyncio.to_thread(load, self.path, self.threads)
        self.max_batch = engine.batch or self.max_batch
        await asyncio.to_thread(self._warm, engine)
        self.engine = engine
        waiting: tuple[Array, asyncio.Future[Array]] | None = None
        while True:
            first = waiting or await self.queue.get()
            batch, waiting = await self._collect(first)
            await self._answer(engine, batch)

    def _warm(self, engine: Engine) -> None:
        """The first calls allocate memory and are slow; nobody shall wait for them."""
        end = time.monotonic() + self.warm_seconds
        sizes = [engine.batch] if engine.batch else [1, self.max_batch]
        while True:
            for size in sizes:
                engine.run(np.zeros((size, *(side or 1 for side in engine.shape)), engine.dtype))
            if time.monotonic() >= end:
                return

    async def _collect(self, first: Any) -> tuple[list[Any], Any]:
        """Returns a batch, and the request that no longer fitted into it, or None."""
        batch, size, end = [first], len(first[0]), time.monotonic() + self.max_wait
        while size < self.max_batch:
            try:
                item = await asyncio.wait_for(self.queue.get(), end - time.monotonic())
            except TimeoutError:
                break
            if size + len(item[0]) > self.max_batch or item[0].shape[1:] != first[0].shape[1:]:
                return batch, item
            batch.append(item)
            size += len(item[0])
        return batch, None

    async def _answer(self, engine: Engine, batch: list[Any]) -> None:
        inputs = np.concatenate([x for x, _ in batch])
        try:
            outputs = await asyncio.to_thread(engine.run, inputs)
        except Exception as error:  # whatever the engine raises: these requests fail, the server goes on
            for _, future in batch:
                if not future.done():
                    future.set_exception(RuntimeError(f"The model failed: {error}"))
            return
        self.counts["batches"] += 1
        self.counts["examples"] += len(inputs)
        self.counts["largest"] = max(self.counts["largest"], len(inputs))
        ends = np.cumsum([len(x) for x, _ in batch])[:-1]
        for (_, future), part in zip(batch, np.split(outputs, ends), strict=True):
            if not future.done():  # the client may have gone
                future.set_result(part)

    async def predict(self, inputs: list[Any]) -> Array:
        """Returns the outputs of some examples, or the HTTP error that says what is wrong with them."""
        if self.engine is None:
            raise HTTPException(503, "The model is warming up; ask /health.")
        wanted, dtype = self.engine.shape, self.engine.dtype
        try:
            x = np.asarray(inputs, dtype)
        except (TypeError, ValueError, OverflowError):
            raise HTTPException(422, f"The inputs are examples of the shape {wanted}, lists of numbers alone.") from None
        fits = x.ndim == len(wanted) + 1 and all(side in (None, given) for side, given in zip(wanted, x.shape[1:], strict=True))
        if not fits:
            raise HTTPException(422, f"Each example has the shape {wanted}; got {x.shape[1:]}.")
        if not 1 <= len(x) <= self.max_batch or len(x) % (self.engine.batch or 1):
            only = "exactly" if self.engine.batch else "1 to"
            raise HTTPException(422, f"A request has {only} {self.max_batch} examples; got {len(x)}.")
        future: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((x, future))
        except asyncio.QueueFull:
            raise HTTPException(503, "Too many requests wait; try again later.") from None
        self.counts["requests"] += 1
        try:
            return await future
        except RuntimeError as error:
            raise HTTPException(500, str(error)) from error


class Request(BaseModel):
    """The body of ``/predict``."""

    inputs: list[Any]


def create_app(server: Server) -> FastAPI:
    """Returns the application around one server."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(server.work())
        app.state.worker = worker
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(title=server.path.name, lifespan=lifespan)

    @app.get("/health")
    async def health() -> JSONResponse:
        worker = app.state.worker
        if worker.done():  # it ends by an error alone
            return JSONResponse({"status": f"failed: {worker.exception()}"}, 500)
        ready = server.engine is not None
        return JSONResponse({"status": "ready" if ready else "warming up"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        lines = [f"serve_{name}_total {server.counts[name]}" for name in ("requests", "examples", "batches")]
        return PlainTextResponse("\n".join([*lines, f"serve_largest_batch {server.counts['largest']}"]) + "\n")

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        return {"outputs": (await server.predict(request.inputs)).tolist()}

    return app


def main() -> None:
    """Serves the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported .onnx file, or the .xml of an OpenVINO IR")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=16, help="examples in a batch, at most")
    parser.add_argument("--max-wait-ms", type=float, default=2.0, help="longest wait for a fuller batch")
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine")
    parser.add_argument("--warm-seconds", type=float, default=1.0, help="how long to run before the server is ready")
    given = parser.parse_args()
    if not given.model.is_file():
        parser.error(f"there is no file {given.model}")
    server = Server(given.model, given.max_batch, given.max_wait_ms / 1000, given.threads, given.warm_seconds)
    uvicorn.run(create_app(server), host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
