"""A float32 model run in bfloat16: norms folded first, then each layer's weight rounded once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from microglia.core.batch import Example
from microglia.core.running import first_line, run
from microglia.runtime.dense.execution import difference, runners
from microglia.runtime.dense.fusion import Engine, Site, fuse
from microglia.runtime.dense.kinds import Runner
from microglia.runtime.dense.packing import Packed

TOLERANCE = 5e-2
"""Tolerated difference of outputs in bfloat16 from the model's in float32, relative to the largest output. Each layer rounds to
8 bits, an error of up to 0.4 %. The outputs of a trained ResNet-56 differed by 0.6 to 1.5 % in measurements."""


class Lowered(nn.Module):
    """A model in bfloat16 whose inputs and outputs have the dtypes of the float32 model.

    Args:
        model: Any module; it is called with floating-point tensors in bfloat16.
    """

    def __init__(self, model: Runner) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the model's output, in float32."""
        args, kwargs = tree_map(_narrowed, (args, kwargs))
        return tree_map(_widened, self.model(*args, **kwargs))


def lowered_site(site: Site) -> Site:
    """Returns the layer with its weight in bfloat16; its bias stays."""
    return replace(site, weight=site.weight.bfloat16())


def lower(model: nn.Module, example: Example, engine: Engine) -> Lowered:
    """Returns a folded float32 model as a graph in bfloat16.

    Args:
        model: A model in evaluation mode on the CPU; it stays unchanged.
        example: Example inputs in float32.
        engine: Makes the modules of the layers, from sites whose weights are in bfloat16.
    """
    graph = fuse(copy.deepcopy(model), example, lambda site: engine(lowered_site(site)))
    return Lowered(graph.to(torch.bfloat16))


def dense_lowered(model: nn.Module, example: Example, kinds: Sequence[str], notes: list[str]) -> dict[str, Runner]:
    """Returns the dense executions in bfloat16 with sufficiently near outputs, by name such as ``bf16 packed``."""
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    said: list[str] = []
    others = [kind for kind in kinds if kind != "packed"]
    ready = {kind: Lowered(found) for kind, found in runners(narrow, example.map(_narrowed), others, notes=said).items()}
    if "packed" in kinds and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        try:
            ready["packed"] = lower(model, example, Packed)
        except Exception as error:
            said.append(f"packed was left out: {first_line(error)}")
    notes.extend(f"bf16 {text}" for text in said)
    return near({f"bf16 {kind}": found for kind, found in ready.items()}, run(model, example.copied()), example, notes)


def near(ready: dict[str, Runner], expected: object, example: Example, notes: list[str]) -> dict[str, Runner]:
    """Returns those with outputs within `TOLERANCE` of the float32 model's; the others' problems become notes."""
    kept = {}
    for name, runner in ready.items():
        try:
            given = example.copied()
            problem = difference(expected, runner(*given.args, **given.kwargs), TOLERANCE)
        except Exception as error:
            problem = first_line(error)
        if problem is None:
            kept[name] = runner
        else:
            notes.append(f"{name} was left out: {problem}")
    return kept


def _narrowed(leaf: Any) -> Any:
    return leaf.bfloat16() if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf


def _widened(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 else leaf
