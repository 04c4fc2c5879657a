"""Ways to execute one dense model, all with the same outputs: the honest baselines of every speed-up."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.running import first_line, folded_twin, run, undisturbed
from microglia.runtime.dense.kinds import ExecutionKind, Runner, built, execution_kind, execution_names, register_execution
from microglia.runtime.dense.packing import pack

Execution = Callable[[], object]
"""One forward pass over the example inputs; returns the model's output."""

_fresh_names = itertools.count()


def executions(
    model: nn.Module,
    example_inputs: Any,
    kinds: str | Sequence[str] = "torch",
    *,
    notes: list[str] | None = None,
) -> dict[str, Execution]:
    """Prepares ways to run a model, each on a folded copy in evaluation mode and without gradients.

    - ``eager``: PyTorch as it comes.
    - ``eager-channels-last``: the same with weights and images in the channels-last memory format.
    - ``packed``: oneDNN operators with pre-packed weights and fused batch norms, activations and residual additions, on
      the CPU in float32; needs no compiler and is ready in a second or two.
    - ``compiled``: ``torch.compile`` with frozen weights; needs a C++ compiler on the CPU, Triton on a GPU, and takes
      from seconds (when its cache has seen the model) to minutes.
    - ``onnxruntime`` and ``openvino``: the model converted for another engine on the CPU, with as many threads as PyTorch;
      seconds to tens of seconds. Each needs its package.
    - ``openvino-int8``: weights and activations rounded to 8 bits, calibrated on the example alone. Good for its time, not
      for its predictions: `microglia.export` calibrates on data and says the accuracy.

    Each is run once and compared with ``eager``; one that cannot be prepared here or whose outputs differ by more than
    1e-4 of the largest (2e-2 in half precision, 5e-3 on a GPU that is set to multiply in TF32) is left out.

    Args:
        model: Any module, masked or folded; stays bit for bit as it is.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments. The executions work on copies.
        kinds: Which ones: names, or ``torch`` for the first four, or ``all`` for every exact one that is installed.
        notes: A list to which the reason for each one left out is added.

    Returns:
        Name -> a function without arguments that runs the model once.

    Raises:
        UnknownNameError: A kind of another name.
        MicrogliaError: The model does not run on these inputs.
    """
    example = Example.of(example_inputs).copied()
    images = example.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t)
    ready = runners(model, example, kinds, notes=notes)
    return {kind: bind(runner, images if kind == "eager-channels-last" else example) for kind, runner in ready.items()}


def runners(
    model: nn.Module, example: Example, kinds: str | Sequence[str], *, notes: list[str] | None = None
) -> dict[str, Runner]:
    """Prepares the same executions as `executions`, to be called with any inputs of the example's shapes.

    Raises:
        UnknownNameError: A kind of another name.
        MicrogliaError: The model does not run on these inputs.
    """
    names = execution_names(kinds)
    folded = folded_twin(model)
    ready: dict[str, Runner] = {}
    with undisturbed():
        expected = run(folded, example.copied())
        for kind in names:
            try:
                runner = built(kind, folded, example)
                problem = difference(expected, bind(runner, example.copied())(), execution_kind(kind).tolerance)
            except Exception as error:
                problem = first_line(error)
            if problem is None:
                ready[kind] = runner
            elif notes is not None:
                notes.append(f"{kind} was left out: {problem}")
    return ready


def bind(runner: Runner, example: Example) -> Execution:
    """Returns a function without arguments that calls a runner with the example, without gradients."""

    def execute() -> object:
        with torch.no_grad():
            return runner(*example.args, **example.kwargs)

    return execute


def _eager(model: nn.Module, example: Example) -> Runner:
    return model


def _eager_channels_last(model: nn.Module, example: Example) -> Runner:
    if not any(tensor.ndim == 4 for tensor in example.tensors):
        raise MicrogliaError("no example input is an image batch (four dimensions).")
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise MicrogliaError("the model has no 2-d convolution.")
    converted: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return converted


def _packed(model: nn.Module, example: Example) -> Runner:
    if any(tensor.device.type != "cpu" for tensor in example.tensors):
        raise MicrogliaError("oneDNN runs on the CPU.")
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise MicrogliaError("this build of PyTorch has no oneDNN.")
    return pack(model, example)


def _compiled(model: nn.Module, example: Example) -> Runner:
    def call(*args: Any, **kwargs: Any) -> object:
        return model(*args, **kwargs)

    # The compiler files its work under the code object, and gives up on one after a few models. A code object of its
    # own for each execution keeps dozens apart, and the look-up short.
    code = call.__code__.replace(co_name=f"execution_{next(_fresh_names)}")
    own = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    compiled: Runner = torch.compile(own, dynamic=False, options={"freezing": True})
    return compiled


register_execution("eager", ExecutionKind(_eager))
register_execution("eager-channels-last", ExecutionKind(_eager_channels_last))
register_execution("packed", ExecutionKind(_packed))
register_execution("compiled", ExecutionKind(_compiled))


def _rounded(tensor: Tensor) -> bool:
    """Tells whether PyTorch is set to multiply float32 with 10 bits (TF32) where this tensor is."""
    return tensor.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)


def difference(expected: object, actual: object, tolerance: float | None = None) -> str | None:
    """Returns what is different about two outputs, None when they agree.

    Args:
        expected: Tensors in any structure.
        actual: The same of another execution.
        tolerance: How far apart they may be, against the largest; 1e-4 by default, 2e-2 where half precision is expected.
    """
    left = [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]
    right = [leaf for leaf in tree_leaves(actual) if isinstance(leaf, Tensor)]
    if not left:
        return "the model returns no tensors that could be compared."
    if [tensor.shape for tensor in left] != [tensor.shape for tensor in right]:
        return "its outputs have other shapes than the model's."
    for wanted, got in zip(left, right, strict=True):
        usual = 2e-2 if wanted.dtype in (torch.float16, torch.bfloat16) else 5e-3 if _rounded(wanted) else 1e-4
        one, other = wanted.detach().double(), got.detach().double()
        scale = float(one[one.isfinite()].abs().max()) if bool(one.isfinite().any()) else 0.0
        if not torch.allclose(one, other, rtol=0.0, atol=(usual if tolerance is None else tolerance) * scale, equal_nan=True):
            return f"its outputs differ from the model's by up to {float((one - other).abs().max()):.3g}."
    return None
