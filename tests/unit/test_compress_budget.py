"""Budgets of bytes: the choice of bits, the allocation, and `deep-compression` with a size or a loss of accuracy."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import microglia as mg
from microglia.compress import bits_for, encode, inspect, rounded
from microglia.compress.bit_budget import Choice, allot, choices, second_order
from microglia.compress.tensors import encode_tensor, stored_bytes
from microglia.core.errors import BudgetError, MicrogliaError
from microglia.core.layers import prunable_layers
from microglia.core.masks import masks_of
from microglia.lab.recipe import resolve
from microglia.methods import Packed
from microglia.scores import Evidence


def network() -> nn.Module:
    """Two large layers, of which one has large weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50))
    with torch.no_grad():
        model[2].weight *= 10
    return model


def data() -> Evidence:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 40, generator=generator), torch.randint(50, (16,), generator=generator)
    return Evidence([(x, y)], functional.cross_entropy)


def pruned() -> nn.Module:
    model = network()
    mg.methods.OneShot(model, density=0.3, scope="layer").finish()
    return model


def curves(sizes: list[list[tuple[int, float]]]) -> dict[str, list[Choice]]:
    return {f"l{n}": [Choice(b, *pair) for b, pair in enumerate(rows, 1)] for n, rows in enumerate(sizes)}


def best(given: dict[str, list[Choice]], room: int) -> float:
    """The lowest error of all combinations that fit."""
    fitting = [c for c in itertools.product(*given.values()) if sum(x.bytes for x in c) <= room]
    return min(sum(x.error for x in c) for c in fitting)


