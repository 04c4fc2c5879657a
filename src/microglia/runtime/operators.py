"""The sparse operators, ``torch.ops.microglia.*``: compiled kernels if they were built, else pure PyTorch.

This file defines the schemas, the shapes (for ``torch.compile`` and ``torch.export``) and a reference in pure PyTorch. The
compiled library, an optional part of the installation, adds the CPU implementation. If triton is installed,
`microglia.runtime.gpu.triton` adds the block operators on CUDA. ``MICROGLIA_ISA`` forces a level: ``torch`` (no compiled
kernels), ``generic``, ``avx2``, ``avx512``, ``avx512vnni``, ``avx512bf16`` or ``amx``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from microglia.core.errors import MicrogliaError
from microglia.core.native import compiled
from microglia.runtime.sparse_layers.chain_steps import Weights, split, steps_of
from microglia.runtime.sparse_layers.layout import STRIPE, Places, dense_of_blocks, dense_of_every_block, dense_of_rows

LEVELS = ("torch", "generic", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")
ACTIVATIONS = ("none", "relu", "relu6", "silu")
"""By the number that the operators take."""

_PLACES = "Tensor values, Tensor row_pointer, Tensor channel"
_REST = "Tensor? bias, Tensor? residual, int outputs"
_OVER = "Tensor? bias, Tensor(a!) residual, int outputs"  # the output overwrites the residual
_GEOMETRY = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int activation"
_SCHEMAS = {
    "block_conv2d": f"(Tensor x, {_PLACES}, Tensor? tap, {_REST}, {_GEOMETRY}) -> Tensor",
    "row_conv2d": f"(Tensor x, {_PLACES}, Tensor? tap, {_REST}, {_GEOMETRY}) -> Tensor",
    "block_linear": f"(Tensor x, {_PLACES}, {_REST}, int activation) -> Tensor",
    "block_conv2d_": f"(Tensor x, {_PLACES}, Tensor? tap, {_OVER}, {_GEOMETRY}) -> ()",
    "block_linear_": f"(Tensor x, {_PLACES}, {_OVER}, int activation) -> ()",
    "gated_conv2d": "(Tensor x, Tensor values, Tensor channels, Tensor stripes, Tensor? bias, int outputs, "
    f"{_GEOMETRY}) -> Tensor",
    "part_conv2d": "(Tensor x, Tensor values, Tensor? rows, Tensor? columns, Tensor? bias, int outputs, "
    f"{_GEOMETRY}) -> Tensor",
    "gate_rows": "(Tensor x, Tensor? columns, Tensor weight, Tensor bias, bool softmax, bool maximum, int block=1) -> Tensor",
    "add_rows": "(Tensor x, Tensor part, Tensor rows, bool relu=False) -> Tensor",
    "block_chain": f"(Tensor[] images, {_PLACES}, Tensor tap, Tensor bias, int[] program) -> Tensor[]",
}
BUILD = "Install a C++17 compiler (g++ or clang++), then in a checkout: pip install --force-reinstall --no-deps ."
"""How to get the compiled kernels."""
_library = torch.library.Library("microglia", "DEF")  # type: ignore[no-untyped-call]


def level() -> str:
    """Returns the level of the kernels that run in this process: one of `LEVELS`.

    Raises:
        MicrogliaError: ``MICROGLIA_ISA`` names a level that does not exist or that this machine or build does not have.
    """
    return _load()


@functools.cache
def _load() -> str:
    """Loads the compiled kernels, once in a process, and returns the level; without kernels it says so, once."""
    found, reason = kernels()
    if reason is not None:
        warnings.warn(
            f"Microglia runs without its compiled kernels: {reason}. Everything works, sparse layers run as dense ones. "
            f"{BUILD}",
            stacklevel=3,
        )
    return found


@functools.cache
def kernels() -> tuple[str, str | None]:
    """Loads the compiled kernels and returns their level; and, where nobody asked for none, why there are none.

    Raises:
        MicrogliaError: As `level`.
    """
    asked = os.environ.get("MICROGLIA_ISA", "")
    if asked and asked not in LEVELS:
        raise MicrogliaError(f"MICROGLIA_ISA is {asked!r}; it can be one of {', '.join(LEVELS)}.")
    if asked == "torch":
        return "torch", None
    built = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not built:
        return _without_kernels(asked, "they were not built at installation (no C++ compiler)")
    try:
        library = ctypes.CDLL(str(built[0]))
        torch.ops.load_library(str(built[0]))  # type: ignore[no-untyped-call]
    except OSError as error:
        return _without_kernels(asked, str(error).splitlines()[0])
    library.mg_level_name.restype = ctypes.c_char_p
    found = library.mg_level_name(library.mg_level()).decode()
    if asked and found != asked:
        raise MicrogliaError(f"MICROGLIA_ISA asks for {asked!r}, but the best that this machine can run is {found!r}.")
    return str(found), None


@functools.cache
def huffman_decoder() -> Callable[..., int] | None:
    """Returns the compiled decoder of Huffman codes, ``mg_huffman_decode`` of ``kernels.h``; None without compiled kernels.

    A library that was built before the decoder was added counts as none.
    """
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    return compiled("mg_huffman_decode", (pointer, number, pointer, number, number, pointer, ctypes.c_int32, pointer, number))


def _without_kernels(asked: str, reason: str) -> tuple[str, str]:
    if asked:
        raise MicrogliaError(f"MICROGLIA_ISA asks for {asked!r}, but there are no compiled kernels: {reason}.")
    return "torch", reason


# ------------------------------------------------------------------------------------------------- references and shapes
def activate(x: Tensor, activation: int) -> Tensor:
    """Returns an activation by its number."""
    return x if activation == 0 else (functional.relu, functional.relu6, functional.silu)[activation - 1](x)


def _convolution(decode: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    values, row_pointer, channel, tap, bias, residual, outputs, kernel, stride, padding, dilation, activation = rest
    x_, values_, residual_ = _widened(x, values, residual)
    weight = decode(Places(values_, row_pointer, channel, tap), outputs, x.shape[1], kernel)
    out = functional.conv2d(x_, weight, bias, stride, padding, dilation)
    return activate(out if residual_ is None else out + residual_, activation).to(x.dtype)


def _linear(x: Tensor, *rest: Any) -> Tensor:
    values, row_pointer, channel, bias, residual, outputs, activation = rest
    x_, values_, residual_ = _widened(x, values, residual)
    weight = dense_of_blocks(Places(values_, row_pointer, channel, None), outputs, x.shape[-1], ())
    out = functional.linear(x_, weight, bias)
    return activate(out if residual_ is None else out + residual_, activation).to(x.dtype)


def _widened(x: Tensor, values: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the operands of a block or row layer: bfloat16 widened to float32, so that only the result is rounded."""
    for name, other in (("the values of the layer", values), ("the residual", residual)):
        if other is not None and other.dtype != x.dtype:
            raise MicrogliaError(
                f"microglia: the input is {_type(x)} and {name} {_type(other)}: both must be of one type; convert the module "
                "or what it is given with .to()."
            )
    if x.dtype != torch.bfloat16:
        return x, values, residual
    return x.float(), values.float(), None if residual is None else residual.float()


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _gated(x: Tensor, *rest: Any) -> Tensor:
    values, channels, stripes, bias, outputs, kernel, stride, padding, dilation, activation = rest
    weight = dense_of_every_block(values, outputs, kernel)
    columns, kept = _chosen(x, channels, x.shape[1]), _chosen(x, stripes, len(values)).repeat_interleave(STRIPE)[:outputs]
    out = functional.conv2d(x, weight * columns[:, None, None], bias, stride, padding, dilation)
    return torch.where(kept[:, None, None] > 0, activate(out, activation), 0.0)


