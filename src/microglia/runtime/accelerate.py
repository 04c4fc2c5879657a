"""`accelerate`: the fastest exact execution of sparse weights on this machine, chosen per layer by timing.

The result is never slower than dense: the whole model is timed against the best dense executions. If it is slower, the best
dense execution is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.progress import progress_bar
from microglia.core.running import first_line, folded_twin, run, undisturbed
from microglia.core.timing import Timing, time_interleaved
from microglia.runtime.accelerated import Accelerated, refuse_autocast
from microglia.runtime.candidates import Candidate
from microglia.runtime.dense.execution import bind, difference, runners
from microglia.runtime.dense.fusion import Site, fuse
from microglia.runtime.dense.kinds import TORCH, Runner, execution_names, is_exact
from microglia.runtime.dense.packing import Packed
from microglia.runtime.dense.traced import traced_once
from microglia.runtime.devices import CPU, Device, device_of
from microglia.runtime.int8.agreement import agreement_of
from microglia.runtime.int8.calibration import Ranges, calibration_batches, ranges_of
from microglia.runtime.plans import CONTIGUOUS, choices_of
from microglia.runtime.precisions import Precision, precision_of
from microglia.runtime.record import record_of
from microglia.runtime.report import AccelerationReport, LayerChoice, is_dense, left_dense
from microglia.runtime.timing_cache import Choices, Times, default_cache

DENSE = TORCH
"""The dense executions that are timed against, as `microglia.measure.executions` names them."""
Measured = tuple[Site, dict[str, tuple[Candidate, float]]]
"""A layer, and the milliseconds of each way to run it, by name."""
Progress = Callable[[int, int], None]
"""Called after each layer with the number of timed layers and of all layers."""


def accelerate(
    model: nn.Module,
    example_inputs: Any,
    *,
    against: str | Sequence[str] = "torch",
    precision: str = "float32",
    calibration: Iterable[Any] | None = None,
    cache: Path | str | None = "default",
    rounds: int = 9,
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> Accelerated:
    """Returns a masked or shrunk model in the fastest exact execution on this machine.

    Batch norms are folded, activations and residual additions fused, and every convolution and linear layer is timed in
    each way that could be fastest: dense (oneDNN with a packed weight), without its zero rows and columns, in blocks of 16
    outputs x 1 to 8 inputs, in groups of rows, or by single weights. On a CUDA GPU: dense (cuDNN, cuBLAS), without zero rows
    and columns, in blocks of 16 to 128 outputs x 1 to 64 inputs (Triton), or 2:4. Then the whole model is timed.

    ``bf16`` is not exact, so it is used only on request. Weights and activations between the layers are rounded to bfloat16;
    sums are not. Layers are timed dense and in blocks of pairs. The whole model is timed against the dense executions in
    bfloat16 and in float32; the fastest is returned. Inputs and outputs stay float32. An execution is left out if its outputs
    differ from the model's by more than 5 % of the largest output.

    ``int8`` is not exact either. Weights are rounded to 8 bits for each output, activations to 8 bits on the ranges that the
    calibration batches show; sums are exact. Layers are timed in blocks of 16 outputs x 4 inputs beside their exact ways: a
    layer stays in float32 where that is faster, and so does the model. The report says how far the outputs on the calibration
    batches are from the model's. An execution is left out if they differ by more than half of the largest output.

    Example:
        >>> fast = mg.accelerate(model, images)               # doctest: +SKIP
        >>> print(fast.report())                              # doctest: +SKIP

    Args:
        model: Any model that torch.export can trace, on the CPU in float32 or on one CUDA GPU in float32, float16 or
            bfloat16; it stays unchanged. An accelerated one is accelerated anew.
        example_inputs: Inputs of the shape to serve: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        against: The dense executions that it must not be slower than; the fastest of them is returned if it is. ``torch``
            for PyTorch's own; ``all`` adds the engines that are installed (ONNX Runtime, OpenVINO), which takes seconds
            more and may return a model that runs in one of them; or names (see `microglia.measure.executions`). One that
            rounds the weights, such as ``openvino-int8``, is timed and reported, never returned.
        precision: ``float32``, ``bf16`` or ``int8``.
        calibration: For ``int8`` alone: batches of inputs, or of (inputs, targets) as a loader gives them, such as training
            images; the first 256 examples are read.
        cache: Folder of earlier timings on this machine; ``"default"`` for `default_cache`, None for none.
        rounds: Rounds of every timing.
        progress: Called after each layer with the number of timed layers and of all layers.
        notes: A list to which the executions that could not be timed are added.

    Raises:
        MicrogliaError: The model is neither on the CPU nor on one CUDA GPU, cannot be traced, or does not run on these inputs;
            it has no convolution or linear layer of these types; or the precision is unknown; or autocast is on; or calibration
            batches are missing, superfluous, of another form than the example, or not finite.
    """
    example, known = Example.of(example_inputs).copied(), precision_of(precision)
    if not known.calibrated and calibration is not None:
        raise MicrogliaError(f'Only int8 is calibrated: leave calibration out, or give precision="int8", not {precision!r}.')
    batches = calibration_batches(calibration, example) if known.calibrated else []
    how = {"against": against, "cache": cache, "rounds": rounds, "progress": progress, "notes": notes}
    return accelerate_calibrated(model, example, precision, batches, **how)  # type: ignore[arg-type]


def accelerate_calibrated(
    model: nn.Module,
    example: Example,
    precision: str,
    batches: Sequence[Example],
    ranges: Ranges | None = None,
    *,
    against: str | Sequence[str] = "torch",
    cache: Path | str | None = "default",
    rounds: int = 9,
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> Accelerated:
    """Returns the same as `accelerate`, from checked calibration batches, or from known ranges.

    Args:
        model: As for `accelerate`.
        example: Example inputs.
        precision: Name of the precision.
        batches: Batches that calibrate, and on which outputs are compared.
        ranges: The range of each value, if it is known.
        against: As for `accelerate`, and the rest.
        cache: Folder of earlier timings.
        rounds: Rounds of every timing.
        progress: Called after each layer.
        notes: A list for what could not be timed.
    """
    model, known = model.dense if isinstance(model, Accelerated) else model, precision_of(precision)
    device = _checked([*example.tensors, *model.parameters()], known)
    against = execution_names(against)
    own = notes if notes is not None else []
    dense = folded_twin(model)
    with undisturbed(), traced_once():
        sites = sites_of(dense, example, known)
        own += left_dense(model, {site.name for site in sites})
        ranges = ranges if ranges is not None or not batches else ranges_of(dense, batches, Packed)
        measured = _measure(sites, device, _cached(cache, device), rounds, known, progress=progress, notes=own)
        ready, chosen = _executions(dense, example, against, measured, precision=known, ranges=ranges or {}, notes=own)
        fast = {name: Accelerated(runner, dense, example) for name, runner in ready.items()}
        first, second = _timed_twice({name: ready[name] if is_dense(name) else fast[name] for name in ready}, example, rounds)
        report = _report(measured, chosen, device, first, second, notes=own, precision=precision)
        if batches and any(known.rounds(layer.chosen) for layer in report.layers):
            compared = agreement_of(dense, ready[report.chosen], batches, example.batch)
            report = replace(report, rounding=compared)
    return fast[report.chosen]._chosen_by(report, record_of(report, device.machine(), against, example, ranges))


def _checked(tensors: Sequence[Tensor], precision: Precision) -> Device:
    """Returns the device of all tensors, if a model is accelerated there in this precision."""
    device = device_of(tensors)
    refuse_autocast(next((tensor.device.type for tensor in tensors), "cpu"))
    if precision.cpu and device is not CPU:
        raise MicrogliaError(precision.cpu)
    return device


def _cached(cache: Path | str | None, device: Device) -> Choices:
    """Returns the earlier timings on this machine."""
    folder = default_cache() if cache == "default" else None if cache is None else Path(cache)
    return Choices(folder, device.machine())


def _executions(
    dense: nn.Module,
    example: Example,
    against: Sequence[str],
    measured: list[Measured],
    *,
    precision: Precision,
    ranges: Ranges,
    notes: list[str],
) -> tuple[dict[str, Runner], dict[str, list[str]]]:
    """Returns the whole model in every execution to time, the dense ones and those of the fastest layers; and these layers."""
    ready: dict[str, Runner] = runners(dense, example, against, notes=notes)
    if not any(map(is_exact, ready)):
        ready["eager"] = dense
    ready.update(precision.dense(dense, example, against, notes))
    chosen = choices_of([found for _, found in measured], precision)
    ready.update(_plans(dense, example, measured, chosen, precision=precision, ranges=ranges, notes=notes))
    return ready, chosen


def _timed_twice(ready: dict[str, Runner], example: Example, rounds: int) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Returns two timings of all executions.

    The minimum of many noisy medians is biased low: one timing picks the sparse plan, a second compares it with dense.
    """
    calls = {name: bind(runner, example) for name, runner in ready.items()}
    first = time_interleaved(calls, rounds=rounds, warmup=2, title="accelerate: whole model")
    return first, time_interleaved(calls, rounds=rounds, warmup=2, title="accelerate: whole model, again")


