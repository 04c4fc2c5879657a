"""Claim: AlexNet and VGG-16 at the published densities and bits take the published bytes, 35 and 49 times fewer than dense.

The weights are synthetic: at each layer's published density, with codes of its published bits. Three files are counted.

    random       positions are independent, and codes follow a Laplace distribution of the published entropy
    published    gaps and codes have the published entropies for each stored symbol (fillers included)
    paper        bytes by the paper's own rates of each layer, for comparison

Random positions at density p cost H(p)/p bits for each kept weight, more than the paper's: trained networks keep weights in
clusters, such as rows of used inputs. So the published entropy is an assumption about positions, and not a result. Gaps of that
entropy are drawn from two geometric laws, half of them from each, whose common mean is 1/p.

The formula counts Huffman lengths, codebooks and code tables; the file has the padding of each block of 1,024 symbols besides.

    python benchmarks/deep_compression_bytes.py            # full size: 61 and 138 million weights
    python benchmarks/deep_compression_bytes.py --scale 8  # layers of an eighth of the weights

Source: Han, Mao and Dally 2016, "Deep Compression", tables 4 and 5.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microglia.compress.entropy import BLOCK, code_lengths
from microglia.compress.relative_index import gap_counts
from microglia.compress.tensors import encode_tensor

PUBLISHED = {"AlexNet": 35.0, "VGG-16": 49.0}


@dataclass(frozen=True)
class Layer:
    """One layer of the paper's tables.

    Attributes:
        name: Its name.
        shape: Shape of its weight.
        density: Kept fraction.
        bits: Bits of a code before Huffman coding.
        code_bits: Bits of a code after it.
        gap_bits: Bits of a gap before it.
        index_bits: Bits of a gap after it.
        rate: Size over dense size, all coded.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    bits: int
    code_bits: float
    gap_bits: int
    index_bits: float
    rate: float

    @property
    def size(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)


def _layers(gap_bits: int, *rows: tuple[str, tuple[int, ...], float, int, float, float, float]) -> list[Layer]:
    return [Layer(n, s, d / 100, b, c, gap_bits, i, rate / 100) for n, s, d, b, c, i, rate in rows]


NETWORKS = {
    "AlexNet": _layers(
        4,
        ("conv1", (96, 3, 11, 11), 84, 8, 6.3, 1.2, 20.53),
        ("conv2", (256, 48, 5, 5), 38, 8, 5.5, 2.3, 9.43),
        ("conv3", (384, 256, 3, 3), 35, 8, 5.1, 2.6, 8.44),
        ("conv4", (384, 192, 3, 3), 37, 8, 5.2, 2.5, 9.11),
        ("conv5", (256, 192, 3, 3), 37, 8, 5.6, 2.5, 9.43),
        ("fc6", (4096, 9216), 9, 5, 3.9, 3.2, 2.39),
        ("fc7", (4096, 4096), 9, 5, 3.6, 3.7, 2.46),
        ("fc8", (1000, 4096), 25, 5, 4.0, 3.2, 5.85),
    ),
    "VGG-16": _layers(
        5,
        ("conv1_1", (64, 3, 3, 3), 58, 8, 6.8, 1.7, 29.97),
        ("conv1_2", (64, 64, 3, 3), 22, 8, 6.5, 2.6, 6.99),
        ("conv2_1", (128, 64, 3, 3), 34, 8, 5.6, 2.4, 8.91),
        ("conv2_2", (128, 128, 3, 3), 36, 8, 5.9, 2.3, 9.31),
        ("conv3_1", (256, 128, 3, 3), 53, 8, 4.8, 1.8, 11.15),
        ("conv3_2", (256, 256, 3, 3), 24, 8, 4.6, 2.9, 5.67),
        ("conv3_3", (256, 256, 3, 3), 42, 8, 4.6, 2.2, 8.96),
        ("conv4_1", (512, 256, 3, 3), 32, 8, 4.6, 2.6, 7.29),
        ("conv4_2", (512, 512, 3, 3), 27, 8, 4.2, 2.9, 5.93),
        ("conv4_3", (512, 512, 3, 3), 34, 8, 4.4, 2.5, 7.47),
        ("conv5_1", (512, 512, 3, 3), 35, 8, 4.7, 2.5, 8.00),
        ("conv5_2", (512, 512, 3, 3), 29, 8, 4.6, 2.7, 6.52),
        ("conv5_3", (512, 512, 3, 3), 36, 8, 4.6, 2.3, 7.79),
        ("fc6", (4096, 25088), 4, 5, 3.6, 3.5, 1.10),
        ("fc7", (4096, 4096), 4, 5, 4.0, 4.3, 1.25),
        ("fc8", (1000, 4096), 23, 5, 4.0, 3.4, 5.24),
    ),
}