def _chosen(x: Tensor, chosen: Tensor, length: int) -> Tensor:
    """Returns a mask of ones and zeros from what a gate chose: a list of int32, or a mask of bytes."""
    if chosen.dtype == torch.uint8:
        return (chosen > 0).to(x.dtype)
    return x.new_zeros(length).index_fill(0, chosen.long(), 1)


def _part(x: Tensor, *rest: Any) -> Tensor:
    values, rows, columns, bias, outputs, kernel, stride, padding, dilation, activation = rest
    weight = dense_of_every_block(values, outputs, kernel)
    weight = weight if columns is None else weight.index_select(1, columns)
    if rows is not None:
        weight, bias = weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows)
    return activate(functional.conv2d(x, weight, bias, stride, padding, dilation), activation)


def _gate_rows(x: Tensor, columns: Tensor | None, *head: Any) -> Tensor:
    weight, bias, softmax, maximum, block = (*head, 1)[:5]  # torch leaves out a block of 1, the default
    seen = x.amax((2, 3)) if maximum else x.mean((2, 3))
    if columns is not None:
        seen = seen.new_zeros(1, weight.shape[1]).index_copy(1, columns, seen)
    logits = functional.linear(seen.softmax(1) if softmax else seen, weight, bias)
    rows: Tensor = (logits[0] > 0).repeat_interleave(block).nonzero()[:, 0]
    return rows


