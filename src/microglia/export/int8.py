"""Int8 for OpenVINO by post-training quantization: weights and activations in 8 bits, calibrated on real inputs.

NNCF does it. It was compared with ONNX Runtime's static quantization (per channel, QDQ) on ResNet-56 of CIFAR-10, both
calibrated on the same 320 training images: of 2,000 test images 92.95 % are right in float32, 93.30 % after NNCF, 92.70 %
after ONNX Runtime (92.95 % with its reduced range). NNCF corrects biases, knows transformers, and can put layers back to
float32 by accuracy. torchao's PT2E was not measured: its int8 runs by torch.compile, which leaves no file to serve.

Where accuracy falls by more than a stated limit, NNCF's accuracy control puts layers back to float32, those that cost most
accuracy first, until the limit holds. Nothing is trained here: a wish may hold a function that trains the model for int8
before that (see `microglia.export.int8_recovery`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call, tensors_of
from microglia.core.errors import ExportError
from microglia.core.optional import needs
from microglia.core.registry import Registry
from microglia.core.running import first_line
from microglia.export.calibration import calibration_items
from microglia.export.exported import Exported
from microglia.export.openvino import compiled_openvino, open_openvino

if TYPE_CHECKING:
    import openvino

COUNT = 300
"""Examples that calibrate, NNCF's own number: more change the ranges little."""
MAX_DROP = 0.01
"""Largest loss of the score that is accepted, in the score's own unit: one point of accuracy."""
ROUNDED = 0.5
"""How far outputs of int8 may be from the model's, against the largest: it says that the same network ran, no more. A
MobileNet-v2 with half of its channels, random weights and one calibration input was measured to differ by 1.3 %."""
ATTENTION = frozenset({"ScaledDotProductAttention"})
"""Operations of OpenVINO by which a transformer is known; NNCF then smooths activations and leaves softmax in float."""
MULTIPLY = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"})
"""Operations that int8 makes fast."""
MOVE = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Concat", "MaxPool", "Split", "VariadicSplit", "Slice", "Pad"}
)
"""Operations that only move numbers: where the input of one is rounded, so is its output."""

SWITCH = "NNCF_CI"
"""Variable of the environment that turns off the telemetry of NNCF while it is imported."""

Score = Callable[[Iterable[tuple[Any, Any]]], float]
"""Takes pairs of outputs and targets, batch by batch; returns a number, higher for better."""


def accuracy(pairs: Iterable[tuple[Any, Any]]) -> float:
    """Returns the fraction of examples whose label has the largest logit.

    Args:
        pairs: Logits (batch, classes) and labels (batch,).
    """
    hits = count = 0
    for outputs, targets in pairs:
        hits += int((torch.as_tensor(outputs).argmax(1) == targets).sum())
        count += len(targets)
    return hits / max(count, 1)


@dataclass(frozen=True)
class Int8:
    """The wish for int8: on which inputs it is calibrated, and how much of the score it may cost.

    Attributes:
        calibration: Batches of inputs, or of (inputs, targets) as a loader gives them, such as training images. The first
            ``count`` examples are taken in their order, so shuffle with a seed where classes are sorted.
        count: Examples that calibrate.
        evaluation: Pairs of inputs and targets to compare int8 with float32 on, iterated several times: a list or a loader,
            no generator. None compares nothing.
        score: Score of outputs and targets; `accuracy` by default.
        max_drop: Largest accepted loss of the score. Where it is larger, layers go back to float32.
        forward: (model, inputs) -> outputs, for ``evaluation``.
        correct: Whether biases are corrected for the rounding of weights; False where only the time matters.
        recover: Called with the model where the loss is larger than ``max_drop``, before layers go back to float32. It returns
            a model that loses less, such as a copy trained with rounded layers (`microglia.train.rounded.fit_rounded`).
    """

    calibration: Iterable[Any]
    count: int = COUNT
    evaluation: Iterable[tuple[Any, Any]] | None = None
    score: Score = accuracy
    max_drop: float = MAX_DROP
    forward: Callable[[nn.Module, Any], Any] = call
    correct: bool = True
    recover: Callable[[nn.Module], nn.Module] | None = None

    @classmethod
    def of(cls, wish: Int8 | Iterable[Any]) -> Int8:
        """Returns the wish; calibration inputs alone are one with every default."""
        return wish if isinstance(wish, Int8) else cls(wish)