def _report(
    measured: list[Measured],
    chosen: dict[str, list[str]],
    device: Device,
    first: dict[str, Timing],
    second: dict[str, Timing],
    *,
    notes: list[str],
    precision: str,
) -> AccelerationReport:
    """Returns which execution was chosen, and why: the first timing picks the sparse plan, the second decides."""
    times = {name: time.median for name, time in second.items()}
    best_dense = min(filter(is_exact, filter(is_dense, times)), key=times.__getitem__)
    sparse = min((name for name in times if not is_dense(name)), key=lambda name: first[name].median, default=best_dense)
    best = min(best_dense, sparse, key=times.__getitem__)
    names = chosen.get(best, [None] * len(measured))
    layers = tuple(_choice(site, found, name, best) for (site, found), name in zip(measured, names, strict=True))
    where = device.level(), torch.get_num_threads()
    return AccelerationReport(layers, times, best, best_dense, *where, tuple(notes), precision)


def sites_of(dense: nn.Module, example: Example, precision: Precision) -> list[Site]:
    """Returns the layers that can be accelerated, once the model has run."""
    run(dense, example.copied())
    sites: list[Site] = []

    def note(site: Site) -> nn.Module:
        sites.append(site)
        return nn.Identity()

    fuse(dense, example, note)
    if not sites:
        raise MicrogliaError("There is no 2-d convolution or linear layer, on the CPU in float32, that could be accelerated.")
    return [precision.site(site) for site in sites]


