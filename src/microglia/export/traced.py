"""The traced program from which every format is written: a folded copy of the model, its free sizes, its names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from microglia.core.batch import Example, tensors_of
from microglia.core.errors import ExportError
from microglia.core.masks import unfinished
from microglia.core.running import folded_twin
from microglia.graph.dims.trace import export_program, known_outputs, quiet
from microglia.runtime.accelerated import Accelerated


@dataclass(frozen=True)
class Traced:
    """A model as a program of torch.export.

    Attributes:
        program: The program, whose inputs are the example's tensors.
        model: The folded copy of the model on the CPU.
        example: The example on the CPU.
        inputs: Names of the inputs.
        outputs: Names of the output tensors.
        left_out: Classes of outputs that the program does not return, such as a language model's cache.
        fixed: Input -> requested free dimensions that are constants.
        metadata: Metadata of the model for the file.
    """

    program: torch.export.ExportedProgram
    model: nn.Module
    example: Example
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def sizes(self) -> dict[str, str]:
        """Returns names for the symbols of free sizes: ``batch`` for every first dimension, else input and dimension."""
        names: dict[str, str] = {}
        for name, value in _input_values(self.program).items():
            for d, size in enumerate(value.shape):
                if _is_free(size):
                    names.setdefault(str(size), "batch" if d == 0 else f"{name}_{d}")
        return names


def traced(
    model: nn.Module, example_inputs: Any, *, dynamic: Sequence[int] = (0,), metadata: Mapping[str, str] | None = None
) -> Traced:
    """Traces a copy of a model for export, with masks written into its weights, in evaluation mode on the CPU.

    Args:
        model: Any module, masked, shrunk or accelerated; it is left as it is.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.
        dynamic: Free dimensions of the inputs: by default the batch; (0, 2, 3) also height and width of images, (0, 1) also the
            length of token ids. A size that the model's code fixes stays as in the example.
        metadata: Metadata of the model for the file.

    Raises:
        ExportError: A pruner still searches in the model.
        TraceError: torch.export cannot trace it.
    """
    ready, example = prepared(model, example_inputs), Example.of(example_inputs).map(lambda t: t.detach().cpu())
    given = _inputs(example)
    with torch.no_grad():
        program, left_out = export_program(ready, given, dynamic=dynamic)
        if _fixed_elsewhere(program, example):  # a batch of one was doubled and then turned out to be a constant
            program, left_out = export_program(ready, given, dynamic=())
    inputs = tuple(_input_values(program))
    fixed = {
        name: stay
        for name, value in _input_values(program).items()
        if (stay := tuple(d for d in dynamic if d < value.ndim and not _is_free(value.shape[d])))
    }
    return Traced(program, ready, example, inputs, _output_names(program), left_out, fixed, dict(metadata or {}))


def prepared(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Returns a copy of a model for export: dense kernels, masks folded, evaluation mode, on the CPU.

    Raises:
        ExportError: A pruner still searches in the model.
    """
    if unfinished(model):
        raise ExportError(
            "A pruner still searches in this model, whose soft masks no file holds: call pruner.finish() before export."
        )
    return folded_twin(model.dense if isinstance(model, Accelerated) else model).cpu()


def expected(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Returns the tensors that a model returns for inputs, without outputs that no file can return."""
    example = Example.of(inputs).map(lambda t: t.detach().cpu()).copied()
    with torch.no_grad(), quiet():
        return tensors_of(known_outputs(model(*example.args, **example.kwargs)))


def _inputs(example: Example) -> Any:
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
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor):
            name = "_".join(_word(key) for key in path) or "output"
            names.append(name if name[0].isalpha() else f"output_{name}")
    return tuple(names)


def _word(key: Any) -> str:
    """Returns the word of one step of a path into a tree: a key, an index or an attribute."""
    return str(next((getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)), key))
