"""Activation sparsity: thresholds are quantiles, and greedy shares are no worse than uniform ones."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from activation_models import TOKENS, Alone, Stack, drawn, llama, net
from microglia.core.errors import BudgetError, FileError, MicrogliaError, SelectorError, UnknownNameError
from microglia.dynamic import ThresholdedLinear, thresholded_layers
from microglia.dynamic.activation_rules import rules

activations = importlib.import_module("microglia.dynamic.activations")


@pytest.fixture(scope="module")
def decoder() -> Any:
    pytest.importorskip("transformers")
    return llama()


def read_by(model: nn.Module, batches: list[Any]) -> dict[str, list[Tensor]]:
    """Returns what each linear layer reads when nothing is dropped."""
    dense, found = copy.deepcopy(model), {}
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Linear):
            if isinstance(layer, ThresholdedLinear):
                layer.threshold.zero_()
            layer.register_forward_pre_hook(lambda m, args, name=name: found.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in batches:
            mg.core.batch.call(dense, batch)
    return found


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_thresholds_are_the_quantiles_of_the_calibration_data(sparsity: float) -> None:
    batches = [drawn(30, 12), drawn(50, 12)]
    model = mg.sparse_activations(net(), batches, sparsity=sparsity)
    for name, inputs in read_by(model, batches).items():
        layer, values = model.get_submodule(name), torch.cat(inputs).abs()
        dropped = int((values <= layer.threshold).sum())
        assert abs(dropped - sparsity * values.numel()) <= 1
        assert layer.sparsity == sparsity


def test_padding_does_not_count() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(input_ids)

    x, mask = drawn(4, 6, 8), torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    x[:, 4:] *= 100
    model = mg.sparse_activations(Embedded(), [{"input_ids": x, "attention_mask": mask}])
    assert int((x[:, :4].abs() <= model.layer.threshold).sum()) == x[:, :4].numel() // 2


def test_many_activations_are_sampled_from_all_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "KEPT", 3000)
    loud = torch.ones(8)
    loud[::2] = 1000  # every second channel would be a biased sample
    batches = [drawn(500, 8) * loud for _ in range(4)]
    model = mg.sparse_activations(nn.Sequential(nn.Linear(8, 2)), batches, sparsity=0.3)
    share = (torch.cat(batches).abs() <= model[0].threshold).float().mean()
    assert share == pytest.approx(0.3, abs=0.04)


def test_no_sparsity_is_the_dense_model_to_the_bit(decoder: Any) -> None:
    model = mg.sparse_activations(copy.deepcopy(decoder), TOKENS, sparsity=0.0)
    with torch.no_grad():
        assert torch.equal(model(**TOKENS[0]).logits, decoder(**TOKENS[0]).logits)
    assert len(thresholded_layers(model)) == 15


def test_outputs_are_those_of_the_dense_layer_on_a_thresholded_input() -> None:
    model, x = mg.sparse_activations(net(), [drawn(64, 12)], sparsity=0.6), drawn(9, 12)
    x[0, 0] = float("nan")
    expected = x
    for part in model:
        small = expected.abs() <= part.threshold if isinstance(part, ThresholdedLinear) else None
        expected = (
            part(expected) if small is None else nn.functional.linear(expected.masked_fill(small, 0), part.weight, part.bias)
        )
    torch.testing.assert_close(model(x), expected, equal_nan=True)
    assert model(x)[0].isnan().all()
    model(x[1:]).sum().backward()
    assert model[0].weight.grad.isfinite().all()


def block_errors(dense: Stack, sparse: Stack, batches: list[Tensor]) -> list[float]:
    """Returns the squared error of each block's output where all blocks before it are dense."""
    errors, hidden = [], batches
    with torch.no_grad():
        for one, other in zip(dense.blocks, sparse.blocks, strict=True):
            errors.append(sum(float((one(h) - other(h)).square().sum()) for h in hidden))
            hidden = [one(h) for h in hidden]
    return errors


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_greedy_takes_from_the_quiet_layer_and_has_no_larger_error_than_uniform(sparsity: float) -> None:
    dense, batches = Stack(), [drawn(5, 16), drawn(7, 16)]
    same, shared = (
        mg.sparse_activations(copy.deepcopy(dense), batches, sparsity=sparsity, rule=rule, step=0.2, exclude=["head"])
        for rule in ("uniform", "greedy")
    )
    for one, other in zip(block_errors(dense, shared, batches), block_errors(dense, same, batches), strict=True):
        assert one <= other
    for block in shared.blocks:
        assert block.quiet.sparsity == pytest.approx(min(1.0, 2 * sparsity))
        assert block.loud.sparsity == pytest.approx(max(0.0, 2 * sparsity - 1), abs=1e-6)
    assert type(shared.head) is nn.Linear


