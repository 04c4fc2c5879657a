"""Counts multiply-accumulates: one counter, by the ATen operators of one real forward pass."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.running import run, twin, undisturbed
from microglia.measure.parameters import Weight, weights

aten = torch.ops.aten

_FACTORS: dict[Any, tuple[int, ...]] = {
    aten.mm: (1, 0),
    aten.addmm: (2, 1),
    aten._addmm_activation: (2, 1),
    aten.bmm: (1, 0),
    aten.baddbmm: (2, 1),
    aten.addbmm: (2, 1),
    aten.mv: (0, 1),
    aten.addmv: (1, 2),
    aten.dot: (0, 1),
    aten._scaled_mm: (1, 0),
    aten.convolution: (1,),
    aten._convolution: (1,),
    aten.cudnn_convolution: (1,),
    aten.convolution_overrideable: (1,),
    aten._slow_conv2d_forward: (1,),
}
"""Product -> the arguments that can be its weight, the likelier first; never a bias."""

_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._addmm_activation: lambda bias, a, b, **_: a.numel() * b.shape[1],
    aten.addbmm: lambda bias, a, b, **_: a.numel() * b.shape[2],
    aten.mv: lambda matrix, vector, **_: matrix.numel(),
    aten.addmv: lambda bias, matrix, vector, **_: matrix.numel(),
    aten.dot: lambda a, b, **_: a.numel(),
    # q k^T and its product with v, (batch, heads, length, width) each; torch's registry has it from 2.14 on.
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: (
        query.numel() * key.shape[-2] + query.shape[:-1].numel() * value.shape[-2:].numel()
    ),
}
"""MACs of the products that torch's registry lacks, or lacked in a supported version."""

