"""Refusals: errors for models that cannot be cut, each with an alternative."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from microglia.core.errors import MicrogliaError


class TraceError(MicrogliaError):
    """The model cannot be traced; the text gives the reason of torch.export."""


_HOMES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))

_DRAW = (
    "rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "bernoulli", "multinomial", "normal",
    "uniform", "exponential", "poisson", "binomial", "geometric", "cauchy", "log_normal", "random",
)  # fmt: skip
"""Operators that draw new values in each call."""

_TOLD = {
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), ("p", "train")),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), ("dropout", "train")),
    "rrelu": ("training",),
    "scaled_dot_product_attention": ("dropout_p",),
}
"""Operators that are random if all of these arguments are set."""


def refuse_kinds(model: nn.Module) -> None:
    """Raises if a model is of a kind that cannot be traced or cut: scripted, quantized, not yet initialized."""
    name = type(model).__name__
    for path, module in model.named_modules():
        where = f"{name} is" if not path else f"{path} of {name} is"
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{where} a module of TorchScript, whose code cannot be traced: give the model from which it was scripted or "
                "traced, and script what comes back."
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise TraceError(f"{where} a {type(module).__name__} whose sizes are not known yet: run the model once first.")
        if _quantized(module):
            raise TraceError(
                f"{where} quantized ({type(module).__name__}): prune the model first, then quantize what comes back."
            )


def _quantized(module: nn.Module) -> bool:
    home = type(module).__module__
    if home.startswith(("torch.ao.nn.", "torch.nn.quantized.")) and "quantized" in home and ".qat." not in home:
        return True
    held = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and (t.is_quantized or type(t).__module__.startswith("torchao.")) for t in held)


# ------------------------------------------------------------------------------------------------------- random forwards
def refuse_random(graph: fx.Graph, model: nn.Module, *, drawn: bool = False) -> None:
    """Raises if a model's outputs in evaluation mode are random, so that no cut of it can be verified.

    Args:
        graph: The model's trace in evaluation mode.
        model: The traced model.
        drawn: Whether its code drew from the generators of Python or NumPy, which a graph does not show.
    """
    found = next((_described(node) for node in _reaching(graph) if is_random(node)), None)
    if found is None and not drawn:
        return
    raise TraceError(
        f"The forward of {type(model).__name__} is random in evaluation mode, by {found or 'numbers of Python or NumPy'}: two "
        "passes differ, so that no smaller model can be compared with it: let it draw only while self.training is set."
    )


def is_random(node: fx.Node) -> bool:
    """Tells whether an operator draws random numbers with these arguments."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name, arguments = node.target._schema.name.split("::")[1].rstrip("_"), node.target._schema.arguments
    if name in _DRAW:
        return True
    given = {a.name: a.default_value if a.has_default_value() else None for a in arguments}
    given.update({a.name: v for a, v in zip(arguments, node.args, strict=False)}, **node.kwargs)
    return name in _TOLD and all(given.get(argument) for argument in _TOLD[name])


def _reaching(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yields the operators on which an output depends."""
    needed = {n for n in graph.nodes if n.op == "output"}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
            if node.op == "call_function":
                yield node


def _described(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    where = f" in {stack[-1][0]}" if stack and stack[-1][0] else ""
    return f"{str(node.target).split('.')[1].rstrip('_')}{where}"


# ------------------------------------------------------------------------------------------------------------ where it is
def place_of(error: BaseException) -> str:
    """Returns the position of an error in a model's own code: class, function, file, line and its text; else empty."""
    frames = [(f, line) for f, line in _frames(error.__traceback__) if not f.f_code.co_filename.startswith((*_HOMES, "<"))]
    within = [i for i, (frame, _) in enumerate(frames) if _module(frame) is not None]
    if not within:
        return ""
    frame, line = frames[-1]
    owner, function = _module(frames[within[-1]][0]), frame.f_code.co_name
    file = frame.f_code.co_filename
    name = f"{type(owner).__name__}.{function}" if _module(frame) is not None else f"{function} in {type(owner).__name__}"
    text = linecache.getline(file, line).strip()
    return f"{name}, {file}, line {line}" + (f": `{text[:100]}`" if text else "")


def _frames(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _module(frame: FrameType) -> nn.Module | None:
    owner: Any = frame.f_locals.get("self")
    return owner if isinstance(owner, nn.Module) else None
