"""Packed files: every kind of model comes back bit for bit, in as many bytes as the formula says."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.compress import Contents, encode, inspect, open_packed
from microglia.compress.container import read_container, write_container
from microglia.compress.entropy import code_lengths
from microglia.compress.tensors import decode_tensor, encode_tensor
from microglia.core.errors import FileError, MicrogliaError
from microglia.core.layers import effective_state, prunable_layers
from microglia.graph import plan_of

GENERATOR = torch.Generator().manual_seed(0)


def sparse(shape: tuple[int, ...], density: float, values: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(shape, generator=GENERATOR).to(dtype)
    if values is not None:
        weight = torch.randn(values, generator=GENERATOR).to(dtype)[torch.randint(values, shape, generator=GENERATOR)]
    return torch.where(torch.rand(shape, generator=GENERATOR) < density, weight, 0.0)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, also where numbers are NaN or minus zero."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
    )


def there_and_back(tensor: Tensor, mask: Tensor | None = None) -> tuple[str, Tensor, Tensor]:
    about, part = encode_tensor(tensor, mask)
    row = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), **about}
    return about["form"], *decode_tensor(row, memoryview(part))


def one(shape: tuple[int, ...], *places: int) -> Tensor:
    tensor = torch.zeros(shape)
    tensor.view(-1)[list(places)] = 0.5
    return tensor


TENSORS = {
    "all zero": torch.zeros(9, 7),
    "all dense": torch.randn(9, 7, generator=GENERATOR),
    "one value everywhere": torch.full((9, 7), 3.0),
    "a single element": torch.ones(1, 1),
    "no element": torch.zeros(0, 4),
    "the first position": one((8, 9), 0),
    "the last position": one((8, 9), 71),
    "gaps of 2, 4, 8 and 16, and one more": one((30, 30), 0, 2, 5, 9, 14, 22, 31, 47, 64, 128, 193, 321, 450),
    "negative zeros and NaN": torch.tensor([[0.0, -0.0, float("nan")], [float("inf"), 0.0, 1e-45]]),
    "few values, sparse": sparse((60, 50), 0.1, 15),
    "few values, dense": sparse((60, 50), 1.0, 15),
    "sparse": sparse((60, 50), 0.1),
    "bfloat16": sparse((60, 50), 0.1, 15, torch.bfloat16),
    "float16": sparse((60, 50), 0.3, None, torch.float16),
    "float64": sparse((60, 50), 0.3, 200, torch.float64),
    "convolution, channels last": sparse((16, 8, 3, 3), 0.2, 7).to(memory_format=torch.channels_last),
    "256 values are too many": torch.arange(1.0, 257).repeat(50).view(100, 128),
    "bool": torch.rand(5, 5, generator=GENERATOR) > 0.5,
    "integers": torch.arange(10).view(2, 5),
    "a scalar": torch.tensor(3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_returns_to_the_bit(name: str) -> None:
    form, back, kept = there_and_back(TENSORS[name])
    assert same(back, TENSORS[name])
    if form in ("sparse", "shared"):
        assert not back[~kept].any()
    expected = {"few values, sparse": "shared", "few values, dense": "shared", "bfloat16": "shared", "sparse": "sparse",
                "all dense": "raw", "256 values are too many": "raw", "float64": "shared", "bool": "bits"}  # fmt: skip
    assert form == expected.get(name, form)


@pytest.mark.parametrize("values", [None, 7])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.6, 1.0])
def test_a_mask_returns_too_also_where_kept_weights_are_zero(values: int | None, density: float) -> None:
    weight = sparse((40, 30), 0.7, values)  # three tenths of the kept weights are zero
    mask = torch.rand(40, 30, generator=GENERATOR) < density
    form, back, kept = there_and_back(weight, mask)
    assert form in ("sparse", "shared")
    assert torch.equal(kept, mask)
    assert same(back, torch.where(mask, weight, 0.0))


def test_the_bytes_are_those_of_the_formula() -> None:
    """Codes and gaps cost their Huffman lengths; the codebook its values; the rest is padding of one byte for each block."""
    weight = sparse((200, 100), 0.08, 15)
    about, part = encode_tensor(weight)
    row = {"dtype": "float32", "shape": [200, 100], **about}
    kept = decode_tensor(row, memoryview(part))[1].view(-1).numpy()
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    size = 1 << about["gap"]
    fillers = gaps // size
    counts_gap = np.bincount(gaps % size, minlength=size)
    counts_gap[-1] += fillers.sum()
    counts = np.append(np.unique(weight[weight != 0].numpy(), return_counts=True)[1], fillers.sum())
    bits = (counts * code_lengths(counts)).sum() + (counts_gap * code_lengths(counts_gap)).sum()
    blocks = 2 * -(-about["entries"] // 1024)
    tables = 15 * 4 + 8 + -(-size // 2)
    assert about["entries"] == len(gaps) + fillers.sum()
    assert 0 <= len(part) - (bits / 8 + 2 * blocks + tables) <= blocks
    assert len(part) < 1.25 * len(gaps)  # about 3.9 bits for one of 15 values, 5 for a position


def lenet() -> nn.Module:
    return mg.tasks.build("lenet-300-100", classes=10, shape=(1, 8, 8)).eval()


def masked(model: nn.Module, density: float = 0.2) -> nn.Module:
    masks = {n: torch.rand(p.shape, generator=GENERATOR) < density for n, p in prunable_weights(model).items()}
    mg.mask(model, masks)
    return model


def prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.raw for name, layer in prunable_layers(model).items()}


class TestModels:
    def test_a_masked_model_returns_alone(self, tmp_path: Path) -> None:
        model = masked(lenet())
        contents = mg.pack(model, tmp_path / "m.mgpack")
        back = mg.unpack(tmp_path / "m.mgpack").eval()
        assert mg.masks_of(back).same(mg.masks_of(model))
        assert all(same(v, effective_state(back)[n]) for n, v in effective_state(model).items())
        x = torch.randn(4, 1, 8, 8)
        assert torch.equal(back(x), model(x))
        assert contents.bytes == (tmp_path / "m.mgpack").stat().st_size
        assert 3 < contents.ratio < 5
        assert contents == inspect(tmp_path / "m.mgpack")

    def test_what_is_below_a_mask_is_not_stored(self, tmp_path: Path) -> None:
        model = lenet()
        mg.mask(model, {n: torch.zeros_like(p, dtype=torch.bool) for n, p in prunable_weights(model).items()})
        assert mg.pack(model, tmp_path / "m.mgpack").bytes < 4500  # biases: 410 numbers
        assert not any(layer.raw.any() for layer in prunable_layers(mg.unpack(tmp_path / "m.mgpack")).values())

    def test_rounding_leaves_the_model_and_shares_its_values(self, tmp_path: Path) -> None:
        model = masked(lenet())
        before = copy.deepcopy(model.state_dict())
        contents = mg.pack(model, tmp_path / "m.mgpack", bits={"fc3": 3, "*": 5})
        assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())
        back = mg.unpack(tmp_path / "m.mgpack")
        values = {n: w[w != 0].unique().numel() for n, w in effective_state(back).items() if w.ndim == 2}
        assert values == {"fc1.weight": 31, "fc2.weight": 31, "fc3.weight": 7}
        assert [entry.values for entry in contents.entries if entry.form == "shared"] == [32, 32, 8]
        assert mg.masks_of(back).same(mg.masks_of(model))
        assert contents.ratio > 12

    @pytest.mark.parametrize("graph", [False, True])
    def test_a_shrunk_model_returns(self, tmp_path: Path, graph: bool) -> None:
        class Fixed(nn.Module):  # a size in the forward, so that it comes back as a graph
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 6), nn.Linear(12, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(self.first(x).relu().unsqueeze(-1).expand(-1, 6, 2).reshape(-1, 12))

        build = Fixed if graph else lambda: mg.tasks.build("conv-2", classes=4, shape=(1, 8, 8))
        x = torch.randn(2, 4) if graph else torch.randn(2, 1, 8, 8)
        dense = build()
        small = mg.prune_channels(dense, x, mg.Budget(flops=0.6), round_to=1).eval()
        mg.pack(small, tmp_path / "m.mgpack")
        back = mg.unpack(tmp_path / "m.mgpack", build() if graph else None).eval()
        assert json.loads(json.dumps(plan_of(back).to_dict())) == json.loads(json.dumps(plan_of(small).to_dict()))
        assert torch.equal(back(x), small(x))

    def test_a_transformer_with_tied_weights_returns(self, tmp_path: Path) -> None:
        class Tiny(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(50, 16)
                self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
                self.head = nn.Linear(16, 50, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, tokens: Tensor) -> Tensor:
                return self.head(self.layer(self.embed(tokens)))

        model = masked(Tiny().eval(), 0.5)
        contents = mg.pack(model, tmp_path / "m.mgpack", bits=4)
        back = mg.unpack(tmp_path / "m.mgpack", Tiny().eval())
        assert {entry.form for entry in contents.entries if "embed" in entry.name or "head" in entry.name} == {"same", "shared"}
        assert back.head.weight.equal(back.embed.weight)
        assert encode(back) == (tmp_path / "m.mgpack").read_bytes()
        assert back(torch.arange(6)[None]).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_returns(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = masked(lenet().to(dtype))
        mg.pack(model, tmp_path / "m.mgpack", bits=4)
        back = mg.unpack(tmp_path / "m.mgpack", lenet().to(dtype))
        assert {v.dtype for v in effective_state(back).values()} == {dtype}
        assert encode(back) == (tmp_path / "m.mgpack").read_bytes()

    def test_a_users_parametrization_below_a_mask_returns(self, tmp_path: Path) -> None:
        def build() -> nn.Module:
            return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))

        model = masked(build().eval(), 0.5)
        mg.pack(model, tmp_path / "m.mgpack")
        back = mg.unpack(tmp_path / "m.mgpack", build().eval())
        assert all(same(v, back.state_dict()[n]) for n, v in model.state_dict().items())

    @pytest.mark.parametrize("bits", [None, 1, 5])
    def test_a_file_that_is_read_and_written_again_has_the_same_bytes(self, tmp_path: Path, bits: int | None) -> None:
        model = mg.tasks.build("conv-2", classes=10, shape=(3, 8, 8))
        mg.pack(masked(model), tmp_path / "one.mgpack", bits=bits)
        mg.pack(mg.unpack(tmp_path / "one.mgpack"), tmp_path / "two.mgpack")
        assert (tmp_path / "one.mgpack").read_bytes() == (tmp_path / "two.mgpack").read_bytes()

    def test_tensors_are_read_one_by_one(self, tmp_path: Path) -> None:
        model = masked(lenet())
        mg.pack(model, tmp_path / "m.mgpack")
        container = open_packed(tmp_path / "m.mgpack")
        tensor, kept = container.decoded("fc3.bias")
        assert same(tensor, model.state_dict()["fc3.bias"])
        assert kept.all()
        with pytest.raises(FileError, match="no tensor 'fc9'"):
            container.decoded("fc9")


class TestRefusals:
    def test_a_pruner_that_searches(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        mg.methods.Smart(model, pattern="block:2x2", density=0.5, total_steps=10)
        with pytest.raises(FileError, match=r"pruner.finish\(\)"):
            mg.pack(model, tmp_path / "m.mgpack")

    def test_bits_and_selectors(self, tmp_path: Path) -> None:
        with pytest.raises(MicrogliaError, match="1 to 8 bits; got 12"):
            mg.pack(lenet(), tmp_path / "m.mgpack", bits=12)
        with pytest.raises(MicrogliaError, match="meets no layer"):
            mg.pack(lenet(), tmp_path / "m.mgpack", bits={"fc7": 3})
        assert not list(tmp_path.iterdir())

    def test_kinds_of_numbers_that_no_file_holds(self) -> None:
        with pytest.raises(FileError, match="float8"):
            write_container({}, {"w": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)}, {})

    def test_a_model_of_ones_own_needs_the_model(self, tmp_path: Path) -> None:
        mg.pack(nn.Sequential(nn.Linear(4, 4)), tmp_path / "m.mgpack")
        with pytest.raises(FileError, match="pass a freshly built one"):
            mg.unpack(tmp_path / "m.mgpack")
        with pytest.raises(FileError, match="do not fit"):
            mg.unpack(tmp_path / "m.mgpack", nn.Sequential(nn.Linear(5, 4)))

    def test_missing_foreign_cut_and_newer_files(self, tmp_path: Path) -> None:
        data = encode(lenet())
        with pytest.raises(FileError, match="Cannot read"):
            mg.unpack(tmp_path / "missing")
        for content, text in (
            (b"PK\x03\x04", "not a packed model"),
            (data[:20], "ends within its header"),
            (data[:-1], "not the one that its header declares"),
            (data + b"\0", "not the one that its header declares"),
            (data[:8] + b"\x03" + data[9:], "version 3, this library reads up to 2: upgrade"),
            (data[:40] + bytes([data[40] ^ 1]) + data[41:], "does not match its check"),
            (data[:-5] + bytes([data[-5] ^ 1]) + data[-4:], "'fc3.bias' does not match its check"),
        ):
            (tmp_path / "m").write_bytes(content)
            with pytest.raises(FileError, match=text):
                mg.unpack(tmp_path / "m")

    def test_a_file_that_decodes_to_more_than_the_limit(self, tmp_path: Path) -> None:
        rows = write_container({"format": "microglia.model", "version": 1}, {"w": torch.zeros(8, 8)}, {})
        assert read_container(rows, tmp_path / "m", limit=256).size == len(rows)
        with pytest.raises(FileError, match="above the limit of 255"):
            read_container(rows, tmp_path / "m", limit=255)

    def test_the_contents_are_a_value(self, tmp_path: Path) -> None:
        contents = mg.pack(masked(lenet()), tmp_path / "m.mgpack", bits=4)
        assert isinstance(contents, Contents)
        told = contents.to_dict()
        assert told["bytes"] == sum(row["bytes"] for row in told["entries"]) + told["rest"]
        assert [row["name"] for row in told["entries"]][:2] == ["fc1.bias", "fc1.weight"]