_UNCOUNTABLE = frozenset(
    {
        aten._native_multi_head_attention,
        aten._transformer_encoder_layer_fwd,
        aten._trilinear,
        aten._cudnn_rnn,
        aten.mkldnn_rnn_layer,
        aten._grouped_mm,
    }
)
"""Products without a formula, which raise an error and never count as zero."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one sample (one multiply-add = 1 MAC; no bias, no normalization, no activation).

    Attributes:
        total: MACs of the dense forward pass.
        effective: MACs that remain if every zero of a weight is skipped: sum of density x MACs, plus ``other``.
        other: MACs of products without a weight, such as attention scores.
        layers: Name of a weight -> MACs of all products with it, in the order of first use; empty if only sums were stored.
        entries: Name of a weight -> (its entries, kept entries), as `microglia.measure.Parameters` counts them; empty if only
            sums were stored.
    """

    total: int
    effective: float
    other: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    entries: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: dict[str, int], other: int, entries: dict[str, tuple[int, int]]) -> Macs:
        """Returns the sums over layers; ``effective`` is summed exactly and rounded once, to the nearest float."""
        left = sum((Fraction(entries[name][1], entries[name][0]) * count for name, count in layers.items()), Fraction(other))
        return cls(sum(layers.values()) + other, float(left), other, layers, entries)

    @property
    def speedup(self) -> float:
        """*Theoretical* speed-up, total / effective: at least 1, infinite if nothing remains, 1 without MACs.

        Source: Blalock et al. 2020, "What is the State of Neural Network Pruning?"; survey, section 0.5.
        """
        if not self.total:
            return 1.0
        return self.total / self.effective if self.effective else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Returns every number, JSON-ready; an infinite speed-up is None."""
        return {
            "total": self.total,
            "effective": self.effective,
            "speedup": self.speedup if math.isfinite(self.speedup) else None,
            "other": self.other,
            "layers": dict(self.layers),
        }


def count_macs(model: nn.Module, example_inputs: Any, *, batch: int | None = None) -> Macs:
    """Counts the multiply-accumulates of one sample, by weight, and leaves the model unchanged.

    A copy of the model runs once in evaluation mode without gradients, and every executed ATen product is counted by the
    formulas of `torch.utils.flop_counter` (halved: these count 2 per multiply-add). So functional calls, weights used several
    times and modules called several times are all counted. A product belongs to the weight whose storage it reads, directly or
    through operators that only reshape weights (a mask, a copy, weight standardization). A custom operator counts as 0 until
    ``torch.utils.flop_counter.register_flop_formula`` registers a formula.

    Example:
        >>> count_macs(torch.nn.Linear(4, 3), torch.zeros(8, 4)).total
        12

    Args:
        model: Any module, masked or folded.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        batch: Samples in ``example_inputs``, by which the counts are divided (rounded to the nearest integer). By default the
            first dimension of the first tensor.

    Raises:
        MicrogliaError: The model does not run on these inputs, or uses a product without a formula.
    """
    example = Example.of(example_inputs)
    samples = batch if batch is not None else example.batch
    if samples < 1:
        raise MicrogliaError(f"MACs are counted per sample, but the example inputs hold {samples} samples: give one or more.")
    copied = twin(model)
    with undisturbed():
        named = {weight.name: weight for weight in weights(copied)}
        counter = _ProductCounter(copied, named)
        with _plain_kernels(copied), counter:
            run(copied, example.copied())
        layers = {name: round(Fraction(count, samples)) for name, count in counter.layers.items()}
        return Macs.of(layers, round(Fraction(counter.other, samples)), {name: named[name].entries() for name in layers})


@contextlib.contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Turns off the fused kernels that hide products from the dispatcher: attention's fast path and whole RNN layers."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn] if recurrent else []
    fast, enabled = torch.backends.mha.get_fastpath_enabled(), [library.enabled for library in libraries]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for library in libraries:
            library.enabled = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for library, flag in zip(libraries, enabled, strict=True):
            library.enabled = flag


class _ProductCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products at dispatch and finds the weight that each one reads.

    ``_origin`` maps a storage to byte ranges and the weight each range holds; None marks a tensor that is computed only from
    weights and buffers but is not a weight. Storages are keyed by weak references, so that an activation at a reused address is
    never taken for a weight.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, named: dict[str, Weight]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: Counter[str] = Counter()
        self.other = 0
        self._origin: dict[StorageWeakRef, list[tuple[int, int, str | None]]] = {}
        for name, weight in named.items():
            for tensor in weight.stored:
                self._remember(tensor, name)
        for buffer in model.buffers():
            self._remember(buffer, None)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False, which avoids the slow import of the compiler; nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator; counts it, decomposes it, or follows its effect on weights."""
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        formula = _formula(packet)
        if formula is not None:
            result = func(*args, **kwargs)
            self._credit(packet, args, formula(*args, **kwargs, out_val=result))
            return result
        if packet in _UNCOUNTABLE or isinstance(func, torch._ops.HigherOrderOperator):
            raise MicrogliaError(
                f"The MACs of the operator {packet} cannot be counted: it has no formula. Give it one with "
                "torch.utils.flop_counter.register_flop_formula."
            )
        if func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._follow((args, kwargs), result)
        return result

    def _credit(self, packet: Any, args: tuple[Any, ...], count: int) -> None:
        for index in _FACTORS.get(packet, ()):
            name = (self._lookup(args[index]) or (None,))[0]
            if name is not None:
                self.layers[name] += count
                return
        self.other += count

    def _follow(self, inputs: Any, outputs: Any) -> None:
        """Lets a tensor made only from weights and buffers stand for the weight with the same number of entries."""
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        origins = [self._lookup(tensor) for tensor in tensors]
        if not any(origins) or any(o is None and t.ndim > 0 for o, t in zip(origins, tensors, strict=True)):
            return
        sizes = {t.numel(): o[0] for o, t in reversed(list(zip(origins, tensors, strict=True))) if o and o[0]}
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and self._lookup(leaf) is None:
                self._remember(leaf, sizes.get(leaf.numel()))

    def _remember(self, tensor: Tensor, name: str | None) -> None:
        storage = _storage(tensor)
        if storage is not None:
            start = int(tensor.storage_offset()) * tensor.element_size()
            self._origin.setdefault(storage, []).append((start, start + max(tensor.nbytes, 1), name))

    def _lookup(self, tensor: Tensor) -> tuple[str | None] | None:
        """Returns (the weight's name or None for another constant,); None for an activation."""
        storage = _storage(tensor)
        if storage is None:
            return None
        start = tensor.storage_offset() * tensor.element_size()
        return next(((name,) for low, high, name in self._origin.get(storage, ()) if low <= start < high), None)


def _formula(packet: Any) -> Callable[..., int] | None:
    """Returns a function that computes the MACs from the operator's arguments and ``out_val``."""
    if packet in _FORMULAS:
        return _FORMULAS[packet]
    from torch.utils.flop_counter import flop_registry  # imports Triton, which takes half a second

    if packet in flop_registry:
        return lambda *args, **kwargs: flop_registry[packet](*args, **kwargs) // 2
    return None


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # sparse and oneDNN tensors have no storage
        return None
