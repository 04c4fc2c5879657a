"""Linear layers that stay in codes: a table of a few values, and a code of 4 or 8 bits for each weight.

At a batch of one a linear layer takes the time that its weight takes to arrive. Codes are a quarter or an eighth of it. The
operator is ``torch.ops.microglia.code_linear``; without compiled kernels it reads the table in pure PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import MicrogliaError
from microglia.core.native import compiled
from microglia.runtime.dense.fusion import Site
from microglia.runtime.dense.packing import apply_activation
from microglia.runtime.operators import LEVELS

STEP = 16
"""Inputs of a row are filled up with zeros to a multiple of this."""
ROWS = 4
"""Maximum number of examples for which codes are tried: each of them reads the table anew."""
FEW = 4096
"""Weights that are looked at first; with more than 256 values among them a layer has no codes."""
TIMES = 8
"""A layer of codes has at least this many weights for each value, so that its table is small beside its codes."""
LARGEST = len(LEVELS)
_library = torch.library.Library("microglia", "FRAGMENT")  # type: ignore[no-untyped-call]


def code_bits(site: Site) -> int | None:
    """Returns the bits of a code of a linear layer, 4 or 8, or None where codes are not tried.

    Codes need few values, few examples, float32, and compiled kernels.
    """
    if site.kind != "linear" or site.weight.dtype != torch.float32 or math.prod(site.input_shape[:-1]) > ROWS:
        return None
    flat = site.weight.detach().reshape(-1)
    if flat.device.type != "cpu" or _kernel() is None:
        return None
    if torch.unique(flat[:FEW]).numel() > 256:
        return None
    values = torch.unique(flat).numel()
    if values * TIMES > flat.numel():
        return None
    return 4 if values <= 16 else 8 if values <= 256 else None


def to_codes(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the codes of a weight and their table.

    Args:
        weight: (outputs, inputs), with at most 2^bits values.
        bits: 4 or 8.

    Returns:
        (codes, table): codes are uint8 (outputs, bytes), rows filled up to a multiple of 16 inputs. With 4 bits, byte j of
        eight holds the codes of the inputs j (low bits) and j + 8. The table is (2^bits,).

    Raises:
        MicrogliaError: The weight has more values.
    """
    values, places = torch.unique(weight.detach(), return_inverse=True)
    if values.numel() > 1 << bits:
        raise MicrogliaError(f"Codes of {bits} bits tell {1 << bits} values apart; the weight has {values.numel()}.")
    table = functional.pad(values, (0, (1 << bits) - values.numel()))
    codes = functional.pad(places.to(torch.uint8), (0, -weight.shape[1] % STEP))
    if bits == 4:
        pairs = codes.reshape(len(codes), -1, 2, STEP // 2)
        codes = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    return codes.contiguous(), table.contiguous()


def from_codes(codes: Tensor, table: Tensor, inputs: int) -> Tensor:
    """Returns the weight (outputs, inputs) of codes; see `to_codes`."""
    if table.numel() == 1 << 4:
        pairs = codes.reshape(len(codes), -1, STEP // 2)
        codes = torch.stack([pairs & 15, pairs >> 4], 2).flatten(1)
    return table[codes[:, :inputs].long()]


class CodeLinear(nn.Module):
    """A linear layer whose weight is a table and a code for each weight.

    Args:
        site: A linear layer in float32.
        bits: Bits of a code, 4 or 8; see `code_bits`.
    """

    codes: Tensor
    table: Tensor
    bias: Tensor | None

    def __init__(self, site: Site, bits: int) -> None:
        super().__init__()
        codes, table = to_codes(site.weight, bits)
        self.register_buffer("codes", codes)
        self.register_buffer("table", table)
        self.register_buffer("bias", None if site.bias is None else site.bias.detach().contiguous())
        self.inputs, self.activation = site.weight.shape[1], site.activation

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(layer(x) + other)."""
        out: Tensor = torch.ops.microglia.code_linear(x, self.codes, self.table, self.bias, self.inputs)
        return apply_activation(out if other is None else out + other, self.activation)


@functools.cache
def _kernel() -> Callable[..., int] | None:
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    return compiled("mg_code_linear", (*(pointer,) * 5, *(number,) * 3, small, small))


def code_linear(x: Tensor, codes: Tensor, table: Tensor, bias: Tensor | None, inputs: int, *, level: int = LARGEST) -> Tensor:
    """Returns a linear layer's output from codes.

    Args:
        x: (..., inputs), float32.
        codes: See `to_codes`.
        table: See `to_codes`.
        bias: (outputs,), or None.
        inputs: Number of inputs.
        level: Number of the level of the kernels, 0 for ``generic``; the machine's best one at most.

    Raises:
        MicrogliaError: The shapes do not fit.
    """
    bits, padded = (4 if table.numel() == 1 << 4 else 8), inputs + -inputs % STEP
    if x.shape[-1] != inputs or codes.ndim != 2 or codes.shape[1] != padded * bits // 8 or table.numel() != 1 << bits:
        raise MicrogliaError(f"Codes {tuple(codes.shape)} of {bits} bits do not fit inputs of the shape {tuple(x.shape)}.")
    kernel = _kernel()
    if kernel is None or x.dtype != torch.float32 or x.device.type != "cpu":
        return functional.linear(x, from_codes(codes, table, inputs).to(x.dtype), bias)
    rows = functional.pad(x.reshape(-1, inputs), (0, padded - inputs)).contiguous()
    codes, table, bias = codes.contiguous(), table.contiguous(), None if bias is None else bias.contiguous()
    out = rows.new_empty(len(rows), len(codes))
    memory = (codes.data_ptr(), table.data_ptr(), rows.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
    if kernel(*memory, len(codes), padded, len(rows), bits, level) != 0:
        raise MicrogliaError(f"The kernel of codes refuses {len(codes)} x {padded} codes of {bits} bits.")
    return out.reshape(*x.shape[:-1], len(codes))


def _shape(x: Tensor, codes: Tensor, table: Tensor, bias: Tensor | None, inputs: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], codes.shape[0]])


_library.define("code_linear(Tensor x, Tensor codes, Tensor table, Tensor? bias, int inputs) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("code_linear", code_linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("microglia::code_linear", _shape, lib=_library)
