"""Sessions: a converted model in its engine, called like the PyTorch model that it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from numpy.typing import NDArray
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from microglia.core.batch import tensors_of

if TYPE_CHECKING:
    import openvino

Array = NDArray[Any]
Infer = Callable[[Sequence[Array]], Sequence[Array]]
"""Input arrays, in the order of the model's tensors -> output arrays of their own memory, in the same way."""


class Session:
    """A converted model that takes and gives what the PyTorch model does, on the CPU and without gradients.

    Args:
        infer: Runs the engine.
        outputs: What the PyTorch model returned once, for its structure; None for one tensor, or a list of several.
        again: Returns another ``infer`` on the same weights, for a copy; None where one may be shared.
    """

    def __init__(self, infer: Infer, outputs: Any = None, again: Callable[[], Infer] | None = None) -> None:
        self._infer, self._again = infer, again
        self._structure: TreeSpec | None = None if outputs is None else tree_flatten(outputs)[1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the outputs as tensors."""
        given = [tensor.detach().contiguous().numpy() for tensor in tensors_of((args, kwargs))]
        tensors = [torch.from_numpy(array) for array in self._infer(given)]
        if self._structure is not None and self._structure.num_leaves == len(tensors):
            return tree_unflatten(tensors, self._structure)
        return tensors[0] if len(tensors) == 1 else tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a session of its own on the same weights, which no session changes."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        if self._again is not None:
            copied._infer = self._again()
        memo[id(self)] = copied
        return copied


def openvino_session(model: openvino.Model, outputs: Any = None, *, threads: int | None = None) -> Session:
    """Returns a session of OpenVINO on the CPU, in float32 where the model is.

    Args:
        model: Converted; its quantized layers compute in 8 bits.
        outputs: See `Session`.
        threads: By default as many as PyTorch has.
    """
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # without it, processors with bfloat16 round a float32 model
        "PERFORMANCE_HINT": "LATENCY",
    }
    return compiled_session(openvino.Core().compile_model(model, "CPU", settings), outputs)


def compiled_session(compiled: Any, outputs: Any = None) -> Session:
    """Returns a session on a model that OpenVINO has compiled."""

    def again() -> Infer:
        request = compiled.create_infer_request()
        places = range(len(compiled.outputs))

        def infer(arrays: Sequence[Array]) -> Sequence[Array]:
            results = request.infer(list(arrays), share_inputs=True)
            return [results[place].copy() for place in places]

        return infer

    return Session(again(), outputs, again)


def onnxruntime_session(model: Any, outputs: Any = None, *, threads: int | None = None) -> Session:
    """Returns a session of ONNX Runtime on the CPU.

    Args:
        model: Path of a file, or its bytes.
        outputs: See `Session`.
        threads: By default as many as PyTorch has.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # warnings of its own optimizer are nobody's here
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return Session(lambda arrays: session.run(None, dict(zip(names, arrays, strict=True))), outputs)
