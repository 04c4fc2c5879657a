"""The linear layer of a thresholded input: ``torch.ops.microglia.thresholded_linear``, which reads only what the input needs.

The weight lies input by input, so that the inputs that count as zero leave whole rows of it in memory. Without compiled kernels
the operator is a threshold and a dense product.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4
"""Maximum number of rows for which the operator is faster than a dense product: each of them needs other inputs."""
TYPES = (torch.float32, torch.bfloat16)
"""Types of the compiled kernel."""
_library = torch.library.Library("microglia", "FRAGMENT")  # type: ignore[no-untyped-call]


def thresholded(x: Tensor, threshold: Tensor | float) -> Tensor:
    """Returns a tensor with zeros for the entries whose magnitude is at most a threshold; NaN stays.

    Example:
        >>> thresholded(torch.tensor([0.1, -0.5, float("nan")]), 0.2)
        tensor([ 0.0000, -0.5000,     nan])
    """
    return x.masked_fill(x.abs() <= threshold, 0)


def thresholded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    """Returns ``thresholded(x, threshold) @ weight + bias``: what the compiled kernel computes, in pure PyTorch.

    Args:
        x: (..., inputs).
        weight: (inputs, outputs), finite: the compiled kernel skips its rows at zeros, where 0 * inf would be NaN.
        bias: (outputs,), or None.
        threshold: One number.
    """
    out = thresholded(x, threshold) @ weight
    return out if bias is None else out + bias


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[1]])


_library.define("thresholded_linear(Tensor x, Tensor weight, Tensor? bias, Tensor threshold) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("thresholded_linear", thresholded_linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("microglia::thresholded_linear", _shape, lib=_library)
