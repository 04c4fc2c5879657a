"""Activation sparsity without training (TEAL, Liu et al. 2024): small entries of what linear layers read count as zero.

At one token at a time, a linear layer takes the time that its weight takes to arrive from memory. Columns of the weight that
meet zeros need not arrive. Thresholds are quantiles of magnitudes on calibration batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.batch import call
from microglia.core.errors import BudgetError, MicrogliaError, SelectorError
from microglia.core.left_out import chosen_layers
from microglia.core.modes import evaluating
from microglia.dynamic.activation_layers import ThresholdedLinear, attach_threshold, thresholded_layers
from microglia.dynamic.activation_rules import Calibration, rules
from microglia.graph.blocks import calibrating, counted_positions

KEPT = 2**20
"""Maximum number of magnitudes that are kept for a layer; above it a random half is, and so on."""
M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def sparse_activations(
    model: M,
    batches: Iterable[Any],
    *,
    sparsity: float = 0.5,
    rule: str = "uniform",
    layers: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    blocks: str | None = None,
    step: float = 0.05,
    forward: Callable[[nn.Module, Any], Any] = call,
) -> M:
    """Gives the linear layers of a model thresholds, in place: entries of their inputs below them count as zero.

    Nothing is trained, and weights stay. The outputs are the same function of the input at every batch size and on every
    device. `microglia.dynamic.tune_activations` then makes single tokens faster on the CPU. `microglia.save` and
    `microglia.load` keep the thresholds. Called again, it calibrates the dense model anew. The authors' code leaves the first
    half of a prompt dense. Here thresholds hold for every token.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        >>> model = sparse_activations(model, [torch.randn(32, 8)], sparsity=0.5)
        >>> model[2].sparsity
        0.5

    Args:
        model: Any model with layers of `nn.Linear`, such as a decoder of transformers.
        batches: Calibration inputs, batch by batch: a tensor, a tuple of arguments, or a mapping of keyword arguments.
            Padding by an ``attention_mask`` does not count.
        sparsity: Fraction of the entries that count as zero on the calibration batches, in [0, 1); by the rule ``greedy``, of
            the weights that are not read.
        rule: ``uniform``, or ``greedy``: within each block by the measured error of its output. Greedy runs each block about
            ``sparsity / step`` times for each pair of its layers.
        layers: Selectors of the layers to take (see `microglia.core.layers.matches`); only linear ones are.
        exclude: Selectors of the layers to leave out. The authors leave out the output layer, such as ``lm_head``.
        blocks: For ``greedy``: path of the list of blocks, such as ``model.layers``; None for the longest list of one class.
        step: For ``greedy``: growth of one layer's sparsity in one step, for a layer of the block's mean size, in (0, 1].
        forward: (model, inputs) -> outputs.

    Returns:
        The model.

    Raises:
        BudgetError: The sparsity or the step is out of range.
        SelectorError: No linear layer is chosen, or ``greedy`` finds no blocks.
        MicrogliaError: There are no batches, the model does not take them, or a layer reads nothing, or no finite numbers.
    """
    _check_range(sparsity, step)
    shares, chosen = rules[rule], _linear_layers(model, layers, exclude)
    held = list(batches)
    if not held:
        raise MicrogliaError("Thresholds are quantiles of activations on calibration batches: give at least one batch.")
    with evaluating(model), _dense(model):
        calibration = Calibration(model, chosen, _magnitudes(model, chosen, held, forward), held, forward, blocks, step)
        found = shares(calibration, sparsity)
        thresholds = {name: calibration.threshold(name, value) for name, value in found.items()}
    for name, threshold in thresholds.items():
        attach_threshold(chosen[name], threshold, float(found[name]))
    return model


def _check_range(sparsity: float, step: float) -> None:
    """Raises `BudgetError` unless both are fractions in range."""
    if not 0 <= sparsity < 1:
        raise BudgetError(
            f"sparsity is the fraction of activations that count as zero, at least 0 and below 1; got {sparsity}."
        )
    if not 0 < step <= 1:
        raise BudgetError(f"step is the growth of one layer's sparsity, above 0 and at most 1; got {step}.")


def _linear_layers(model: nn.Module, layers: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Linear]:
    """Returns the chosen linear layers by the name of their weight."""
    found: dict[str, nn.Linear] = {}
    for name, layer in chosen_layers(model, layers, exclude).items():
        module = layer.module
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module):
            raise SelectorError(
                f"{name} has masks or other parametrizations, whose weights are made anew in every call: write them into the "
                "weights first, by microglia.fold(model), or exclude the layer."
            )
        if isinstance(module, nn.Linear) and type(module) in {nn.Linear, ThresholdedLinear}:
            found[name] = module
    if not found:
        raise SelectorError(
            f"No layer of nn.Linear is chosen: layers={list(layers)}, exclude={list(exclude)} choose none of those of "
            f"{type(model).__name__}."
        )
    return found


@contextmanager
def _dense(model: nn.Module) -> Iterator[None]:
    """Context in which the layers that have thresholds already run dense."""
    held = [(layer, layer.threshold.clone()) for layer in thresholded_layers(model).values()]
    try:
        for layer, _ in held:
            layer.threshold.zero_()
        yield
    finally:
        for layer, threshold in held:
            layer.threshold.copy_(threshold)


class _Magnitudes:
    """A sample of the magnitudes that a layer reads."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.share = 1.0
        self.generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor, counted: Tensor | None) -> None:
        if counted is not None and x.shape[:-1] == counted.shape:
            x = x[counted.to(x.device)]
        self.parts.append(self._some(x.detach().abs().flatten().float().cpu(), self.share))
        while sum(map(len, self.parts)) > KEPT:
            self.parts, self.share = [self._some(torch.cat(self.parts), 0.5)], self.share / 2

    def _some(self, values: Tensor, share: float) -> Tensor:
        """Returns a random share: every second entry would be those of the same channels."""
        return values if share == 1 else values[torch.rand(len(values), generator=self.generator) < share]

    def rising(self) -> Tensor:
        return torch.cat(self.parts).sort().values if self.parts else torch.empty(0)


def _magnitudes(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Sequence[Any], forward: Callable[[nn.Module, Any], Any]
) -> dict[str, Tensor]:
    """Returns the rising magnitudes of what each layer reads."""
    samples = {name: _Magnitudes() for name in layers}
    counted: Tensor | None = None

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            samples[name].add(args[0] if args else kwargs["input"], counted)

        return note

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for batch in batches:
            counted = counted_positions(batch)
            with calibrating(model, batch):
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: sample.rising() for name, sample in samples.items()}
    for name, values in found.items():
        if not len(values):
            raise MicrogliaError(f"{name} reads nothing on the calibration batches: exclude it, or give batches that reach it.")
        if not bool(values.isfinite().all()):
            raise MicrogliaError(f"{name} reads numbers that are not finite on the calibration batches.")
    return found
