"""The norm after a layer and the map after its activation, found while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from microglia.core.errors import ScoreError
from microglia.core.layers import GraphLayer, Layer
from microglia.scores.base import Evidence
from microglia.scores.reading import outputs_of

ACTIVATIONS = frozenset((
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "gelu", "silu", "mish", "elu", "elu_", "celu", "selu", "leaky_relu",
    "leaky_relu_", "prelu", "rrelu", "sigmoid", "tanh", "softplus", "hardswish", "hardsigmoid",
))  # fmt: skip
"""Functions after which the outputs of a layer are its map."""
MIXING = ("conv", "linear", "matmul", "mm", "bmm", "baddbmm", "addmm", "einsum")
"""Names of functions, or their prefixes, that change channels."""
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

JOINING = ("cat", "concat", "concatenate")
"""Functions that put channels side by side."""

Note = Callable[[str, Tensor], None]
"""(layer, its map (batch, channels, *positions))."""
Held = dict[str, int]
"""Layer -> the first of its channels in a tensor."""


@dataclass(frozen=True)
class Norm:
    """The norm after a layer.

    Attributes:
        module: The norm, with a scale for each channel.
        channels: Channels of the layer among the norm's; a norm after a concatenation also has channels of other layers.
    """

    module: nn.Module
    channels: slice

    @property
    def scale(self) -> Tensor:
        """The scales of the layer's channels, (out,)."""
        return cast(Tensor, self.module.weight)[self.channels]


class _Outputs(TorchFunctionMode):
    """Follows the outputs of layers through operators that keep their channels: norms, sums, concatenation, pooling."""

    def __init__(self, dims: Mapping[str, int], sizes: Mapping[str, int], note: Note) -> None:
        super().__init__()
        self._dims, self._sizes, self._note = dims, sizes, note
        self._holds: Any = WeakTensorKeyDictionary()
        self._waiting: dict[str, Tensor] = {}

    def made(self, name: str, output: Any) -> None:
        """Takes the output of a layer."""
        if isinstance(output, Tensor):
            self._holds[output] = {name: 0}
            self._waiting[name] = output

    def held(self, tensor: Any) -> Held:
        """Returns the layers whose outputs a tensor holds, before their activation."""
        return self._holds.get(tensor, {}) if isinstance(tensor, Tensor) else {}

    def arrived(self, tensor: Tensor, held: Held) -> None:
        """Records the map of layers; each has one in a pass."""
        for name, first in held.items():
            if self._waiting.pop(name, None) is not None:
                self._note(name, tensor.narrow(self._dims[name], first, self._sizes[name]).movedim(self._dims[name], 1))
        self._holds[tensor] = {}

    def end(self) -> None:
        """Records the outputs of layers that reached neither an activation nor another layer."""
        for name, output in list(self._waiting.items()):
            self.arrived(output, {name: 0})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if isinstance(found, Tensor) and not name.startswith(MIXING):
            if name in JOINING:
                held = self._joined(
                    args[0] if args else kwargs["tensors"], found, kwargs.get("dim", args[1] if len(args) > 1 else 0)
                )
            else:
                held = {
                    n: at for a in args if isinstance(a, Tensor) for n, at in self.held(a).items() if self._alike(a, found, n)
                }
            if held:
                self._holds[found] = held
                if name in ACTIVATIONS:
                    self.arrived(found, held)
        return found

    def _joined(self, parts: Sequence[Tensor], found: Tensor, dim: int) -> Held:
        """Returns the layers of a tensor that was concatenated along a dimension."""
        held: Held = {}
        before = 0
        for part in parts:
            for name, at in self.held(part).items():
                if (self._dims[name] - dim) % found.ndim == 0:
                    held.setdefault(name, at + before)
            before += part.shape[dim]
        return held

    def _alike(self, given: Tensor, found: Tensor, name: str) -> bool:
        dim = self._dims[name]
        return given.ndim == found.ndim and given.shape[0] == found.shape[0] and given.shape[dim] == found.shape[dim]


@contextmanager
def _following(
    model: nn.Module, layers: Mapping[str, Layer], note: Note, behind: Callable[[str, nn.Module, int], None]
) -> Iterator[_Outputs]:
    """Context in which the maps and norms of the model's layers are recorded."""
    if any(isinstance(layer.module, GraphLayer) for layer in layers.values()):
        raise ScoreError(
            "Maps and norms are found where a layer is called, and this model came back from shrinking as a graph, whose "
            "layers are operators: take a score of weights, such as l2 or fpgm."
        )
    dims = {name: layer.kind.inputs for name, layer in layers.items()}
    sizes = {name: layer.sides[0] for name, layer in layers.items()}
    outputs = _Outputs({name: dim for name, dim in dims.items() if dim is not None}, sizes, note)

    def arrive(module: nn.Module, args: Any) -> None:
        if args and (held := outputs.held(args[0])):
            outputs.arrived(args[0], held)

    def norm(module: nn.Module, args: Any, output: Any) -> None:
        for name, first in outputs.held(args[0]).items() if args else ():
            behind(name, module, first)

    with ExitStack() as stack:
        for name, layer in layers.items():
            if dims[name] is not None:
                stack.callback(layer.module.register_forward_pre_hook(arrive).remove)
                made = layer.module.register_forward_hook(lambda _m, _a, output, name=name: outputs.made(name, output))
                stack.callback(made.remove)
        for module in model.modules():
            if isinstance(module, NORMS):
                stack.callback(module.register_forward_hook(norm).remove)
        yield outputs


def follow(
    model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence, note: Note, *, first: bool = False
) -> dict[str, Norm]:
    """Runs the model over the batches and records each layer's map; returns the norm right after each layer that has one.

    The map of a layer is its output after the next activation: after its norm and, at the end of a residual block, after the
    sum with the shortcut. A layer without an activation has the map that the next layer reads.

    Args:
        model: Any module, in the mode to run in.
        layers: Layers to follow, by name. A layer that is not called itself, as inside attention, has no map.
        evidence: Batches of (inputs, targets).
        note: Called with (name, map (batch, channels, *positions)).
        first: Whether one batch is enough.

    Raises:
        ScoreError: There is no batch, the model does not take the inputs, or it is a traced graph.
    """
    norms: dict[str, Norm] = {}

    def behind(name: str, norm: nn.Module, first: int) -> None:
        weight, channels = getattr(norm, "weight", None), layers[name].sides[0]
        if weight is not None and weight.ndim == 1 and weight.numel() >= first + channels:
            norms.setdefault(name, Norm(norm, slice(first, first + channels)))

    seen = False
    with _following(model, layers, note, behind) as outputs:
        for inputs, _ in evidence.batches:
            with outputs:
                outputs_of(model, inputs, evidence.forward)
            outputs.end()
            seen = True
            if first:
                break
    if not seen:
        raise ScoreError("This score runs the model: give batches=[(inputs, targets), ...]; it got none.")
    return norms


def norms_behind(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Norm]:
    """Returns the norm right after each layer, if it has a scale for each channel; see `follow`."""
    return follow(model, layers, evidence, lambda name, found: None, first=True)
