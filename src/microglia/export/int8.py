"""Int8 for OpenVINO by post-training quantization: weights and activations in 8 bits, calibrated on real inputs.

NNCF does it. ONNX Runtime's static quantization and torchao's PT2E were measured on the same images (COMPARISON); NNCF
CHOICE.

Where accuracy falls by more than a stated limit, NNCF's accuracy control puts layers back to float32, those that cost most
accuracy first, until the limit holds. Nothing is trained: a model that needs more is recovered before it is exported.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from microglia.core.batch import Example, call, tensors_of
from microglia.core.errors import MicrogliaError
from microglia.core.optional import needs
from microglia.core.registry import Registry
from microglia.core.running import first_line
from microglia.export.calibration import calibration_items
from microglia.export.openvino import open_openvino

if TYPE_CHECKING:
    import openvino

COUNT = 300
"""Examples that calibrate, NNCF's own number: more change the ranges little."""
MAX_DROP = 0.01
"""Largest loss of the score that is accepted, in the score's own unit: one point of accuracy."""
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


quantizers: Registry[Callable[..., tuple[Any, Int8Report]]] = Registry("target with int8")
"""Target of an export -> the function that quantizes what was converted for it, called like `quantize`."""


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
class Evaluation:
    """Data on which the rounded model is held against the one in float32.

    Attributes:
        batches: Pairs of inputs and targets, iterated several times: a list or a loader, no generator.
        score: Of the outputs; `accuracy` by default.
        structure: Makes of the list of output tensors what the score gets; None for one tensor, or a tuple of several.
    """

    batches: Iterable[tuple[Any, Any]]
    score: Score = accuracy
    structure: Callable[[list[Tensor]], Any] | None = None


@dataclass(frozen=True)
class Int8Report:
    """What rounding to 8 bits changed.

    Attributes:
        calibrated: Examples that calibrated.
        scores: Score in float32 and in int8; None without evaluation data.
        agreement: Examples on which both have the same largest output, and examples; None where that cannot be told.
        max_drop: Largest accepted loss of the score.
        restored: Whether layers went back to float32 to hold that limit.
        kept_float: Convolutions and matrix products that compute in float32.
    """

    calibrated: int
    scores: tuple[float, float] | None = None
    agreement: tuple[int, int] | None = None
    max_drop: float = MAX_DROP
    restored: bool = False
    kept_float: tuple[str, ...] = ()

    @property
    def drop(self) -> float | None:
        """Loss of the score; None without evaluation data."""
        return None if self.scores is None else self.scores[0] - self.scores[1]


