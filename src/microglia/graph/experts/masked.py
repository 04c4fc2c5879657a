"""The reference of a cut of experts: the whole model whose router gives removed experts a logit of minus infinity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from microglia.core.batch import call, map_tensors, tensors_of
from microglia.core.errors import MicrogliaError
from microglia.core.modes import evaluating, without_cache
from microglia.core.running import first_line
from microglia.graph.experts.layers import ExpertLayer, expert_layers

PRODUCTS = {torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}
"""Functions that compute logits."""
TOLERANCE, SHARE = 1e-3, 0.01
"""Relative difference of a token's outputs that is rounding in float32, and share of tokens whose choice rounding may turn."""


class _Masked(TorchFunctionMode):
    """Gives removed experts logits of minus infinity."""

    def __init__(self, count: int, removed: Sequence[int]) -> None:
        super().__init__()
        self.count, self.removed = count, list(removed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function and masks logits."""
        found = func(*args, **(kwargs or {}))
        if func in PRODUCTS and found.shape[-1] == self.count:
            found = found.index_fill(-1, torch.tensor(self.removed, device=found.device), -torch.inf)
        return found


@contextmanager
def masked_experts(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Context in which the routers of a model never choose some experts: what `keep_experts` must compute.

    Logits of removed experts become minus infinity, and so do their entries of biases that correct the choice.

    Args:
        model: A model with layers of experts.
        kept: Path of every such layer -> numbers of the experts that stay.
    """
    with ExitStack() as stack, torch.no_grad():
        for layer in expert_layers(model):
            removed = sorted(set(range(layer.count)) - set(kept[layer.path]))
            module = model.get_submodule(layer.path)
            router = module.get_submodule(layer.router)
            for name, tensor, dim in layer.routing_tensors(module):
                if "bias" in name:
                    stack.callback(tensor.data.copy_, tensor.data.clone())
                    tensor.data.index_fill_(dim, torch.tensor(removed, device=tensor.device), -torch.inf)
            object.__setattr__(router, "forward", _masking(router.forward, layer.count, removed))
            stack.callback(object.__delattr__, router, "forward")
        yield


def _masking(forward: Callable[..., Any], count: int, removed: Sequence[int]) -> Callable[..., Any]:
    def masked(*args: Any, **kwargs: Any) -> Any:
        with _Masked(count, removed):
            return forward(*args, **kwargs)

    return masked


@torch.no_grad()
def verify_experts(
    model: nn.Module,
    small: nn.Module,
    kept: Mapping[str, Sequence[int]],
    inputs: Any,
    forward: Callable[[nn.Module, Any], Any] = call,
) -> None:
    """Compares each layer of a cut model with that of the masked model, on what enters the latter.

    Args:
        model: The model before the cut.
        small: The result of `keep_experts`.
        kept: Path of each layer -> numbers of the experts that stayed.
        inputs: One batch.
        forward: (model, inputs) -> outputs.

    Raises:
        MicrogliaError: A layer computes something else than the masked one.
    """
    with ExitStack() as stack:
        stack.enter_context(masked_experts(model, kept))
        for one in (model, small):
            stack.enter_context(evaluating(one))
            stack.enter_context(without_cache(one))
        for layer in expert_layers(model):
            both = model.get_submodule(layer.path), small.get_submodule(layer.path)
            for handle in _compared(layer, *both):
                stack.callback(handle.remove)
        forward(model, inputs)


def _compared(layer: ExpertLayer, module: nn.Module, cut: nn.Module) -> list[Any]:
    """Returns handles of hooks that run the cut layer on what enters the masked one, and compare the outputs."""
    seen: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[:] = [map_tensors(torch.clone, (args, kwargs))]

    def after(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        try:
            found = cut(*seen[0][0], **seen[0][1])
        except Exception as error:
            raise MicrogliaError(f"{layer.path} does not run with fewer experts: {first_line(error)}") from error
        if not _equal(found, outputs):
            raise MicrogliaError(
                f"{layer.path} without the experts computes something else than with their logits masked: it uses the "
                "numbers of experts in a way that is not known here, and none can leave."
            )

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _equal(found: Any, wanted: Any) -> bool:
    """Tells whether the hidden states of two outputs of a layer are equal but for rounding; router logits do not count."""
    tolerance = max(TOLERANCE, 4 * torch.finfo(tensors_of(found)[0].dtype).eps)
    mine, theirs = tensors_of(found)[0].float(), tensors_of(wanted)[0].float()
    if mine.shape != theirs.shape:
        return False
    scale = theirs.abs().amax(-1).clamp_min(theirs.abs().mean()).clamp_min(torch.finfo(torch.float32).tiny)
    off = (mine - theirs).abs().amax(-1) / scale
    return bool((~(off <= tolerance)).float().mean() <= SHARE)  # also counts NaN
