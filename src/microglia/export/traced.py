"""The source of every target: a folded copy of the model, and the program that torch.export makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from microglia.core.batch import Example, tensors_of
from microglia.core.errors import ExportError
from microglia.core.masks import unfinished
from microglia.core.running import folded_twin, run, undisturbed
from microglia.graph.dims.trace import export_program, known_outputs, quiet
from microglia.runtime.accelerated import Accelerated


@dataclass(frozen=True)
class Source:
    """The exported copy of a model, with its example inputs.

    Attributes:
        model: The copy, masks written into its weights, in evaluation mode on the CPU.
        example: Example inputs, on the CPU.
        dynamic: Dimensions of the inputs that shall be free.
        metadata: Facts about the model that the file holds.
    """

    model: nn.Module
    example: Example
    dynamic: tuple[int, ...] = (0,)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def traced(self) -> Traced:
        """The program that torch.export makes of the model; made when a target first asks for it."""
        return trace(self)

    def expected(self, inputs: Any) -> list[Tensor]:
        """Returns the tensors that the model returns, without what no file can return."""
        example = Example.of(inputs).map(lambda t: t.detach().cpu()).copied()
        with undisturbed(), quiet():
            return tensors_of(known_outputs(run(self.model, example)))


def source_of(
    model: nn.Module, example_inputs: Any, *, dynamic: Sequence[int] = (0,), metadata: Mapping[str, str] | None = None
) -> Source:
    """Returns a model as it is exported: dense kernels, masks folded, evaluation mode, on the CPU.

    Args:
        model: Any module, masked, shrunk or accelerated; it is left as it is.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        dynamic: Dimensions of the inputs that shall be free: the batch by default, (0, 2, 3) also for height and width of
            images, (0, 1) for the length of token ids. A size that the model's code fixes stays as in the example.
        metadata: Facts about the model that the file holds.

    Raises:
        ExportError: A pruner still searches in the model.
    """
    if unfinished(model):
        raise ExportError(
            "A pruner still searches in this model, whose soft masks no file holds: call pruner.finish() before export."
        )
    copied = folded_twin(model.dense if isinstance(model, Accelerated) else model).cpu()
    example = Example.of(example_inputs).map(lambda t: t.detach().cpu().contiguous())  # as engines get their inputs
    return Source(copied, example, tuple(dynamic), dict(metadata or {}))


@dataclass(frozen=True)
class Traced:
    """A model as a program of torch.export.

    Attributes:
        program: The program, whose inputs are the example's tensors.
        inputs: Names of the inputs.
        outputs: Names of the output tensors.
        left_out: Classes of outputs that the program does not return, such as a language model's cache.
        fixed: Input -> dimensions that were to be free and are constants -> their sizes.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    fixed: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def sizes(self) -> dict[str, str]:
        """Returns names for the symbols of free sizes: ``batch`` for every first dimension, else input and dimension."""
        names: dict[str, str] = {}
        for name, value in _input_values(self.program).items():
            for d, size in enumerate(value.shape):
                if _is_free(size):
                    names.setdefault(str(size), "batch" if d == 0 else f"{name}_{d}")
        return names

    def structured(self, tensors: Sequence[Tensor]) -> Any:
        """Returns output tensors in the structure in which the model returns them."""
        values, spec = list(self.program.graph.output_node().args[0]), self.program.call_spec.out_spec  # type: ignore[arg-type]
        assert spec is not None
        following = iter(tensors)
        return pytree.tree_unflatten([next(following) if _is_tensor(value) else value for value in values], spec)


def trace(source: Source) -> Traced:
    """Returns what torch.export makes of a model.

    Raises:
        TraceError: torch.export cannot trace it.
    """
    given, dynamic = _arguments(source.example), source.dynamic
    with torch.no_grad():
        program, left_out = export_program(source.model, given, dynamic=dynamic)
        if _fixed_elsewhere(program, source.example):  # a batch of one was doubled and then turned out to be a constant
            program, left_out = export_program(source.model, given, dynamic=())
    values = _input_values(program)
    fixed = {
        name: {d: int(value.shape[d]) for d in dynamic if d < value.ndim and not _is_free(value.shape[d])}
        for name, value in values.items()
    }
    return Traced(program, tuple(values), _output_names(program), left_out, {name: of for name, of in fixed.items() if of})


def _arguments(example: Example) -> Any:
    if example.args and example.kwargs:
        raise ExportError("Inputs given both by position and by name cannot be traced; give them all by name.")
    return example.kwargs or example.args


def _input_values(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Returns the traced tensor of every input; other arguments are constants of the program."""
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    found = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _is_free(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


def _fixed_elsewhere(program: torch.export.ExportedProgram, example: Example) -> bool:
    """Tells whether a constant size of the program differs from the example's."""
    pairs = zip(_input_values(program).values(), example.tensors, strict=False)
    return any(
        not _is_free(size) and size != given
        for value, tensor in pairs
        for size, given in zip(value.shape, tensor.shape, strict=False)
    )


def _output_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Returns a name for each output tensor: the keys under which the model returns it, or ``output`` and a number."""
    values = list(program.graph.output_node().args[0])  # type: ignore[arg-type]
    spec = program.call_spec.out_spec
    assert spec is not None
    names = []
    for path, node in pytree.tree_flatten_with_path(pytree.tree_unflatten(values, spec))[0]:
        if _is_tensor(node):
            name = "_".join(_word(key) for key in path) or "output"
            names.append(name if name[0].isalpha() else f"output_{name}")
    return tuple(names)


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def _word(key: Any) -> str:
    """Returns the word of one step of a path into a tree: a key, an index or an attribute."""
    return str(next((getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)), key))
