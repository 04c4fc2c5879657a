"""SynFlow: the flow of positive signal through a network, without data (Tanaka et al. 2020); the weights that lie on a path."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from microglia.core.batch import Example, map_tensors, tensors_of
from microglia.core.errors import ScoreError
from microglia.core.layers import Layer, prunable_layers
from microglia.core.masks import MaskSet
from microglia.scores.base import Evidence, score
from microglia.scores.guard import untouched
from microglia.scores.reading import fitting

PASSED = (
    *(nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    *(nn.ReLU6, nn.Hardtanh),
)
"""Modules that return their input while flow is measured: norms would divide the signal away, clipped activations cap it."""
TRIES = ((torch.float32, 2.0**-110, (1e-33, 1e33)), (torch.float64, 2.0**-500, (1e-290, 1e305)))
"""(dtype, scale of the input, bounds of the scaled flow). A flow of 1e60 fits float32 if the input is as small as possible:
forward values span scale to scale * R, backward ones 1 / (scale * R) to 1 / scale. The shares do not depend on the scale. A
larger flow uses float64, for which oneDNN has no kernels."""
MARGIN = 2.0
"""Margin in log2: the flow of the previous round may exceed a dtype's maximum by it, because a round removes some flow."""
ENTERING = ("bias", "token", "embed", "pos")
"""Substrings of the names of parameters that are added to the signal; these parameters are scaled like the input."""

Factors = tuple[dict[str, Tensor], dict[str, Tensor]]
"""The slopes of the flow and the values they belong to, by layer; their products are the shares."""