@pytest.mark.parametrize("seed", range(6))
def test_the_allocation_is_near_the_best_combination_and_never_above_the_room(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = [
        [(round(size * bits / 8), float(scale * 4.0**-bits * random.uniform(0.7, 1.3))) for bits in range(1, 7)]
        for size, scale in zip(random.integers(200, 2000, 4), random.uniform(1, 100, 4), strict=True)
    ]
    given = curves(rows)
    least = sum(r[0].bytes for r in given.values())
    errors = []
    for room in (least, least + 300, 2 * least, 4 * least, 10 * least):
        bits = allot(given, room)
        assert bits is not None
        chosen = [given[name][number - 1] for name, number in bits.items()]
        assert sum(c.bytes for c in chosen) <= room
        errors.append(sum(c.error for c in chosen))
        assert errors[-1] <= 1.6 * best(given, room)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(best(given, 10**9))  # room for all
    assert allot(given, least - 1) is None


def test_rows_that_are_not_convex_or_not_monotone() -> None:
    given = curves([[(10, 9.0), (20, 8.9), (30, 1.0)], [(10, 5.0), (10, 4.0), (25, 6.0)]])
    assert allot(given, 20) == {"l0": 1, "l1": 2}
    assert allot(given, 40) == {"l0": 3, "l1": 2}
    assert allot(given, 30) == {"l0": 2, "l1": 2}  # the corner at 30 bytes does not fit: a single step fills the rest


@pytest.mark.parametrize("masked", [False, True])
def test_the_bytes_of_a_choice_are_those_of_its_part(masked: bool) -> None:
    model = pruned()
    layers, masks = prunable_layers(model), masks_of(model) if masked else {}
    for name, rows in choices(layers, masks).items():
        for row in rows:
            small = prunable_layers(rounded(model, {name: row.bits}))[name].weight.detach()
            part = encode_tensor(small, masks[name] if masked else None)[1]
            assert abs(row.bytes - len(part)) <= 2 * (1 + small.numel() // 1024)
            assert row.bytes == stored_bytes(small, masks[name] if masked else None)
            assert row.error == pytest.approx(float((small - layers[name].weight.detach()).square().sum()), rel=1e-4)


def test_the_second_order_error_is_the_loss_of_a_quadratic_model() -> None:
    model = pruned().eval()
    layers, evidence = prunable_layers(model), data()
    found = choices(layers, masks_of(model), saliency=second_order(model, layers, evidence))
    (x, y) = next(iter(evidence.batches))
    squares = {name: torch.zeros(layer.shape) for name, layer in layers.items()}
    for one, target in zip(x, y, strict=True):
        weights = [layer.weight for layer in layers.values()]
        hidden = functional.relu(functional.linear(one, weights[0], model[0].bias))
        loss = functional.cross_entropy(functional.linear(hidden, weights[1], model[2].bias), target)
        for name, gradient in zip(layers, torch.autograd.grad(loss, weights), strict=True):
            squares[name] += gradient.square() / len(x)
    for name, rows in found.items():
        small = prunable_layers(rounded(model, {name: 3}))[name].weight.detach()
        expected = float((squares[name] * (small - layers[name].weight.detach()).square()).sum()) / 2
        assert rows[2].error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("known", [False, True])
def test_a_file_of_a_number_of_bytes(tmp_path: Path, known: bool) -> None:
    model = pruned()
    before = copy.deepcopy(model.state_dict())
    sizes = {bits: len(encode(model, bits=bits)) for bits in (2, 4, 6)}
    evidence = data() if known else None
    for target in (sizes[2] + 100, (sizes[2] + sizes[4]) // 2, sizes[4], (sizes[4] + sizes[6]) // 2):
        contents = mg.pack(model, tmp_path / "m", budget=mg.Budget(bytes=target), evidence=evidence)
        assert 0.9 * target < contents.bytes <= target
        assert (tmp_path / "m").stat().st_size == contents.bytes == inspect(tmp_path / "m").bytes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bits = bits_for(model, mg.Budget(bytes=(sizes[2] + sizes[4]) // 2))
    assert bits["2.weight"] > bits["0.weight"]  # its weights are ten times as large
    steps = contents.steps()
    assert steps["dense"] > steps["pruned"] > steps["shared"] > steps["coded"] * 0.9


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (lambda m: encode(m, budget=mg.Budget(bytes=500)), r"A file of 500 bytes is too small .* it has [\d,]+"),
        (lambda m: encode(m, budget=mg.Budget(bytes=5000), bits=3), "leave bits out; got bits=3"),
        (lambda m: encode(m, budget=mg.Budget(density=0.5)), "bytes alone"),
        (lambda m: encode(m, budget=mg.Budget(density=0.5, bytes=9000)), "bytes alone"),
        (lambda m: mg.Budget(bytes=0), "whole number"),
        (lambda m: mg.Budget(bytes=2.5), "whole number"),
        (lambda m: mg.Budget(bytes=9).kept_weights(5, 5), "microglia.pack"),
        (lambda m: mg.prune_channels(m, torch.zeros(1, 40), mg.Budget(bytes=9000)), "microglia.pack"),
        (lambda m: encode(nn.BatchNorm1d(3), budget=mg.Budget(bytes=9000)), "No layer is left to prune"),
        (lambda m: mg.methods.DeepCompressionConfig(bytes=900, within=0.5), "not both"),
        (lambda m: mg.methods.DeepCompressionConfig(bytes=900, bits=3), "leave bits out"),
        (lambda m: mg.methods.DeepCompressionConfig(within=0.5, bits=3), "leave bits out"),
        (lambda m: mg.methods.DeepCompressionConfig(within=0.5, params=0.1), "got params=0.1"),
        (lambda m: mg.methods.DeepCompressionConfig(within=0.5, pattern="nm:2:4"), "density of its own"),
        (lambda m: mg.methods.DeepCompressionConfig(within=float("nan")), "number of points"),
        (lambda m: mg.methods.DeepCompressionConfig(within=0.5, factor=1.0), "factor in"),
        (lambda m: mg.methods.DeepCompressionConfig(bytes=900, bit_error="guess"), "second-order"),
    ],
)
def test_wrong_budgets_end_in_a_sentence(work: object, text: str) -> None:
    with pytest.raises(MicrogliaError, match=text):
        work(network())  # type: ignore[operator]


def recipe(**prune: object) -> mg.Recipe:
    return resolve(
        {
            "model": "lenet-300-100", "data": "digits", "method": "deep-compression",
            "dense": {"epochs": 4}, "train": {"epochs": 2}, "measure": {"latency": False}, "seed": 1,
            "prune": {"share": {"epochs": 1}, **prune},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file keep their common dense network."""
    return tmp_path_factory.mktemp("starts")


@pytest.mark.parametrize("prune", [{"bytes": 8000}, {"bytes": 8000, "density": 0.1, "bit_error": "weights"}])
def test_a_run_of_a_number_of_bytes(tmp_path: Path, starts: Path, prune: dict[str, object]) -> None:
    result = mg.execute(recipe(**prune), tmp_path / "run", starts=starts)
    found = result.observed(Packed)
    assert found is not None
    assert 7000 < found.bytes <= 8000
    assert found.bytes == (tmp_path / "run" / "model.mgpack").stat().st_size
    assert result.asked["bytes"] == 8000
    density = mg.masks_of(mg.unpack(tmp_path / "run" / "model.mgpack")).density
    if "density" in prune:
        assert density == pytest.approx(0.1, abs=1e-4)
    else:
        assert 0.05 < density < 0.4  # without a density, it follows from the bytes
    assert found.steps["pruned"] > found.steps["shared"] > found.bytes


def test_the_smallest_file_within_a_loss_of_accuracy(tmp_path: Path, starts: Path) -> None:
    asked = {"within": 6.0, "density": 0.3, "factor": 0.4, "rounds": 4}
    result = mg.execute(recipe(**asked), tmp_path / "run", starts=starts)
    found = result.observed(Packed)
    assert found is not None
    passed = [one for one in found.rounds if one.within]
    assert [one.density for one in found.rounds] == pytest.approx([0.3 * 0.4**n for n in range(len(found.rounds))])
    assert found.bytes == passed[-1].bytes == min(one.bytes for one in passed if one.bytes)
    assert all(one.lost <= 6.0 for one in passed)
    assert found.rounds[-1].within == (len(found.rounds) == 4)
    assert len(passed) >= 2  # so that there was something to choose among
    # The test images are never asked: their metrics are stored once, of the dense and of the final model.
    assert {p.stem for p in (tmp_path / "run" / "stages").glob("*-observed.safetensors")} == {
        "dense-observed",
        "pruned-observed",
    }
    (tmp_path / "run" / "result.json").unlink()
    for stage in ("packed", "share-2", "bits-2", "pruned-observed"):
        (tmp_path / "run" / "stages" / f"{stage}.safetensors").unlink()
    assert mg.execute(recipe(**asked), tmp_path / "run", starts=starts)["packed"] == result["packed"]


def test_a_loss_that_no_round_keeps_ends_in_a_sentence(starts: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="begin at a higher density, train longer, or allow more"):
        mg.execute(recipe(within=-90.0), tmp_path / "run", starts=starts)


def test_a_number_of_bytes_below_the_rest_of_the_file(starts: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="almost without weights"):
        mg.execute(recipe(bytes=300), tmp_path / "run", starts=starts)
