"""The kernel of a thresholded input: equal to the dense product at every level, and it reads only what the input needs."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from microglia.core.native import compiled, torch_threads
from microglia.runtime.operators import LEVELS, kernels
from microglia.runtime.sparse_layers.thresholded import thresholded, thresholded_linear

LEVEL = range(max(1, LEVELS.index(kernels()[0])))
KERNEL = compiled("mg_thresholded_linear", (ctypes.c_void_p,) * 4)
needs_kernel = pytest.mark.skipif(KERNEL is None, reason="the compiled kernels have no thresholded layer")
OPERATOR = torch.ops.microglia.thresholded_linear


class Layer(ctypes.Structure):
    """mg_thresholded."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "threshold")),
        *((name, ctypes.c_int32) for name in ("bfloat16", "level", "threads")),
    )


def ran(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, level: int, threads: int = 1) -> Tensor:
    out = torch.full((len(x), weight.shape[1]), 7.0).to(x.dtype)
    data = [None if t is None else t.data_ptr() for t in (weight, bias, threshold)]
    layer = Layer(*x.shape, weight.shape[1], *data, x.dtype == torch.bfloat16, level, threads)
    parallel = torch_threads() if threads > 1 else None
    assert KERNEL is not None
    assert KERNEL(ctypes.addressof(layer), x.data_ptr(), out.data_ptr(), parallel) == 0
    return out


def drawn(rows: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows + inputs + outputs)
    return torch.randn(rows, inputs).to(dtype), torch.randn(inputs, outputs).to(dtype), torch.randn(outputs).to(dtype)


@needs_kernel
@pytest.mark.parametrize("level", LEVEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 3), (8, 15), (9, 16), (33, 100), (64, 33), (130, 257), (0, 5)])
def test_outputs_are_equal_at_every_level(level: int, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    for rows in (1, 2, 3, 4, 5, 9):
        x, weight, bias = drawn(rows, inputs, outputs, dtype)
        x[:, : inputs // 3] = 0
        for number in (0.0, 0.5, 100.0):  # none but zeros, some, and all inputs are dropped
            threshold = torch.tensor(number, dtype=dtype)
            for shift in (bias, None):
                found = ran(x, weight, shift, threshold, level)
                exact = thresholded_linear(x.float(), weight.float(), None if shift is None else shift.float(), threshold)
                torch.testing.assert_close(found, exact.to(dtype), rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("level", LEVEL)
def test_an_entry_at_the_threshold_is_dropped_and_its_weights_are_not_read(level: int) -> None:
    """Infinite weights show what is read: 0 * inf would be NaN."""
    x, weight, bias = drawn(1, 40, 50)
    threshold = x.abs().flatten().kthvalue(20).values.clone()
    small = x[0].abs() <= threshold
    assert int(small.sum()) == 20
    expected = x[:, ~small] @ weight[~small] + bias
    weight[small] = float("inf")
    torch.testing.assert_close(ran(x, weight, bias, threshold, level), expected, rtol=1e-5, atol=1e-5)
    assert thresholded_linear(x, weight, bias, threshold).isnan().all()  # the dense product does read them


@needs_kernel
@pytest.mark.parametrize("level", LEVEL)
def test_nan_and_infinity_come_through_as_in_the_dense_product(level: int) -> None:
    for special in (float("nan"), float("inf"), -float("inf")):
        for rows in (1, 3):
            x, weight, bias = drawn(rows, 20, 37)
            x[0, 5] = special
            found = ran(x, weight, bias, torch.tensor(0.7), level)
            torch.testing.assert_close(
                found, thresholded_linear(x, weight, bias, torch.tensor(0.7)), rtol=1e-4, atol=1e-4, equal_nan=True
            )
            assert not found[0].isfinite().any()
            assert found[1:].isfinite().all()
    x[0, 5] = 3
    weight[5] = float("inf")  # an entry above the threshold is used, whatever it meets
    assert not ran(x, weight, bias, torch.tensor(0.7), level)[0].isfinite().any()


@needs_kernel
def test_threads_change_no_bit() -> None:
    x, weight, bias = drawn(3, 300, 1111)
    threshold = torch.tensor(0.5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        several, called = ran(x, weight, bias, threshold, 99, threads=2), OPERATOR(x, weight, bias, threshold)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(several, ran(x, weight, bias, threshold, 99))
    assert torch.equal(called, several)


@needs_kernel
def test_a_problem_that_cannot_be_is_refused() -> None:
    x, weight, bias = drawn(1, 4, 4)
    assert KERNEL is not None
    good = {"rows": 1, "inputs": 4, "outputs": 4, "weight": weight.data_ptr(), "threshold": bias.data_ptr(), "threads": 1}
    for wrong in ({"rows": -1}, {"inputs": 2**40}, {"outputs": -1}, {"threads": 0}, {"weight": None}, {"threshold": None}):
        layer = Layer(**{**good, **wrong})
        assert KERNEL(ctypes.addressof(layer), x.data_ptr(), bias.data_ptr(), None) != 0
    assert KERNEL(None, x.data_ptr(), bias.data_ptr(), None) != 0


def test_the_operator_takes_any_leading_shape_and_any_layout() -> None:
    torch.manual_seed(0)
    weight, bias, threshold = torch.randn(6, 9), torch.randn(9), torch.tensor(0.4)
    for shape in ((6,), (1, 6), (2, 3, 6), (0, 6)):
        x = torch.randn(shape)
        torch.testing.assert_close(OPERATOR(x, weight, bias, threshold), thresholded(x, 0.4) @ weight + bias)
    turned = torch.randn(6, 3).t()
    torch.testing.assert_close(
        OPERATOR(turned, torch.randn(9, 6).t().mul_(0).add_(weight), None, threshold), thresholded(turned, 0.4) @ weight
    )
    shapes = OPERATOR(*(t.to("meta") for t in (torch.ones(2, 5, 6), weight, bias, threshold))).shape
    assert shapes == (2, 5, 9)


@needs_kernel
def test_the_operator_refuses_what_does_not_fit() -> None:
    weight, threshold = torch.randn(6, 9), torch.tensor(0.4)
    for x, other in (
        (torch.ones(1, 5), weight),
        (torch.ones(1, 6), weight.double()),
        (torch.ones(1, 6, dtype=torch.half), weight),
    ):
        with pytest.raises(RuntimeError, match="microglia"):
            OPERATOR(x, other, None, threshold)
    with pytest.raises(RuntimeError, match="threshold must be one number"):
        OPERATOR(torch.ones(1, 6), weight, None, torch.ones(2))