@dataclass(frozen=True)
class Int8Report:
    """The effect of rounding to 8 bits.

    Attributes:
        calibrated: Examples that calibrated.
        scores: Score in float32 and in int8; None without evaluation data.
        agreement: Examples on which both have the same largest output, and examples; None where that cannot be told.
        max_drop: Largest accepted loss of the score.
        restored: Whether layers went back to float32 to hold that limit.
        kept_float: Convolutions and matrix products that compute in float32.
        recovered_from: Score in float32 and in int8 of the model before it was recovered for int8; None if it was not.
    """

    calibrated: int
    scores: tuple[float, float] | None = None
    agreement: tuple[int, int] | None = None
    max_drop: float = MAX_DROP
    restored: bool = False
    kept_float: tuple[str, ...] = ()
    recovered_from: tuple[float, float] | None = None

    @property
    def drop(self) -> float:
        """Loss of the score against the model that was given, before any recovery; 0 without evaluation data."""
        if self.scores is None:
            return 0.0
        return (self.recovered_from or self.scores)[0] - self.scores[1]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return {**asdict(self), "drop": self.drop}


Structure = Callable[[list[Tensor]], Any]
"""Makes a model's own outputs of the list of their tensors."""


def quantize(model: openvino.Model, wish: Int8, structure: Structure | None = None) -> tuple[openvino.Model, Int8Report]:
    """Returns a converted model in int8, and what that changed.

    Args:
        model: In float32; stays as it is.
        wish: How to calibrate and compare.
        structure: Structure of the outputs that the score gets; None for one tensor, or a tuple of several.

    Raises:
        ExportError: NNCF is not installed; the calibration set is empty or does not fit the model; or the limit cannot
            be held.
    """
    nncf = _nncf()
    items = list(islice(calibration_items(model, wish.calibration), max(wish.count, 0)))
    if not items:
        raise ExportError("The calibration set is empty; give batches of training inputs, 100 examples or more.")
    settings = {"subset_size": len(items), "model_type": nncf.ModelType.TRANSFORMER if is_transformer(model) else None}
    dataset = nncf.Dataset(items)
    with _quiet(nncf):
        try:
            advanced = nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE,  # without VNNI sums of 8-bit products overflow 16 bits
                disable_bias_correction=not wish.correct,
            )
            small = nncf.quantize(model.clone(), dataset, advanced_parameters=advanced, **settings)
        except Exception as error:
            raise ExportError(f"NNCF cannot quantize this model: {first_line(error)}") from error
        report = Int8Report(len(items) * len(items[0][0]), kept_float=float_layers(small), max_drop=wish.max_drop)
        if wish.evaluation is None:
            return small, report
        report = _compared(report, model, small, wish, structure)
        if report.drop > wish.max_drop:
            small = _restored(
                nncf,
                model,
                dataset,
                wish,
                structure=structure,
                settings={**settings, "advanced_quantization_parameters": advanced},
            )
            report = replace(_compared(report, model, small, wish, structure), restored=True, kept_float=float_layers(small))
    if report.drop > wish.max_drop and report.scores is not None:
        raise ExportError(
            f"In int8 the score falls from {report.scores[0]:.4f} to {report.scores[1]:.4f}, by more than max_drop="
            f"{wish.max_drop:g}, also with layers in float32; allow more, calibrate on more examples, or export in float32."
        )
    return small, report


