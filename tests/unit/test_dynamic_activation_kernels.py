"""The kernel of thresholded activations: one function at every number of rows, kept where timing favours it."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import microglia as mg
from activation_models import TOKENS, drawn, llama, net
from microglia.core.timing import Timing
from microglia.dynamic import thresholded_layers, tune_activations
from microglia.runtime.operators import level
from microglia.runtime.sparse_layers.thresholded import thresholded

kernels = importlib.import_module("microglia.dynamic.activation_kernels")
needs_kernel = pytest.mark.skipif(level() == "torch", reason="there are no compiled kernels")
PAGE = Path(__file__).parent.parent.parent / "docs" / "language.md"


def fastest(chosen: str) -> Callable[..., dict[str, Timing]]:
    """Returns a clock by which one way is the fastest."""
    return lambda calls, **settings: {name: Timing(*[1.0 - 0.5 * (name == chosen)] * 3, 1) for name in calls}


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_same_function_at_every_number_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "time_interleaved", fastest("kernel"))
    model = mg.sparse_activations(net().to(dtype), [drawn(40, 12).to(dtype)], sparsity=0.5)
    plain, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    report = tune_activations(model)
    assert [entry.layers for entry in report] == [("0.weight",), ("2.weight",), ("4.weight",)]
    assert [entry.rows for entry in report] == [4] * 3
    called = []
    monkeypatch.setattr(torch.ops.microglia, "thresholded_linear", counted(torch.ops.microglia.thresholded_linear, called))
    near = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for rows, runs in ((1, 3), (3, 3), (4, 3), (5, 0), (64, 0)):
        x = drawn(rows, 12).to(dtype)
        called.clear()
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x), **near)
        assert len(called) == runs
    assert len(called) == 0
    model(drawn(1, 12).to(dtype)).sum().backward()  # with gradients it is the dense product
    assert len(called) == 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def counted(operator: Any, called: list[int]) -> Callable[..., Tensor]:
    def call(*given: Any) -> Tensor:
        called.append(1)
        return operator(*given)

    return call


@needs_kernel
def test_a_layer_keeps_the_kernel_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = mg.sparse_activations(net(), [drawn(40, 12)], sparsity=0.5)
    monkeypatch.setattr(kernels, "time_interleaved", fastest("kernel"))
    tune_activations(model)
    assert [layer.weight.stride() for layer in thresholded_layers(model).values()] == [(1, 40), (1, 24), (1, 5)]
    assert all(layer.weight.untyped_storage().nbytes() == 4 * layer.weight.numel() for layer in model if hasattr(layer, "rows"))
    again = mg.load(mg.save(model, tmp_path), net())
    assert torch.equal(again[0].weight, model[0].weight)
    assert [layer.rows for layer in thresholded_layers(again).values()] == [0] * 3
    monkeypatch.setattr(kernels, "time_interleaved", fastest("thresholded"))
    assert [entry.rows for entry in tune_activations(model)] == [0] * 3
    assert all(layer.weight.is_contiguous() for layer in thresholded_layers(model).values())


@needs_kernel
def test_masks_and_cuts_go_with_thresholds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "time_interleaved", fastest("kernel"))
    x = drawn(40, 12)
    model = mg.prune_channels(mg.sparse_activations(net(), [x]), x[:2], mg.Budget(params=0.5), round_to=1)
    mg.mask(model, {"2.weight": torch.rand(model[2].weight.shape) > 0.5})
    expected = model(x)
    assert torch.equal(mg.load(mg.save(model, tmp_path), net())(x), expected)
    assert [entry.layers for entry in tune_activations(model)] == [("0.weight",), ("4.weight",)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(row) for row in x.split(1)]), expected)


@needs_kernel
def test_timed_inputs_have_the_sparsity_of_the_layer() -> None:
    model = mg.sparse_activations(net(), [drawn(40, 12)], sparsity=0.7)
    x = kernels._inputs(model[2], 3, torch.Generator().manual_seed(0))
    assert (x.abs() <= model[2].threshold).sum(1).tolist() == [28] * 3


@needs_kernel
def test_a_decoder_generates_the_same_tokens_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    model = mg.sparse_activations(llama(), TOKENS, sparsity=0.3, exclude=["lm_head"])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(TOKENS[0]["input_ids"][:1, :5], **settings)
    monkeypatch.setattr(kernels, "time_interleaved", fastest("kernel"))
    assert {entry.rows for entry in tune_activations(model)} == {4}
    called: list[int] = []
    monkeypatch.setattr(torch.ops.microglia, "thresholded_linear", counted(torch.ops.microglia.thresholded_linear, called))
    assert torch.equal(model.generate(TOKENS[0]["input_ids"][:1, :5], **settings), expected)
    assert len(called) == 5 * 14  # the prompt has more rows than the kernel takes


def test_without_kernels_nothing_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "level", lambda: "torch")
    model = mg.sparse_activations(net(), [drawn(40, 12)])
    assert tune_activations(model) == []
    assert model[0].rows == 0


def test_an_accelerated_model_keeps_its_thresholds() -> None:
    model, x = mg.sparse_activations(net(), [drawn(40, 12)], sparsity=0.5), drawn(1, 12)
    fast = mg.accelerate(model, x, cache=None, rounds=1, against=("eager",))
    torch.testing.assert_close(fast(x), model(x))


def test_thresholded_keeps_nan_and_drops_the_threshold_itself() -> None:
    x = torch.tensor([0.5, -0.5, 0.51, float("nan"), float("-inf"), 0.0])
    assert torch.equal(thresholded(x, 0.5).nan_to_num(7), x.nan_to_num(7).masked_fill(x.abs() <= 0.5, 0))


def test_the_code_of_the_page_runs() -> None:
    pytest.importorskip("transformers")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (code,) = (block for block in blocks if "sparse_activations" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(thresholded_layers(names["model"])) == 14
