"""The bytes of AlexNet and VGG-16 at their published densities and bits, a hundredth of their size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from microglia.compress import Container
from microglia.compress.container import read_container, write_container
from microglia.storage.archive import described

SCALE = 64
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deep_compression_bytes", ROOT / "benchmarks" / "deep_compression_bytes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["AlexNet", "VGG-16"])
def test_the_table_of_the_paper_adds_up(benchmark: ModuleType, name: str) -> None:
    layers = benchmark.NETWORKS[name]
    total = sum(layer.size for layer in layers)
    rates = total / sum(layer.rate * layer.size for layer in layers)
    assert rates == pytest.approx({"AlexNet": 34.5, "VGG-16": 52.7}[name], rel=0.01)
    assert rates == pytest.approx(benchmark.PUBLISHED[name], rel=0.1)  # the rows for VGG-16 add up to less than its total
    kept = sum(layer.density * layer.size for layer in layers) / total
    assert kept == pytest.approx({"AlexNet": 0.11, "VGG-16": 0.075}[name], rel=0.06)


@pytest.mark.parametrize("name", ["AlexNet", "VGG-16"])
def test_the_file_has_the_bytes_of_the_formula_and_the_published_ratio(benchmark: ModuleType, name: str) -> None:
    sizes = {}
    for published in (False, True):
        random = np.random.default_rng(0)
        layers = [benchmark.scaled(layer, SCALE) for layer in benchmark.NETWORKS[name]]
        state = {layer.name: benchmark.weight_of(layer, random, published) for layer in layers}
        counted = {n: benchmark.counted(weight) for n, weight in state.items()}
        assert all(0 <= c.stored - c.formula <= c.blocks for c in counted.values())
        data = write_container(described(torch.nn.Linear(1, 1))[1], state, {})
        file = read_container(data, Path("file"))
        assert {n: len(part) for n, part in file.parts.items()} == {n: c.stored for n, c in counted.items()}
        assert 0 < len(data) - sum(c.stored for c in counted.values()) < 200 + 90 * len(state)
        assert same(file, state)
        sizes[published] = sum(c.stored for c in counted.values()) + benchmark.biases(name, SCALE)
    dense = sum(4 * layer.size for layer in layers) + benchmark.biases(name, SCALE)
    assert dense / sizes[True] == pytest.approx(benchmark.PUBLISHED[name], rel=0.1)
    assert sizes[True] < sizes[False]  # positions of a lower entropy cost fewer bits than random ones


def same(file: Container, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(file.decoded(name)[0], weight) for name, weight in state.items())