def quantize_file(path: Path, wish: Int8, structure: Structure | None = None) -> Int8Report:
    """Replaces an OpenVINO file by its int8 form, as `quantize` does."""
    import openvino

    small, report = quantize(openvino.Core().read_model(path), wish, structure)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        openvino.save_model(small, Path(folder) / path.name, compress_to_fp16=False)
        for file in Path(folder).iterdir():
            os.replace(file, path.parent / file.name)
    return report


quantizers: Registry[Callable[[Path, Int8, Structure | None], Int8Report]] = Registry("export target with int8")
"""Name of an export target -> the function that replaces its file by one in int8."""

quantizers.add("openvino")(quantize_file)


def is_transformer(model: openvino.Model) -> bool:
    """Tells whether a converted model has attention: softmax whose output is multiplied, or the operation of its own."""
    for node in model.get_ops():
        if node.get_type_name() in ATTENTION:
            return True
        if node.get_type_name() == "Softmax" and any(
            target.get_node().get_type_name() == "MatMul" for target in node.output(0).get_target_inputs()
        ):
            return True
    return False


def _nncf() -> Any:
    """Returns NNCF, imported without its telemetry: a library that was called sends nobody a note of it."""
    needs("export", "nncf")
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        import nncf  # type: ignore[import-untyped]
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
    return nncf


@contextlib.contextmanager
def _quiet(nncf: Any) -> Iterator[None]:
    """Keeps NNCF from printing its progress, and leaves its logger as it was."""
    logger = logging.getLogger("nncf")
    level = logger.level
    nncf.set_log_level(logging.ERROR)
    try:
        yield
    finally:
        nncf.set_log_level(level)


def _compared(
    report: Int8Report, model: openvino.Model, small: openvino.Model, wish: Int8, structure: Structure | None
) -> Int8Report:
    """Returns the report with the scores of both models, and on how many examples they agree."""
    first, second = (_answers(open_openvino(one), wish, structure, wish.evaluation) for one in (model, small))
    if not first:
        raise ExportError("The evaluation data are empty; give pairs of inputs and targets, such as a list of test batches.")
    pairs = [(tensors_of(one)[0], tensors_of(other)[0]) for (one, _), (other, _) in zip(first, second, strict=True)]
    equal = sum(int((one.argmax(1) == other.argmax(1)).sum()) for one, other in pairs if one.ndim == 2)
    count = sum(len(one) for one, _ in pairs if one.ndim == 2)
    return replace(report, scores=(wish.score(first), wish.score(second)), agreement=(equal, count) if count else None)


def _answers(
    opened: Exported, wish: Int8, structure: Structure | None, batches: Iterable[tuple[Any, Any]] | None
) -> list[tuple[Any, Any]]:
    """Returns pairs of outputs and targets."""
    opened.structure = structure
    return [(wish.forward(opened, inputs), targets) for inputs, targets in batches or ()]


def float_layers(model: openvino.Model) -> tuple[str, ...]:
    """Returns the names of convolutions and matrix products whose input is not rounded to 8 bits."""
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() in MULTIPLY]
    return tuple(node.get_friendly_name() for node in nodes if not _rounded(node.input_value(0).get_node()))


def _rounded(node: Any) -> bool:
    while node.get_type_name() in MOVE:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _restored(
    nncf: Any, model: openvino.Model, dataset: Any, wish: Int8, *, structure: Structure | None, settings: dict[str, Any]
) -> openvino.Model:
    """Returns the model in int8 with as many layers in float32 as the limit needs."""

    def validate(compiled: Any, batches: Iterable[tuple[Any, Any]]) -> tuple[float, None]:
        return wish.score(_answers(compiled_openvino(compiled), wish, structure, batches)), None

    try:
        restored: openvino.Model = nncf.quantize_with_accuracy_control(
            model.clone(), dataset, nncf.Dataset(wish.evaluation), validate, max_drop=wish.max_drop, **settings
        )
    except Exception as error:
        raise ExportError(f"NNCF cannot hold max_drop={wish.max_drop:g} for this model: {first_line(error)}") from error
    return restored