def test_greedy_shares_out_the_same_number_of_weights_in_layers_of_all_sizes(decoder: Any) -> None:
    model = mg.sparse_activations(copy.deepcopy(decoder), TOKENS, sparsity=0.4, rule="greedy", step=0.5, exclude=["lm_head"])
    layers = thresholded_layers(model)
    assert len(layers) == 14
    for index in range(2):
        inside = {name: layer for name, layer in layers.items() if f"layers.{index}." in name}
        left = sum(layer.sparsity * layer.weight.numel() for layer in inside.values())
        assert left == pytest.approx(0.4 * sum(layer.weight.numel() for layer in inside.values()))
        assert len({round(layer.sparsity, 4) for layer in inside.values()}) > 1


def test_a_greedy_share_that_is_worse_than_uniform_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("microglia.dynamic.activation_rules")
    error = module._Block.error
    monkeypatch.setattr(module._Block, "error", lambda self, shares: error(self, shares) * (len(set(shares.values())) > 1))
    model = mg.sparse_activations(Stack(), [drawn(5, 16)], sparsity=0.3, rule="greedy", step=0.5)
    assert {layer.sparsity for layer in thresholded_layers(model).values()} == {0.3}


def test_called_again_it_calibrates_the_dense_model() -> None:
    batches = [drawn(40, 12)]
    twice = mg.sparse_activations(net(), batches, sparsity=0.8)
    twice = mg.sparse_activations(twice, batches, sparsity=0.5)
    once = mg.sparse_activations(net(), batches, sparsity=0.5)
    assert {n: float(p.threshold) for n, p in thresholded_layers(twice).items()} == {
        n: float(p.threshold) for n, p in thresholded_layers(once).items()
    }
    kept = copy.deepcopy(once.state_dict())
    with pytest.raises(MicrogliaError):
        mg.sparse_activations(once, [drawn(4, 13)])
    assert all(torch.equal(value, kept[name]) for name, value in once.state_dict().items())


def test_a_rule_from_outside_is_a_value_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_items", dict(rules._items))
    rules.add("last alone")(lambda calibration, sparsity: {list(calibration.layers)[-1]: sparsity})
    model = mg.sparse_activations(net(), [drawn(8, 12)], rule="last alone", sparsity=0.25)
    assert list(thresholded_layers(model)) == ["4.weight"]
    with pytest.raises(UnknownNameError, match=r"no rule for activations named 'greddy'.*'greedy'"):
        mg.sparse_activations(net(), [drawn(8, 12)], rule="greddy")


def test_wrong_input_is_one_sentence() -> None:
    x = [drawn(4, 12)]
    for wrong in (-0.1, 1.0, 2):
        with pytest.raises(BudgetError, match=f"at least 0 and below 1; got {wrong}"):
            mg.sparse_activations(net(), x, sparsity=wrong)
    with pytest.raises(BudgetError, match="step is the growth"):
        mg.sparse_activations(net(), x, rule="greedy", step=0)
    with pytest.raises(MicrogliaError, match="give at least one batch"):
        mg.sparse_activations(net(), [])
    with pytest.raises(SelectorError, match=r"No layer of nn\.Linear is chosen"):
        mg.sparse_activations(nn.Sequential(nn.Conv2d(1, 2, 3)), [drawn(1, 1, 5, 5)])
    with pytest.raises(SelectorError, match="meets no layer"):
        mg.sparse_activations(net(), x, layers=["none"])
    with pytest.raises(SelectorError, match="no blocks to find"):
        mg.sparse_activations(Alone(), x, rule="greedy", exclude=["unused"])
    with pytest.raises(MicrogliaError, match="does not take a calibration batch, a tensor of shape"):
        mg.sparse_activations(net(), [drawn(4, 13)])
    broken, masked = net(), net()
    nn.init.constant_(broken[2].bias, float("inf"))
    mg.mask(masked, {"0.weight": torch.rand(40, 12) > 0.5})
    with pytest.raises(MicrogliaError, match=r"4\.weight reads numbers that are not finite"):
        mg.sparse_activations(broken, x)
    with pytest.raises(MicrogliaError, match=r"unused\.weight reads nothing"):
        mg.sparse_activations(Alone(), x)
    with pytest.raises(SelectorError, match=r"microglia\.fold"):
        mg.sparse_activations(masked, x)


def test_saved_and_loaded_with_its_thresholds(tmp_path: Path) -> None:
    model, x = mg.sparse_activations(net(), [drawn(40, 12)], sparsity=0.5), drawn(3, 12)
    again = mg.load(mg.save(model, tmp_path), net())
    assert torch.equal(again(x), model(x))
    assert [layer.sparsity for layer in thresholded_layers(again).values()] == [0.5] * 3
    assert not torch.equal(again(x), net()(x))
    plan = tmp_path / "plan.json"
    text = plan.read_text()
    for damaged in ('{"0.weight": 2}', '{"1.weight": 0.5}', "[]"):
        start, _, rest = text.partition('"activations": ')
        plan.write_text(f'{start}"activations": {damaged}{rest[rest.index("}") + 1 :]}')
        with pytest.raises(FileError):
            mg.load(tmp_path, net())
    with pytest.raises(FileError, match="no linear layer of Sequential"):
        mg.storage.changes.replay(nn.Sequential(nn.Conv1d(1, 1, 1)), mg.storage.changes.decode(
            {"activations": {"0.weight": 0.5}}, {"0.threshold": torch.tensor(0.5)}))  # fmt: skip
