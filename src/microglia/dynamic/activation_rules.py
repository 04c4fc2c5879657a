"""Rules that share a sparsity of activations out among layers: uniformly, or greedily within each block (TEAL).

The greedy rule is that of the authors' code: all layers of a block begin dense; again and again the layer whose next step adds
least to the error of the block's output takes it. Each step leaves the same number of weights unread, in whichever layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from microglia.core.batch import map_tensors, tensors_of
from microglia.core.progress import progress_bar
from microglia.core.registry import Registry
from microglia.graph.blocks import Passage, check_finite, find_blocks, passages
from microglia.runtime.sparse_layers.thresholded import thresholded


@dataclass(frozen=True)
class Calibration:
    """The model and the data of a rule. The model runs dense and stays as it is.

    Attributes:
        model: The model, in evaluation mode.
        layers: Its chosen linear layers, by name of the weight.
        magnitudes: Rising magnitudes of what each layer reads on the calibration batches.
        batches: The batches.
        forward: (model, inputs) -> outputs.
        blocks: Path of the list of blocks; None for the longest one.
        step: Fraction of a block's weights that a greedy rule leaves out in one step, times the number of layers.
    """

    model: nn.Module
    layers: Mapping[str, nn.Linear]
    magnitudes: Mapping[str, Tensor]
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Any]
    blocks: str | None
    step: float

    def threshold(self, name: str, sparsity: float) -> float:
        """Returns the threshold of a layer that takes a fraction of its calibration inputs for zero, rounded down."""
        rising = self.magnitudes[name]
        count = int(sparsity * len(rising) + 1e-6)
        return float(rising[count - 1]) if count else 0.0


Rule = Callable[[Calibration, float], Mapping[str, float]]
"""Returns the sparsity of each layer, in [0, 1], from the sparsity of all."""
rules: Registry[Rule] = Registry("rule for activations")
"""Rules by name; a new one registers itself by `Registry.add`, also outside the package."""


@rules.add("uniform")
def uniform(calibration: Calibration, sparsity: float) -> dict[str, float]:
    """Returns the same sparsity for every layer."""
    return dict.fromkeys(calibration.layers, sparsity)


@rules.add("greedy")
def greedy(calibration: Calibration, sparsity: float) -> dict[str, float]:
    """Returns sparsities that leave the same fraction of each block's weights unread, where it changes the output least.

    A block keeps the uniform sparsity where that has the smaller error. Layers outside of all blocks have it, too.

    Raises:
        SelectorError: The model has no blocks that run one after another.
    """
    path, blocks = find_blocks(calibration.model, calibration.blocks)
    found = dict.fromkeys(calibration.layers, sparsity)
    held = passages(calibration.model, blocks, calibration.batches, calibration.forward)
    with progress_bar("activations: blocks", len(blocks)) as bar:
        for index, block in enumerate(blocks):
            outputs = [passage.run(block, index) for passage in held]
            check_finite(outputs, f"{path}.{index}")
            parts = set(block.modules())
            inside = [name for name, layer in calibration.layers.items() if layer in parts]
            if len(inside) > 1:
                found.update(_Block(calibration, inside, block, index, held, outputs).shared_out(sparsity))
            for passage, output in zip(held, outputs, strict=True):
                passage.hidden = output
            bar.advance()
    return found


@dataclass(frozen=True)
class _Block:
    """One block, what enters it, and what the dense block makes of it."""

    calibration: Calibration
    names: Sequence[str]
    block: nn.Module
    index: int
    held: Sequence[Passage]
    outputs: Sequence[Any]

    def shared_out(self, sparsity: float) -> dict[str, float]:
        """Returns the sparsities of the block's layers."""
        sizes = {name: self.calibration.layers[name].weight.numel() for name in self.names}
        total = sum(sizes.values())
        left, each = sparsity * total, self.calibration.step * total / len(sizes)
        now, error = dict.fromkeys(self.names, 0.0), 0.0
        while left > 1e-6 * total:
            error, taken, now = min(self._steps(now, sizes, min(each, left)), key=lambda step: step[0])
            left -= taken
        same = dict.fromkeys(self.names, sparsity)
        return now if error <= self.error(same) else same

    def _steps(
        self, now: dict[str, float], sizes: dict[str, int], amount: float
    ) -> Iterator[tuple[float, float, dict[str, float]]]:
        """Yields the error, the weights left out and the sparsities after a step in each layer that is not empty yet."""
        for name, size in sizes.items():
            taken = min(amount, (1 - now[name]) * size)
            if taken > 1e-9 * size:
                then = {**now, name: min(1.0, now[name] + taken / size)}
                yield self.error(then), taken, then

    def error(self, sparsities: Mapping[str, float]) -> float:
        """Returns the squared error of the block's output, summed over all calibration tokens that are no padding."""
        total = 0.0
        thresholds = {name: self.calibration.threshold(name, value) for name, value in sparsities.items()}
        with _cut(self.calibration.layers, thresholds):
            for passage, expected in zip(self.held, self.outputs, strict=True):
                found = passage.run(self.block, self.index)
                total += sum(map(_difference(passage.counted), tensors_of(found), tensors_of(expected)))
        return total


def _difference(counted: Tensor | None) -> Callable[[Tensor, Tensor], float]:
    def of(found: Tensor, expected: Tensor) -> float:
        squares = (found.double() - expected.double()).square()
        if counted is not None and squares.shape[:2] == counted.shape:
            squares = squares[counted]
        return float(squares.sum())

    return of


@contextmanager
def _cut(layers: Mapping[str, nn.Linear], thresholds: Mapping[str, float]) -> Iterator[None]:
    """Context in which layers read thresholded inputs."""

    def hook(threshold: float) -> Callable[..., Any]:
        def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return map_tensors(lambda x: thresholded(x, threshold), (args, kwargs))  # type: ignore[no-any-return]

        return cut

    cuts = {layers[name]: hook(value) for name, value in thresholds.items() if value}
    handles = [layer.register_forward_pre_hook(cut, with_kwargs=True) for layer, cut in cuts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
