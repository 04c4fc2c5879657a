"""2:4 sparsity of linear layers on a GPU: at most two of four neighbouring inputs are kept; tensor cores skip the rest.

It uses ``torch.sparse.to_sparse_semi_structured`` (cuSPARSELt). The sizes decide whether it is faster than dense; the timing
shows it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import MicrogliaError
from microglia.runtime.dense.fusion import Site
from microglia.runtime.dense.packing import apply_activation

DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 64
"""Outputs and inputs are multiples of it, as both implementations of PyTorch require."""
CAPABILITY = (8, 0)
"""The first GPUs that multiply 2:4."""


def too_dense_groups(weight: Tensor) -> int:
    """Returns the number of groups of four neighbouring inputs with more than two nonzero weights.

    Args:
        weight: (outputs, inputs), inputs a multiple of four.
    """
    return int((weight.reshape(-1, 4).count_nonzero(1) > 2).sum())


def why_not(site: Site) -> str | None:
    """Returns the reason why a linear layer cannot run as 2:4 here, None if it can."""
    weight = site.weight
    if site.kind != "linear":
        return "2:4 is for linear layers"
    if weight.dtype not in DTYPES or weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        given = f"{tuple(weight.shape)} of {weight.dtype}"
        return f"2:4 takes outputs and inputs that are multiples of {MULTIPLE}, in float16 or bfloat16, not {given}"
    if groups := too_dense_groups(weight):
        return f"{groups} of {weight.numel() // 4} groups of four inputs keep more than two weights"
    if not weight.is_cuda:
        return f"2:4 runs on a GPU, not on {weight.device}"
    if torch.cuda.get_device_capability(weight.device) < CAPABILITY:
        return f"{torch.cuda.get_device_name(weight.device)} does not multiply 2:4"
    return None


class SemiStructuredLinear(nn.Module):
    """A linear layer with at most two of four neighbouring inputs kept, compressed at construction.

    Args:
        site: A layer for which `why_not` returns None.

    Raises:
        MicrogliaError: The layer cannot run as 2:4; the text is the reason.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        reason = why_not(site)
        if reason is not None:
            raise MicrogliaError(f"{site.name or 'The layer'} stays dense: {reason}.")
        self.register_buffer("weight", site.weight)
        self.register_buffer("bias", site.bias)
        self.site = site
        self._compressed: Any = torch.sparse.to_sparse_semi_structured(site.weight.contiguous())  # type: ignore[no-untyped-call]
        self._search()

    def _search(self) -> None:
        """Lets cuSPARSELt, if it is in use, time its algorithms for this size: they differ by up to a factor of two."""
        rows = torch.Size(self.site.input_shape[:-1]).numel()
        packed = getattr(self._compressed, "packed", None)
        if not hasattr(self._compressed, "alg_id_cusparselt") or packed is None or self._compressed.meta is not None:
            return  # CUTLASS has one algorithm
        x = torch.randn(rows + -rows % 16, self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        self._compressed.alg_id_cusparselt = torch._cslt_sparse_mm_search(packed, x.t(), bias=self.bias, transpose_result=True)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Returns activation(linear(x) + bias + other), (..., outputs)."""
        out = functional.linear(x, self._compressed, self.bias)
        return apply_activation(out if other is None else out + other, self.site.activation)

    def __deepcopy__(self, memo: dict[int, Any]) -> SemiStructuredLinear:
        """Returns a copy that compresses its own weight."""
        return SemiStructuredLinear(copy.deepcopy(self.site, memo))

    def __reduce__(self) -> tuple[type[SemiStructuredLinear], tuple[Site]]:
        """Returns the arguments to build the layer again in another process."""
        return SemiStructuredLinear, (self.site,)