@quantizers.add("openvino")
def quantize(
    model: openvino.Model,
    example: Example,
    calibration: Iterable[Any],
    *,
    count: int = COUNT,
    evaluation: Evaluation | None = None,
    max_drop: float = MAX_DROP,
    correct: bool = True,
) -> tuple[openvino.Model, Int8Report]:
    """Returns a converted model in int8, and what that changed.

    Args:
        model: In float32; stays as it is.
        example: What the PyTorch model is called with: the structure of the calibration inputs.
        calibration: Batches of inputs, or of (inputs, targets) as a loader gives them, such as training images. The first
            ``count`` examples are taken in their order, so shuffle with a seed where classes are sorted.
        count: Examples that calibrate.
        evaluation: Data to compare both on. Without it nothing is compared.
        max_drop: Largest accepted loss of the score. Where it is larger, layers go back to float32.
        correct: Whether biases are corrected for the rounding of weights; False where only the time matters.

    Raises:
        MicrogliaError: NNCF is not installed; the calibration set is empty or does not fit the model; or the limit cannot
            be held.
    """
    nncf = _nncf()
    items = list(islice(calibration_items(model, example, calibration), count))
    if not items:
        raise MicrogliaError("The calibration set is empty; give batches of training inputs, 100 examples or more.")
    settings = {"subset_size": len(items), "model_type": nncf.ModelType.TRANSFORMER if is_transformer(model) else None}
    dataset = nncf.Dataset(items)
    with _quiet(nncf):
        try:
            advanced = nncf.AdvancedQuantizationParameters(disable_bias_correction=not correct)
            small = nncf.quantize(model.clone(), dataset, advanced_parameters=advanced, **settings)
        except Exception as error:
            raise MicrogliaError(f"NNCF cannot quantize this model: {first_line(error)}") from error
        report = Int8Report(len(items) * len(items[0][0]), max_drop=max_drop)
        if evaluation is None:
            return small, _compared(report, small)
        report = _compared(report, small, model, evaluation)
        if report.drop is not None and report.drop > max_drop:
            small = _restored(nncf, model, dataset, evaluation, {**settings, "max_drop": max_drop})
            report = _compared(report, small, model, evaluation, restored=True)
    if report.scores is not None and report.drop is not None and report.drop > max_drop:
        raise MicrogliaError(
            f"In int8 the score falls from {report.scores[0]:.4f} to {report.scores[1]:.4f}, more than max_drop={max_drop:g}, "
            "also with layers back in float32; allow more, calibrate on more examples, or export in float32."
        )
    return small, report


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
    report: Int8Report,
    small: openvino.Model,
    model: openvino.Model | None = None,
    evaluation: Evaluation | None = None,
    *,
    restored: bool = False,
) -> Int8Report:
    """Returns the report with what evaluation data say, and the layers that compute in float32."""
    report = replace(report, restored=restored, kept_float=float_layers(small))
    if model is None or evaluation is None:
        return report
    both = [open_openvino(one) for one in (model, small)]
    for session in both:
        session.structure = evaluation.structure
    pairs: tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]] = ([], [])
    equal = count = 0
    for inputs, targets in evaluation.batches:
        first, second = (call(session, inputs) for session in both)
        pairs[0].append((first, targets))
        pairs[1].append((second, targets))
        one, other = tensors_of(first)[0], tensors_of(second)[0]
        if one.ndim == 2:
            equal, count = equal + int((one.argmax(1) == other.argmax(1)).sum()), count + len(one)
    if not pairs[0]:
        raise MicrogliaError("The evaluation data are empty; give pairs of inputs and targets, such as a list of test batches.")
    scores = (evaluation.score(pairs[0]), evaluation.score(pairs[1]))
    return replace(report, scores=scores, agreement=(equal, count) if count else None)


def float_layers(model: openvino.Model) -> tuple[str, ...]:
    """Returns the names of convolutions and matrix products whose input is not rounded to 8 bits."""
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() in MULTIPLY]
    return tuple(node.get_friendly_name() for node in nodes if not _rounded(node.input_value(0).get_node()))


def _rounded(node: Any) -> bool:
    while node.get_type_name() in MOVE:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _restored(
    nncf: Any, model: openvino.Model, dataset: Any, evaluation: Evaluation, settings: dict[str, Any]
) -> openvino.Model:
    """Returns the model in int8 with as many layers in float32 as the limit needs, ``max_drop`` of the settings."""

    def validate(compiled: Any, batches: Iterable[tuple[Any, Any]]) -> tuple[float, None]:
        return evaluation.score([(answered(compiled, inputs), targets) for inputs, targets in batches]), None

    def answered(compiled: Any, inputs: Any) -> Any:
        found = compiled([tensor.detach().contiguous().numpy() for tensor in tensors_of(inputs)])
        tensors = [torch.from_numpy(found[place]) for place in range(len(found))]
        if evaluation.structure is not None:
            return evaluation.structure(tensors)
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    try:
        restored: openvino.Model = nncf.quantize_with_accuracy_control(
            model.clone(), dataset, nncf.Dataset(evaluation.batches), validate, **settings
        )
    except Exception as error:
        raise MicrogliaError(
            f"NNCF cannot hold max_drop={settings['max_drop']:g} for this model: {first_line(error)}"
        ) from error
    return restored
