"""Sums of a tensor over all dimensions but one equal exact sums, for any shape, layout and type."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microglia.graph.channels import sums
from microglia.graph.channels.sums import entry_sums

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def exact(values: Tensor, dim: int, *, square: bool) -> Tensor:
    """The sums by Python's exact summation."""
    rows = values.double().movedim(dim, 0).reshape(values.shape[dim], -1).tolist()
    return torch.tensor([math.fsum(v * v if square else v for v in row) for row in rows], dtype=torch.float64)


@settings(deadline=None)
@given(SHAPES, st.booleans(), st.sampled_from([torch.float16, torch.float32, torch.float64]), st.sampled_from([1, 7, 2**18]))
def test_sums_equal_exact_ones(shape: list[int], square: bool, dtype: torch.dtype, block: int) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "BLOCK", block)
        found = entry_sums(values, range(len(shape)), square=square)
    for dim in range(len(shape)):
        assert found[dim].dtype == torch.float64
        torch.testing.assert_close(found[dim], exact(values, dim, square=square), rtol=1e-12, atol=0)


def test_squares_that_float32_cannot_hold() -> None:
    values = torch.tensor([[1e30, 1.0], [1e-30, 1e-30]])
    torch.testing.assert_close(entry_sums(values, (0,), square=True)[0], exact(values, 0, square=True), rtol=1e-12, atol=0)


def test_layouts_other_than_rows() -> None:
    values = torch.rand(6, 4, 3, 5)
    for layout in (values.to(memory_format=torch.channels_last), values.transpose(0, 1), values[::2, 1:]):
        found = entry_sums(layout, (1, 3), square=True)
        assert found.keys() == {1, 3}
        for dim, own in found.items():
            torch.testing.assert_close(own, exact(layout, dim, square=True), rtol=1e-12, atol=0)


def test_empty_tensors_have_zero_sums() -> None:
    assert entry_sums(torch.zeros(3, 0), (0, 1))[0].tolist() == [0, 0, 0]
    assert entry_sums(torch.zeros(0, 2), (0, 1))[1].tolist() == [0, 0]
