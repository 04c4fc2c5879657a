"""Codebooks for groups of output channels: rounding, training, the form in the file, and what a reader sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.compress import encode, inspect, rounded
from microglia.compress.bit_budget import Rounding
from microglia.compress.codebook import looked_up, share, share_groups
from microglia.compress.grouped import check_row, decode_tensor, encode_tensor, groups_in, stored_bytes
from microglia.core.budget import Budget
from microglia.core.errors import MicrogliaError
from microglia.core.layers import prunable_layers
from microglia.methods import DeepCompressionConfig, WeightSharing
from microglia.report.packed import packed_table

GENERATOR = torch.Generator().manual_seed(0)
VERSION_BYTE = 8


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Each test draws the same numbers in every order: with others, half precision may need fewer codebooks."""
    GENERATOR.manual_seed(0)


def weight(rows: int = 32, columns: int = 60, density: float = 0.5) -> Tensor:
    """Rows of very different sizes, as after training without a common scale."""
    scales = torch.logspace(-2, 1, rows)[:, None]
    found = torch.randn(rows, columns, generator=GENERATOR) * scales
    return torch.where(torch.rand(rows, columns, generator=GENERATOR) < density, found, 0.0)


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    for layer in (model[0], model[3]):
        layer.weight.data *= torch.logspace(-1, 1, layer.weight.shape[0]).view(-1, *[1] * (layer.weight.ndim - 1))
    mg.methods.OneShot(model, density=0.5, scope="layer").finish()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_a_grouped_tensor_returns_to_the_bit(groups: int, dtype: torch.dtype, masked: bool) -> None:
    given = looked_up(*share_groups(weight().to(dtype), 3, groups))
    mask = (given != 0) | (torch.rand(given.shape, generator=GENERATOR) < 0.1) if masked else None
    about, part = encode_tensor(given, mask)
    assert (about["form"], len(about["groups"])) == ("grouped", groups)
    row = {
        "name": "w",
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(given.shape),
        "size": len(part),
        "crc": 0,
        **about,
    }
    check_row(row)
    back, kept = decode_tensor(row, memoryview(part))
    assert torch.equal(back, given)
    assert torch.equal(kept, given != 0 if mask is None else mask)
    assert 0 <= len(part) - stored_bytes(given, mask) <= groups * 4  # the padding of the blocks


def test_each_group_is_shared_alone_and_one_group_is_the_whole() -> None:
    given = weight()
    codes, tables = share_groups(given, 3, 4)
    assert tables.shape == (4, 8)
    for group, chunk in enumerate(given.chunk(4)):
        own_codes, own_table = share(chunk, 3)
        assert torch.equal(codes.chunk(4)[group], own_codes)
        assert torch.equal(tables[group], own_table)
    assert all(map(torch.equal, share_groups(given, 3, 1), share(given, 3)))
    assert share_groups(given[:10], 3, 4)[1].shape == (2, 8)  # ten rows are two groups


def test_tensors_without_groups_keep_their_form() -> None:
    for given in (weight(), looked_up(*share(weight(), 3)), torch.randn(8, 8), torch.zeros(4, 4), torch.randn(7)):
        assert groups_in(given) == 1
    assert encode(network())[VERSION_BYTE] == 1


def test_more_codebooks_round_better(tmp_path: Path) -> None:
    model = network()
    errors = []
    for groups in (1, 2, 8):
        near = rounded(model, 3, rounding=Rounding(groups=groups))
        pairs = zip(prunable_layers(model).values(), prunable_layers(near).values(), strict=True)
        errors.append(sum(float((one.weight - other.weight).detach().square().sum()) for one, other in pairs))
    assert errors[0] > errors[1] > errors[2]
    contents = mg.pack(model, tmp_path / "m.mgpack", bits=3, codebook_groups=8)
    assert contents == inspect(tmp_path / "m.mgpack")
    assert (tmp_path / "m.mgpack").read_bytes()[VERSION_BYTE] == 2
    back = mg.unpack(tmp_path / "m.mgpack", network())
    assert mg.masks_of(back).same(mg.masks_of(model))
    assert encode(back) == (tmp_path / "m.mgpack").read_bytes()
    assert {entry.name: len(entry.groups) for entry in contents.entries if entry.groups} == {"0.weight": 8, "3.weight": 2}
    (entry,) = [entry for entry in contents.entries if entry.name == "0.weight"]
    assert entry.bytes == sum(group.bytes for group in entry.groups)
    assert entry.kept == sum(group.kept for group in entry.groups)
    assert contents.steps()["shared"] < contents.steps()["pruned"]
    assert next(row for row in contents.to_dict()["entries"] if row["name"] == "0.weight")["groups"] == 8
    assert "8 x 8" in list(packed_table(contents, "").columns[6].cells)


def test_a_budget_of_bytes_counts_the_groups() -> None:
    model = network()
    budget = len(encode(model, bits=4, codebook_groups=4))
    data = encode(model, budget=Budget(bytes=budget), codebook_groups=4)
    assert 0.8 * budget < len(data) <= budget
    assert data[VERSION_BYTE] == 2


def test_the_gradient_of_a_centroid_is_the_sum_over_its_group() -> None:
    model = network()
    sharing = WeightSharing(model, bits=3, codebook_groups=4)
    x = torch.randn(4, 2, 8, 8, generator=GENERATOR)
    shared = model[0].parametrizations.weight[1]
    dense = model[0].weight.detach().clone().requires_grad_()
    nn.functional.conv2d(x, dense, model[0].bias.detach()).square().sum().backward()
    model[0](x).square().sum().backward()
    assert dense.grad is not None
    for group, (codes, gradient) in enumerate(zip(shared.codes.chunk(4), dense.grad.chunk(4), strict=True)):
        for entry in range(1, 8):
            torch.testing.assert_close(
                shared.centroids.grad[group, entry - 1], gradient[codes == entry].sum(), atol=1e-3, rtol=1e-4
            )
    shared.centroids.data -= 0.01 * shared.centroids.grad
    books = sharing.codebooks["0.weight"]
    assert books.shape == (4, 8)
    sharing.finish()
    for group, chunk in enumerate(model[0].weight.chunk(4)):
        assert set(chunk[chunk != 0].tolist()) <= set(books[group].tolist())
    assert not books[:, 0].any()


def test_the_number_is_checked_and_reaches_the_rounding() -> None:
    assert DeepCompressionConfig(codebook_groups=2).rounding.groups == 2
    with pytest.raises(MicrogliaError, match="from 1 to 64; got 0"):
        WeightSharing(network(), bits=3, codebook_groups=0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"groups": []}, "do not fit its shape"),
        ({"groups": 3}, "do not fit its shape"),
        ({"mask": 3}, "does not fit its mask"),
        ({"dtype": "int64"}, "does not fit its mask"),
        ({"size": 1}, "do not add up"),
        ({"kept": None}, "the kept"),
    ],
)
def test_a_wrong_row_is_refused(change: dict[str, object], text: str) -> None:
    given = looked_up(*share_groups(weight(), 3, 2))
    about, part = encode_tensor(given)
    row = {"name": "w", "dtype": "float32", "shape": [32, 60], "size": len(part), "crc": 0, **about}
    check_row(row)
    with pytest.raises(ValueError, match=text):
        check_row({**row, **change})
    inner = [{**about["groups"][0], "form": "same"}, about["groups"][1]]
    with pytest.raises(ValueError, match="has no form"):
        check_row({**row, "groups": inner})
