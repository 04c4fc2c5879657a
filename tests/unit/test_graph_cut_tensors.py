"""The tensors of a cut: removed entries are zero or gone, whatever they held and however they lie in memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from microglia.graph.cutting.cut import Cut, select, select_all
from microglia.graph.dims.analysis import Analysis
from microglia.graph.dims.trace import trace


def cut_of(model: nn.Module, x: Tensor, lost: list[int]) -> Cut:
    """A cut of the first hidden channels of a model."""
    analysis = Analysis(trace(model, x, dynamic=()))
    atom = analysis.prunable()[0]
    kept = torch.ones(analysis.algebra.sizes[atom], dtype=torch.bool)
    kept[lost] = False
    return Cut(analysis, {atom: kept})


TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128, torch.int64]


@pytest.mark.parametrize("dtype", TYPES)
def test_removed_entries_are_zero_and_others_as_they_were(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    cut = cut_of(model, torch.zeros(1, 3), [1, 4])
    rows = (torch.randn(5, 3) * 50).to(dtype)
    expected = rows.clone()
    expected[[1, 4]] = 0
    assert torch.equal(cut.zero("0.weight", rows), expected)
    columns = (torch.randn(2, 5) * 50).to(dtype)
    expected = columns.clone()
    expected[:, [1, 4]] = 0
    found = cut.zero("2.weight", columns)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    whole = cut.zero("2.bias", torch.ones(2, dtype=dtype))
    assert torch.equal(whole, torch.ones(2, dtype=dtype))


def test_values_that_are_not_finite_become_zero_too() -> None:
    cut = cut_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3), [0, 3])
    weight = torch.full((4, 3), math.nan)
    weight[1], weight[3] = 1.0, math.inf
    found = cut.zero("0.weight", weight)
    assert found[[0, 3]].eq(0).all()
    assert found[1].eq(1).all()
    assert found[2].isnan().all()
    assert weight[0].isnan().all()


def test_zeros_keep_channels_last_and_the_groups_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2))
    cut = cut_of(model, torch.zeros(1, 3, 5, 5), [1])
    for name, weight in (("0.weight", model[0].weight), ("1.weight", model[1].weight)):
        plain, last = (cut.zero(name, weight.to(memory_format=f)) for f in (torch.contiguous_format, torch.channels_last))
        assert torch.equal(plain, last)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert 0 < int(plain.eq(0).sum()) < plain.numel()
        kept = cut.slice(name, weight)
        assert kept.numel() == plain.count_nonzero()
        torch.testing.assert_close(kept.double().square().sum(), plain.double().square().sum())


@pytest.mark.parametrize("form", ["rows", "columns", "transposed", "last"])
def test_entries_selected_at_once_are_those_selected_one_dimension_after_another(form: str) -> None:
    tensor = torch.randn(6, 5, 4, 3)
    tensor = {"rows": tensor, "columns": tensor[:, ::2].contiguous(), "transposed": tensor.transpose(0, 1)}.get(
        form, tensor.to(memory_format=torch.channels_last)
    )
    places = {0: [0, 3], 1: [1, 2], 2: [0, 1, 3]}
    wanted = tensor
    for dim, own in places.items():
        wanted = select(wanted, dim, own)
    assert torch.equal(select_all(tensor, places), wanted)
    assert select_all(tensor, {}) is tensor


def test_each_group_of_rows_may_keep_other_columns() -> None:
    tensor = torch.arange(12.0).view(4, 3)
    assert select_all(tensor, {0: [0, 1, 3, 2], 1: [[0, 1], [2, 0]]}).tolist() == [[0, 1], [3, 4], [11, 9], [8, 6]]