def scaled(layer: Layer, scale: int) -> Layer:
    """Returns a layer of about 1/scale of the weights: of fewer outputs."""
    return Layer(**{**vars(layer), "shape": (max(1, layer.shape[0] // scale), *layer.shape[1:])})


def entropy(chances: np.ndarray) -> float:
    """Returns the entropy of a distribution in bits."""
    used = chances[chances > 0]
    return float(-(used * np.log2(used)).sum())


def _solve(function: Callable[[float], float], goal: float, low: float, high: float) -> float:
    """Returns where a falling function has a value, or the end that is nearest to it."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > goal else (low, middle)
    return (low + high) / 2


def _mixture(density: float, first: float, size: int) -> tuple[float, np.ndarray, float]:
    """Returns the second law's parameter, the distribution of gap codes, and fillers for each entry."""
    second = 1 / max(1.0, 2 / density - 1 / first)
    codes, fillers = np.zeros(size), 0.0
    for chance in (first, second):
        skipped = (1 - chance) ** size
        rest = skipped / (1 - skipped)
        codes += 0.5 * chance * (1 - chance) ** np.arange(size) * (1 + rest)
        fillers += 0.5 * rest
    codes[-1] += fillers
    return second, codes / (1 + fillers), fillers


def gaps_of(layer: Layer, random: np.random.Generator, published: bool) -> np.ndarray:
    """Returns positions of the kept weights."""
    size, count = 1 << layer.gap_bits, round(1.05 * layer.density * layer.size) + 1000
    first = second = layer.density
    if published:
        first = _solve(lambda p: entropy(_mixture(layer.density, p, size)[1]), layer.index_bits, layer.density, 0.9999)
        second = _mixture(layer.density, first, size)[0]
    laws = np.where(random.random(count) < 0.5, first, second)
    positions = np.cumsum(random.geometric(laws)) - 1
    return positions[positions < layer.size]


def code_chances(layer: Layer, fillers: float) -> np.ndarray:
    """Returns the distribution of the 2^bits - 1 codes whose entropy, with the code 0 of fillers, is the published one."""
    places = np.abs(np.linspace(-1, 1, (1 << layer.bits) - 1))

    def chances(sharpness: float) -> np.ndarray:
        found: np.ndarray = np.exp(-sharpness * places)
        return found / found.sum()

    def total(sharpness: float) -> float:
        return entropy(np.append(chances(sharpness), fillers) / (1 + fillers))

    return chances(_solve(total, layer.code_bits, 0.0, 1000.0))


def weight_of(layer: Layer, random: np.random.Generator, published: bool) -> Tensor:
    """Returns a synthetic weight of a layer."""
    positions = gaps_of(layer, random, published)
    fillers = (len(positions) and gap_counts(positions, layer.gap_bits).sum() / len(positions) - 1) or 0.0
    chances = code_chances(layer, fillers)
    values = np.linspace(-1, 1, chances.size) + 1e-3  # no value is zero
    weight = np.zeros(layer.size, dtype=np.float32)
    weight[positions] = values[random.choice(chances.size, size=len(positions), p=chances)]
    return torch.from_numpy(weight).reshape(layer.shape)


@dataclass(frozen=True)
class Counted:
    """The bytes of a layer: of its part in a file, by the formula, and the number of blocks with padding."""

    stored: int
    formula: int
    blocks: int


def counted(weight: Tensor) -> Counted:
    """Returns the bytes of a weight in a file, and by the formula."""
    about, part = encode_tensor(weight)
    flat = weight.reshape(-1).numpy()
    positions = np.flatnonzero(flat)
    values, counts = np.unique(flat[positions], return_counts=True)
    blocks = -(-about["entries"] // BLOCK)
    table = 4 * values.size + -(-(values.size + 1) // 2)
    if about["gap"]:
        gaps = gap_counts(positions, about["gap"])
        counts = np.append(counts, gaps.sum() - positions.size)
        bits = int((gaps * code_lengths(gaps)).sum())
        blocks, table = 2 * blocks, table + gaps.size // 2
    else:
        counts, bits = np.append(counts, flat.size - positions.size), 0
    bits += int((counts * code_lengths(counts)).sum())
    return Counted(len(part), table + 2 * blocks + bits // 8, blocks)


def rows(name: str, scale: int, published: bool, seed: int = 0) -> Iterator[tuple[Layer, Counted]]:
    """Yields the layers of a network with their bytes; one layer's weight is in memory at a time."""
    random = np.random.default_rng(seed)
    for layer in NETWORKS[name]:
        own = scaled(layer, scale)
        yield own, counted(weight_of(own, random, published))


def biases(name: str, scale: int) -> int:
    """Returns the bytes of all biases, which are stored as they are."""
    return sum(4 * scaled(layer, scale).shape[0] for layer in NETWORKS[name])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=int, default=1)
    scale = parser.parse_args().scale
    last = {}
    for name, ratio in PUBLISHED.items():
        dense = sum(4 * scaled(layer, scale).size for layer in NETWORKS[name]) + biases(name, scale)
        paper = sum(layer.rate * 4 * scaled(layer, scale).size for layer in NETWORKS[name])
        print(f"{name}: dense {dense / 1e6:.1f} MB, published {ratio:g}x; by its table {dense / paper:.1f}x")
        print("positions  layer        weights  kept, %  bits/kept  file, bytes  formula, bytes  padding")
        for published in (False, True):
            word, stored = "published" if published else "random", biases(name, scale)
            for layer, count in rows(name, scale, published):
                stored += count.stored
                kept = layer.density * layer.size
                print(
                    f"{word:11}{layer.name:10}{layer.size:10,}{100 * layer.density:9.0f}{8 * count.stored / kept:11.2f}"
                    f"{count.stored:13,}{count.formula:16,}{count.stored - count.formula:9,}"
                )
            last[name, word] = dense / stored
            print(f"{word:11}all: {stored:,} bytes, {dense / stored:.1f}x")
    off = {name: last[name, "published"] / ratio - 1 for name, ratio in PUBLISHED.items()}
    print(
        "; ".join(
            f"{name} {last[name, 'published']:.1f}x, {100 * value:+.1f} % of the published" for name, value in off.items()
        )
    )


if __name__ == "__main__":
    main()