@score("synflow")
def synflow(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns each weight's share of the flow R: (dR/d|w|) |w| / R (Tanaka et al. 2020, equations 1 and 7).

    R is the sum of the outputs for an input of ones, with every parameter replaced by its absolute value and every norm by the
    identity. In a network without biases, the shares of a layer that all paths cross add up to 1. The batches give only the
    shape of the first input; an integer input, such as tokens, is used unchanged.

    Raises:
        ScoreError: There is no batch to take the shape from, nothing flows, or the flow is beyond float64.
    """
    return shares(model, layers, example_of(evidence))


def example_of(evidence: Evidence) -> Any:
    """Returns the inputs of the first example of a batch: every tensor (1, ...).

    Raises:
        ScoreError: There is no batch.
    """
    inputs = next(iter(evidence.batches), (None,))[0]
    if not tensors_of(inputs):
        raise ScoreError("SynFlow takes the shape of the input from a batch: give batches=[(inputs, targets)].")
    return map_tensors(lambda tensor: tensor[:1] if tensor.ndim else tensor, inputs)


def shares(
    model: nn.Module, layers: Mapping[str, Layer], example: Any, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns the shares of the flow (see `synflow`); the model is only read.

    Args:
        model: Masked or dense.
        layers: Layers whose weights are scored.
        example: Inputs of one example: tensors (1, ...).
        dtype: Dtype of the computation; None takes float32 where the flow fits in it.

    Raises:
        ScoreError: As `synflow`.
    """
    return _multiplied(_factors(model, layers, example, lambda p: p.detach().abs(), dtype=dtype)[0])


class PositiveFlow:
    """The flow through a network over many rounds of pruning; a round costs about one pass of the dense network.

    Args:
        model: A network without masks; only read.
        layers: Layers whose weights are scored.
        example: Inputs of one example: tensors (1, ...).

    Attributes:
        weights: Layer -> absolute weights, a copy; those set to 0 are removed.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer], example: Any) -> None:
        self.model, self.layers, self.example = model, layers, example
        self.weights = {name: layer.raw.detach().abs() for name, layer in layers.items()}
        self._own = {id(layer.raw): self.weights[name] for name, layer in layers.items()}
        self._flow = -math.inf

    def slopes(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the two factors of `shares` through the remaining weights, by layer: dR/d|w| / R and |w|.

        Raises:
            ScoreError: As `synflow`.
        """
        found, self._flow = _factors(self.model, self.layers, self.example, self._read, known=self._flow)
        return found

    def _read(self, parameter: Tensor) -> Tensor:
        own = self._own.get(id(parameter))
        return parameter.detach().abs() if own is None else own.detach()


def _factors(
    model: nn.Module,
    layers: Mapping[str, Layer],
    example: Any,
    read: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype | None = None,
    known: float = -math.inf,
) -> tuple[Factors, float]:
    """Returns the factors of the shares, and log2 of the flow R; a good estimate ``known`` of it saves a failed attempt."""
    flow, floating = 0.0, any(tensor.is_floating_point() for tensor in tensors_of(example))
    for kind, small, (least, most) in TRIES:
        scale = small if floating else 1.0  # tokens are used unchanged
        if dtype in (None, kind) and known + math.log2(scale) <= math.log2(most) + MARGIN:
            with untouched(model):
                found, flow = _factors_in(model, layers, example, read, kind, scale)
            if least <= flow <= most:
                return found, math.log2(flow) - math.log2(scale)
    if flow > 0:
        raise ScoreError(f"The flow through this network is {flow:g}: beyond what float64 holds. Scale its weights down.")
    raise ScoreError(
        "Nothing flows from the inputs to the outputs: a layer is emptied or every path is cut, so that SynFlow has nothing to "
        "tell apart. Keep more weights, or prune in more rounds."
    )


def effective_masks(model: nn.Module, example: Any) -> MaskSet:
    """Returns the masks of the weights that lie on a path from input to output; all others are dead, kept or not.

    Source: Frankle et al. 2021, section 4; Vysogorets and Kempe 2021 ("effective sparsity"). A weight that reads only zero
        padding is dead too.

    Args:
        model: A network with masks or zeros in its weights; it stays unchanged.
        example: Inputs of one example: tensors (1, ...).
    """
    layers = prunable_layers(model)

    with untouched(model), _Averaging():
        slopes, _ = _factors_in(model, layers, example, _averaging, torch.float64, 1.0, biases=False)
    found = _multiplied(slopes)
    return MaskSet({n: found[n] > 0 if found else torch.zeros_like(layer.raw, dtype=torch.bool) for n, layer in layers.items()})


class _Averaging(TorchFunctionMode):
    """Replaces the maximum of a window by the mean: a path through any entry is a path."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (found := re.fullmatch(r"_?(adaptive_)?max_pool([123])d(_with_indices)?", name)) is not None:
            adaptive, dimensions, _ = found.groups()
            x, sizes, *rest = args if len(args) > 1 else (*args, kwargs.pop("output_size" if adaptive else "kernel_size"))
            if adaptive:
                return getattr(functional, f"adaptive_avg_pool{dimensions}d")(x, sizes)
            given = {**dict(zip(("stride", "padding", "dilation", "ceil_mode"), rest, strict=False)), **kwargs}
            own = {key: given[key] for key in ("padding", "ceil_mode") if key in given}
            return getattr(functional, f"avg_pool{dimensions}d")(x, sizes, given.get("stride") or sizes, **own)
        return func(*args, **kwargs)


def _averaging(p: Tensor) -> Tensor:
    """Returns rows that average the inputs of a parameter: nothing overflows, and zeros stay zero."""
    alive = (p.detach() != 0).double()
    if p.ndim == 1:
        return torch.ones_like(alive)
    return alive / alive.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (p.ndim - 1))


def _multiplied(factors: Factors) -> dict[str, Tensor]:
    return {name: slope.mul_(factors[1][name]) for name, slope in factors[0].items()}


def _factors_in(  # noqa: PLR0917 -- the parts of one computation
    model: nn.Module,
    layers: Mapping[str, Layer],
    example: Any,
    read: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    scale: float,
    *,
    biases: bool = True,
) -> tuple[Factors, float]:
    """Returns the factors of the shares for ``read`` parameters, and the flow times the scale (0 or infinite: no factors)."""
    wanted = {id(layer.raw): name for name, layer in layers.items()}
    weights = {id(layer.raw) for layer in prunable_layers(model).values()}
    state: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if (layer := wanted.get(id(p))) in leaves:
            state[name] = leaves[layer]
            continue
        state[name] = read(p).to(dtype)
        if id(p) not in weights and any(part in name.rpartition(".")[2] for part in ENTERING):
            state[name] = state[name] * (scale if biases else 0.0)
        if layer is not None:
            leaves[layer] = state[name].requires_grad_()
    state |= {name: b.to(dtype) for name, b in model.named_buffers() if b.is_floating_point()}
    ones = Example.of(example).map(lambda x: torch.full_like(x, scale, dtype=dtype) if x.is_floating_point() else x)
    model.eval()
    with torch.enable_grad(), passing(model):
        with fitting(model, example):
            outputs = torch.func.functional_call(model, state, ones.args, ones.kwargs)
        flow = sum(_outputs(outputs), torch.zeros((), dtype=dtype))
        if not (torch.isfinite(flow) and flow > 0):
            return ({}, {}), float(flow.detach().nan_to_num(torch.inf, torch.inf))
        gradients = torch.autograd.grad(flow.log(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    by_name = dict(zip(leaves, gradients, strict=True))
    slopes, values = {name: by_name[name] for name in layers}, {name: leaf.detach() for name, leaf in leaves.items()}
    return (slopes, values), float(flow.detach())


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """Runs its body with norms and clipped activations that return their input."""
    passed = [module for module in model.modules() if isinstance(module, PASSED)]
    for module in passed:
        module.forward = _pass  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in passed:
            del module.forward


def _pass(x: Tensor, *rest: Any) -> Tensor:
    return x


def _outputs(output: Any) -> Iterator[Tensor]:
    """Yields the sum of every floating tensor in an output, however nested."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.sum()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _outputs(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _outputs(value)