def _measure(
    sites: list[Site],
    device: Device,
    choices: Choices,
    rounds: int,
    precision: Precision,
    *,
    progress: Progress | None,
    notes: list[str],
) -> list[Measured]:
    measured = []
    with progress_bar("accelerate: layers", len(sites)) as bar:
        for done, site in enumerate(sites, 1):
            ways = {candidate.name: candidate for candidate in (*device.candidates(site, notes), *precision.candidates(site))}
            if (times := choices.get(site, list(ways))) is None:
                choices.put(site, times := _time(site, ways, device.calls, rounds, notes))
            measured.append((site, {name: (ways[name], time) for name, time in times.items()}))
            for told in (bar.at, progress or bar.at):
                told(done, len(sites))
    choices.save()
    return measured


def _time(site: Site, ways: dict[str, Candidate], count: int, rounds: int, notes: list[str]) -> Times:
    """Returns the milliseconds of each way to run a layer, without ways that fail or whose outputs differ from the first."""
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(shape, generator=generator).to(site.weight) for shape in (site.input_shape, site.output_shape))
    calls: dict[str, Callable[[], object]] = {}
    expected: Tensor | None = None
    for name, candidate in ways.items():
        given = [_laid_out(t, name) for t in ((x, other) if site.residual else (x,))]
        try:
            call, out = candidate.trial(given)
            expected = out if expected is None else expected
            problem = difference(expected, out, candidate.tolerance)
        except Exception as error:
            problem = first_line(error)
        if problem is None:
            calls[name] = lambda call=call: [call() for _ in range(count)]  # type: ignore[misc]
        else:
            notes.append(f"{site.name} as {name!r} was left out: {problem}")
    times = time_interleaved(calls, rounds=rounds, warmup=2, min_round_seconds=0.003)
    return {name: time.median / count for name, time in times.items()}


def _laid_out(t: Tensor, name: str) -> Tensor:
    """Returns an input in the memory layout that a way to run takes without a copy."""
    return t if t.ndim != 4 or name in CONTIGUOUS else t.contiguous(memory_format=torch.channels_last)


def _plans(
    dense: nn.Module,
    example: Example,
    measured: list[Measured],
    chosen: dict[str, list[str]],
    *,
    precision: Precision,
    ranges: Ranges,
    notes: list[str],
) -> dict[str, Runner]:
    """Returns whole models with the chosen way for each layer, those whose outputs are near enough."""
    expected = run(dense, example.copied())
    plans: dict[str, Runner] = {}
    for title, names in chosen.items():
        ways = [found[name][0] for (_, found), name in zip(measured, names, strict=True)]
        try:
            plan = precision.plan(dense, example, ways, ranges)
            problem = difference(expected, run(plan, example.copied()), tolerance_of(names, precision))
        except Exception as error:
            problem = first_line(error)
        if problem is None:
            plans[title] = plan
        else:
            notes.append(f"{title} was left out: {problem}")
    return plans


def tolerance_of(names: Sequence[str], precision: Precision) -> float | None:
    """Returns the tolerated difference of a whole model with these ways; None for the usual one."""
    return precision.tolerance if any(map(precision.rounds, names)) else None


def _choice(site: Site, found: dict[str, tuple[Candidate, float]], name: str | None, best: str) -> LayerChoice:
    """Returns the choice for one layer: its way in the best model, or its fastest dense way if that is not one by layers."""
    times = {way: time for way, (_, time) in found.items()}
    if name is not None:
        chosen = name
        faster = min(time for way, time in times.items() if is_dense(way)) / times[chosen]
        why = "dense is the fastest way" if is_dense(chosen) else f"{faster:.2f}x as fast as dense"
    else:
        chosen, why = min(filter(is_dense, times), key=times.__getitem__), f"as a whole the model is fastest as {best!r}"
    density = int(site.weight.count_nonzero()) / site.weight.numel()
    return LayerChoice(site.name, site.kind, tuple(site.weight.shape), density, chosen, times, why)
