"""SNIP's recurrent nets: one bias per gate, weights counted, scored, masked and trained through a recipe; files; copies."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import microglia as mg
from microglia.core.layers import prunable_layers
from microglia.lab.execute import execute
from microglia.lab.recipe import resolve
from microglia.measure.macs import count_macs
from microglia.zoo import build

NAMES = pytest.mark.parametrize("name", ["lstm-s", "gru-s"])
GATES = {"lstm-s": 4, "gru-s": 3}


@NAMES
def test_every_gate_has_one_bias_and_the_state_both(name: str) -> None:
    model = build(name, shape=(1, 28, 28))
    assert [n for n, _ in model.rnn.named_parameters()] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0"]
    assert not model.state_dict()["rnn.bias_hh_l0"].any()
    other = build(name, shape=(1, 28, 28))
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 1, 28, 28)
    for twin in (other, copy.deepcopy(model), model.double().float()):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


@NAMES
def test_macs_are_those_of_every_product_of_every_row(name: str) -> None:
    model = build(name, shape=(1, 28, 28))
    counted = count_macs(model, torch.zeros(1, 1, 28, 28))
    assert counted.total == 28 * (28 * 128 + GATES[name] * 2 * 128 * 128) + 128 * 10
    assert set(counted.layers) == set(prunable_layers(model))


@NAMES
def test_the_rows_come_in_order_and_channels_side_by_side(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, shape=(2, 5, 4))
    x = torch.randn(3, 2, 5, 4)
    rows = torch.stack([model.embed(torch.cat([x[:, 0, r], x[:, 1, r]], 1)) for r in range(5)], 1)
    torch.testing.assert_close(model(x), model.linear(model.rnn(rows)[0][:, 4]))


@NAMES
def test_snip_scores_and_masks_recurrent_weights(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, shape=(1, 8, 8))
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    layers = prunable_layers(model)
    evidence = mg.scores.Evidence([(x, y)], functional.cross_entropy, generator=torch.Generator().manual_seed(0))
    found = mg.scores.scores["snip"](model, layers, evidence)
    functional.cross_entropy(model.train()(x), y).backward()
    for n, layer in layers.items():
        expected = (layer.raw * layer.raw.grad).abs()
        torch.testing.assert_close(found[n] / found[n].sum(), expected / expected.sum(), rtol=1e-4, atol=1e-9)
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0"} <= set(layers)


@pytest.mark.parametrize("name", ["lstm-s"])
def test_a_recipe_prunes_it_at_the_start_and_trains_it(name: str, tmp_path: Path) -> None:
    settings = {"density": 0.05, "score_batch_size": 100}
    training = {"epochs": 3, "lr": 0.1, "batch_size": 50, "max_batches": 6, "schedule": "constant"}
    recipe = resolve(
        {
            "model": name,
            "data": "digits",
            "method": "snip",
            "prune": settings,
            "train": training,
            "measure": {"latency": False},
            "threads": 1,
        }
    )
    result = execute(recipe, tmp_path / "run")
    weights = sum(layer.raw.numel() for layer in prunable_layers(build(name, shape=(1, 8, 8))).values())
    assert result["masks"]["kept"] == round(0.05 * weights)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    model = mg.load(tmp_path / "run" / "model")
    hidden = model.rnn.weight_hh_l0
    assert 0 < int(hidden.count_nonzero()) < 0.2 * hidden.numel()
    assert not model.state_dict()["rnn.bias_hh_l0"].any()