def _add_rows(x: Tensor, part: Tensor, rows: Tensor, relu: bool = False) -> Tensor:
    pixels, some = x.permute(0, 2, 3, 1), part.permute(0, 2, 3, 1)  # a matrix of pixels x channels is faster
    total = pixels.flatten(0, 2).index_add(1, rows, some.flatten(0, 2)).view(pixels.shape).permute(0, 3, 1, 2)
    return total.relu_() if relu else total


def _chain(images: list[Tensor], *rest: Any) -> list[Tensor]:
    """Runs the steps of a chain one after the other."""
    *weights, program = rest
    known, out = list(images), []
    for step, places, bias in split(Weights(*weights), steps_of(program)):
        residual = None if step.residual < 0 else known[step.residual]
        settings = (*step.geometry, step.activation)
        result = _convolution(dense_of_blocks, known[step.input], *places, bias, residual, step.outputs, *settings)
        known.append(result.contiguous(memory_format=torch.channels_last))
        if step.goes_out:
            out.append(known[-1])
    return out


def _chain_shapes(images: list[Tensor], *rest: Any) -> list[Tensor]:
    known, out = list(images), []
    for step in steps_of(rest[-1]):
        known.append(_convolved(known[step.input], step.outputs, *step.geometry).to(memory_format=torch.channels_last))
        if step.goes_out:
            out.append(known[-1])
    return out


@functools.cache
def has_triton() -> bool:
    """Tells whether the block operators have kernels on a GPU; without triton they run as dense operators."""
    return importlib.util.find_spec("triton") is not None


def _on_cuda(name: str, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns an operator's CUDA implementation; its first call imports triton."""

    def call(*args: Any) -> Tensor:
        if not has_triton():
            return reference(*args)
        from microglia.runtime.gpu import triton

        operator: Callable[..., Tensor] = getattr(triton, name)
        return operator(*args)

    return call


def _laid_out(reference: Callable[..., Tensor], layout: torch.memory_format, *args: Any) -> Tensor:
    return reference(*args).contiguous(memory_format=layout)


def _convolved(x: Tensor, outputs: int, *geometry: Any) -> Tensor:
    """Returns an empty tensor of the output's shape."""
    kernel, stride, padding, dilation = geometry[:4]
    sides = zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    return x.new_empty([x.shape[0], outputs, *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sides)])


def _part_shape(x: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor | None, *rest: Any) -> Tensor:
    outputs = rest[1] if rows is None else rows.shape[0]
    return _convolved(x, outputs, *rest[2:]).to(memory_format=torch.channels_last)


def _written_over(reference: Callable[..., Tensor], residual: int, *args: Any) -> None:
    """Writes the result of the reference into the residual, the argument of the given number."""
    args[residual].copy_(reference(*args))


def _define() -> None:
    blocks, rows = functools.partial(_convolution, dense_of_blocks), functools.partial(_convolution, dense_of_rows)
    of_layout = dict.fromkeys(("row_conv2d", "block_linear", "gate_rows"), torch.contiguous_format)
    operators: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {  # name -> reference, shape
        "block_conv2d": (blocks, lambda x, *a: _convolved(x, *a[6:]).to(memory_format=torch.channels_last)),
        "row_conv2d": (rows, lambda x, *a: _convolved(x, *a[6:])),
        "block_linear": (_linear, lambda x, *a: x.new_empty([*x.shape[:-1], a[5]])),
        "gated_conv2d": (_gated, lambda x, *a: _convolved(x, *a[4:]).to(memory_format=torch.channels_last)),
        "part_conv2d": (_part, _part_shape),
        "gate_rows": (_gate_rows, lambda x, *a: x.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)),
        "add_rows": (_add_rows, lambda x, *a: torch.empty_like(x, memory_format=torch.channels_last)),
    }
    for name, (reference, shape) in operators.items():
        _library.define(name + _SCHEMAS[name])  # type: ignore[no-untyped-call]
        laid_out = functools.partial(_laid_out, reference, of_layout.get(name, torch.channels_last))
        _library.impl(name, laid_out, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        if name in ("block_conv2d", "block_linear"):
            _library.impl(name, _on_cuda(name, laid_out), "CUDA")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"microglia::{name}", shape, lib=_library)
    _library.define("block_chain" + _SCHEMAS["block_chain"])  # type: ignore[no-untyped-call]
    _library.impl("block_chain", _chain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake("microglia::block_chain", _chain_shapes, lib=_library)
    for name, reference, residual in (("block_conv2d_", blocks, 6), ("block_linear_", _linear, 5)):
        _library.define(name + _SCHEMAS[name])  # type: ignore[no-untyped-call]
        written = functools.partial(_written_over, reference, residual)
        _library.impl(name, written, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"microglia::{name}", lambda *args: None, lib=_library)


_define()
