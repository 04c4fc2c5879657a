"""Linear layers that stay in codes: equal outputs at every level, and a candidate of `accelerate` for few values."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import MicrogliaError
from microglia.runtime.candidates import candidates
from microglia.runtime.dense.fusion import Activation, Site
from microglia.runtime.operators import LEVELS, kernels
from microglia.runtime.report import is_dense
from microglia.runtime.sparse_layers import codes as module
from microglia.runtime.sparse_layers.codes import CodeLinear, code_bits, code_linear, from_codes, to_codes

accelerating = importlib.import_module("microglia.runtime.accelerate")
compiled = pytest.mark.skipif(module._kernel() is None, reason="the compiled kernels have no layer of codes")
GENERATOR = torch.Generator().manual_seed(0)
LEVEL = range(max(1, LEVELS.index(kernels()[0])))


def weight(outputs: int, inputs: int, values: int) -> Tensor:
    table = torch.randn(values, generator=GENERATOR)
    return table[torch.randint(values, (outputs, inputs), generator=GENERATOR)]


def site(outputs: int = 40, inputs: int = 30, values: int = 16, rows: int = 1, activation: str = "relu") -> Site:
    bias = torch.randn(outputs, generator=GENERATOR)
    return Site("fc", "linear", weight(outputs, inputs, values), bias, (rows, inputs), (rows, outputs), Activation(activation))


SHAPES = [(1, 1, 2), (3, 15, 16), (5, 16, 16), (40, 33, 5), (7, 64, 200), (9, 100, 256), (2, 17, 17)]


@pytest.mark.parametrize(("outputs", "inputs", "values"), SHAPES)
def test_codes_give_the_weight_back(outputs: int, inputs: int, values: int) -> None:
    dense = weight(outputs, inputs, values)
    bits = 4 if values <= 16 else 8
    codes, table = to_codes(dense, bits)
    assert codes.shape == (outputs, -(-inputs // 16) * 2 * bits)
    assert torch.equal(from_codes(codes, table, inputs), dense)


@pytest.mark.parametrize("level", [*LEVEL, 99])
@pytest.mark.parametrize(("outputs", "inputs", "values"), SHAPES)
def test_outputs_are_equal_at_every_level(level: int, outputs: int, inputs: int, values: int) -> None:
    dense, bias = weight(outputs, inputs, values), torch.randn(outputs, generator=GENERATOR)
    codes, table = to_codes(dense, 4 if values <= 16 else 8)
    for shape in ((inputs,), (1, inputs), (2, 3, inputs), (0, inputs)):
        x = torch.randn(shape, generator=GENERATOR)
        for shift in (bias, None):
            found = code_linear(x, codes, table, shift, inputs, level=level)
            torch.testing.assert_close(found, functional.linear(x, dense, shift), rtol=1e-4, atol=1e-4)
    turned = torch.randn(inputs, 4, generator=GENERATOR).t()  # its rows are not contiguous
    torch.testing.assert_close(
        code_linear(turned, codes, table, None, inputs, level=level), turned @ dense.t(), rtol=1e-4, atol=1e-4
    )


def test_the_operator_has_a_shape_for_compilers_and_refuses_other_shapes() -> None:
    layer = CodeLinear(site(), 4)
    assert torch.ops.microglia.code_linear(torch.ones(5, 30, device="meta"), *(
        t.to("meta") for t in (layer.codes, layer.table, layer.bias)), 30).shape == (5, 40)  # fmt: skip
    with pytest.raises(MicrogliaError, match="do not fit inputs"):
        code_linear(torch.ones(1, 31), layer.codes, layer.table, None, 31 + 16)
    with pytest.raises(MicrogliaError, match="16 values apart; the weight has 20"):
        to_codes(torch.arange(20.0).view(2, 10), 4)


@compiled
@pytest.mark.parametrize(
    ("given", "bits"),
    [
        (site(), 4),
        (site(values=17), 8),
        (site(values=256, outputs=300), 8),
        (site(values=300, outputs=300), None),
        (site(rows=5), None),
        (Site("c", "conv2d", weight(8, 4, 3)[..., None, None], None, (1, 4, 5, 5), (1, 8, 5, 5)), None),
    ],
)
def test_layers_of_few_values_and_few_examples_are_tried(given: Site, bits: int | None) -> None:
    assert code_bits(given) == bits
    names = [candidate.name for candidate in candidates(given)]
    assert [name for name in names if name.startswith("codes")] == ([] if bits is None else [f"codes {bits} bits"])
    assert not any(is_dense(name) for name in names if name.startswith("codes"))
    if bits is not None:
        x, other = torch.randn(given.input_shape), torch.randn(given.output_shape)
        expected = functional.linear(x, given.weight, given.bias)
        made = next(candidate for candidate in candidates(given) if candidate.name.startswith("codes")).make()
        torch.testing.assert_close(made(x), expected.relu(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made(x, other), (expected + other).relu(), rtol=1e-4, atol=1e-4)


@compiled
def test_accelerate_takes_an_unpacked_layer_in_codes(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from microglia.core.timing import Timing

    def times(calls: dict[str, object], **settings: object) -> dict[str, Timing]:
        chosen = ("codes 4 bits", "sparse")
        return {name: Timing(*[1.0 - 0.5 * (name in chosen)] * 3, 1) for name in calls}

    monkeypatch.setattr(accelerating, "time_interleaved", times)
    torch.manual_seed(0)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(50, 70), nn.ReLU(), nn.Linear(70, 10)).eval()

    mg.pack(net(), f"{tmp_path}/model", bits=4)
    model, x = mg.unpack(f"{tmp_path}/model", net()), torch.randn(1, 50)
    fast = accelerating.accelerate(model, x, against=("eager", "packed"), cache=None)
    assert [layer.chosen for layer in fast.report().layers] == ["codes 4 bits", "codes 4 bits"]
    assert sum(isinstance(part, CodeLinear) for part in fast.fast.modules()) == 2
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
