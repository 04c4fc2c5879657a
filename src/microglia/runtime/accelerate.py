"""`accelerate`: the fastest exact execution of sparse weights on this machine, chosen per layer by timing.

The result is never slower than dense: the whole model is timed against the best dense executions. If it is slower, the best
dense execution is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.running import first_line, folded_twin, run, undisturbed
from microglia.core.timing import Timing, time_interleaved
from microglia.runtime.accelerated import Accelerated, refuse_autocast
from microglia.runtime.bfloat16 import TOLERANCE, dense_lowered, lower, lowered_site
from microglia.runtime.candidates import Candidate
from microglia.runtime.dense.execution import bind, difference, runners
from microglia.runtime.dense.fusion import Site, fuse
from microglia.runtime.dense.kinds import TORCH, Runner, execution_names, is_exact
from microglia.runtime.dense.traced import traced_once
from microglia.runtime.devices import CPU, Device, device_of
from microglia.runtime.record import PRECISIONS, record_of
from microglia.runtime.report import AccelerationReport, LayerChoice, is_dense, left_dense
from microglia.runtime.sparse_layers.chain import chained
from microglia.runtime.timing_cache import Choices, Times, default_cache

DENSE = TORCH
"""The dense executions that are timed against, as `microglia.measure.executions` names them."""
CONTIGUOUS = ("rows 4x1", "unstructured")
"""Ways to run a layer with contiguous input and output; all others keep channels last."""
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
        precision: ``float32`` or ``bf16``.
        cache: Folder of earlier timings on this machine; ``"default"`` for `default_cache`, None for none.
        rounds: Rounds of every timing.
        progress: Called after each layer with the number of timed layers and of all layers.
        notes: A list to which the executions that could not be timed are added.

    Raises:
        MicrogliaError: The model is neither on the CPU nor on one CUDA GPU, cannot be traced, or does not run on these inputs;
            it has no convolution or linear layer of these types; or the precision is unknown; or autocast is on.
    """
    example, model = Example.of(example_inputs).copied(), model.dense if isinstance(model, Accelerated) else model
    device, half = _checked([*example.tensors, *model.parameters()], precision), precision == "bf16"
    against = execution_names(against)
    own = notes if notes is not None else []
    dense = folded_twin(model)
    with undisturbed(), traced_once():
        sites = sites_of(dense, example, half)
        own += left_dense(model, {site.name for site in sites})
        measured = _measure(sites, device, _cached(cache, device), rounds, progress=progress, notes=own)
        ready = _executions(dense, example, against, measured, notes=own, half=half)
        fast = {name: Accelerated(runner, dense, example) for name, runner in ready.items()}
        first, second = _timed_twice({name: ready[name] if is_dense(name) else fast[name] for name in ready}, example, rounds)
    report = _report(measured, device, first, second, notes=own, precision=precision)
    return fast[report.chosen]._chosen_by(report, record_of(report, device.machine(), against, example))


def _checked(tensors: Sequence[Tensor], precision: str) -> Device:
    """Returns the device of all tensors, if a model is accelerated there in this precision."""
    if precision not in PRECISIONS:
        raise MicrogliaError(f"A model is accelerated in {' or '.join(PRECISIONS)}, not in {precision!r}.")
    device = device_of(tensors)
    refuse_autocast(next((tensor.device.type for tensor in tensors), "cpu"))
    if precision == "bf16" and device is not CPU:
        raise MicrogliaError("bf16 is for float32 models on the CPU; on a GPU convert the model with .bfloat16() instead.")
    return device


def _cached(cache: Path | str | None, device: Device) -> Choices:
    """Returns the earlier timings on this machine."""
    folder = default_cache() if cache == "default" else None if cache is None else Path(cache)
    return Choices(folder, device.machine())


def _executions(
    dense: nn.Module, example: Example, against: Sequence[str], measured: list[Measured], *, notes: list[str], half: bool
) -> dict[str, Runner]:
    """Returns the whole model in every execution to time: the dense ones, and those of the fastest layers."""
    ready: dict[str, Runner] = runners(dense, example, against, notes=notes)
    if not any(map(is_exact, ready)):
        ready["eager"] = dense
    ready.update(dense_lowered(dense, example, [name for name in against if name in TORCH], notes) if half else {})
    ready.update(_plans(dense, example, measured, notes, half))
    return ready


def _timed_twice(ready: dict[str, Runner], example: Example, rounds: int) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Returns two timings of all executions.

    The minimum of many noisy medians is biased low: one timing picks the sparse plan, a second compares it with dense.
    """
    calls = {name: bind(runner, example) for name, runner in ready.items()}
    first, second = (time_interleaved(calls, rounds=rounds, warmup=2) for _ in range(2))
    return first, second


def _report(
    measured: list[Measured],
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
    layers = tuple(_choice(site, found, best) for site, found in measured)
    where = device.level(), torch.get_num_threads()
    return AccelerationReport(layers, times, best, best_dense, *where, tuple(notes), precision)


def sites_of(dense: nn.Module, example: Example, half: bool) -> list[Site]:
    """Returns the layers that can be accelerated, once the model has run."""
    run(dense, example.copied())
    sites: list[Site] = []

    def note(site: Site) -> nn.Module:
        sites.append(site)
        return nn.Identity()

    fuse(dense, example, note)
    if not sites:
        raise MicrogliaError("There is no 2-d convolution or linear layer, on the CPU in float32, that could be accelerated.")
    return [lowered_site(site) for site in sites] if half else sites


def _measure(
    sites: list[Site], device: Device, choices: Choices, rounds: int, *, progress: Progress | None, notes: list[str]
) -> list[Measured]:
    measured = []
    for done, site in enumerate(sites, 1):
        ways = {candidate.name: candidate for candidate in device.candidates(site, notes)}
        times = choices.get(site, list(ways))
        if times is None:
            times = _time(site, ways, device.calls, rounds, notes)
            choices.put(site, times)
        measured.append((site, {name: (ways[name], time) for name, time in times.items()}))
        if progress is not None:
            progress(done, len(sites))
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
            module = candidate.make()
            out = module(*given)
            expected = out if expected is None else expected
            problem = difference(expected, out)
        except Exception as error:
            problem = first_line(error)
        if problem is None:
            calls[name] = lambda module=module, given=given: [module(*given) for _ in range(count)]  # type: ignore[misc]
        else:
            notes.append(f"{site.name} as {name!r} was left out: {problem}")
    times = time_interleaved(calls, rounds=rounds, warmup=2, min_round_seconds=0.003)
    return {name: time.median / count for name, time in times.items()}


def _laid_out(t: Tensor, name: str) -> Tensor:
    """Returns an input in the memory layout that a way to run takes without a copy."""
    return t if t.ndim != 4 or name in CONTIGUOUS else t.contiguous(memory_format=torch.channels_last)


def _plans(dense: nn.Module, example: Example, measured: list[Measured], notes: list[str], half: bool) -> dict[str, Runner]:
    """Returns two whole models: with each layer's fastest way, and with its fastest way that keeps channels last.

    A layer in another layout makes its neighbours copy. Only the time of the whole model shows this cost.
    """
    expected = run(dense, example.copied())
    plans: dict[str, Runner] = {}
    names = [_fastest(found) for _, found in measured]
    kept = [_fastest({n: f for n, f in found.items() if n not in CONTIGUOUS}) for _, found in measured]
    for title, chosen in {"sparse": kept, "sparse, mixed layouts": names}.items():
        if title != "sparse" and chosen == kept:
            continue
        ways = [found[name][0] for (_, found), name in zip(measured, chosen, strict=True)]
        if all(map(is_dense, chosen)):
            title = "dense, layer by layer"  # noqa: PLW2901
        title = f"{title}, bf16" if half else title  # noqa: PLW2901
        try:
            plan = plan_of(dense, example, ways, half)
            problem = difference(expected, run(plan, example.copied()), TOLERANCE if half else None)
        except Exception as error:
            problem = first_line(error)
        if problem is None:
            plans[title] = plan
        else:
            notes.append(f"{title} was left out: {problem}")
    return plans


def plan_of(dense: nn.Module, example: Example, ways: Sequence[Candidate], half: bool) -> nn.Module:
    """Returns the whole model with one way for each layer; consecutive float32 block layers run as one operator."""
    left = iter(ways)

    def engine(site: Site) -> nn.Module:
        return next(left).make()

    return lower(dense, example, engine) if half else chained(fuse(dense, example, engine))


def _fastest(found: dict[str, tuple[Candidate, float]]) -> str:
    return min(found, key=lambda name: found[name][1])


def _choice(site: Site, found: dict[str, tuple[Candidate, float]], best: str) -> LayerChoice:
    times = {name: time for name, (_, time) in found.items()}
    if best.startswith(("sparse", "dense, layer by layer")):
        left = {n: t for n, t in times.items() if best == "sparse, mixed layouts" or n not in CONTIGUOUS}
        chosen = min(left, key=left.__getitem__)
        faster = min(time for name, time in times.items() if is_dense(name)) / times[chosen]
        why = "dense is the fastest way" if is_dense(chosen) else f"{faster:.2f}x as fast as dense"
    else:
        chosen, why = min(filter(is_dense, times), key=times.__getitem__), f"as a whole the model is fastest as {best!r}"
    density = int(site.weight.count_nonzero()) / site.weight.numel()
    return LayerChoice(site.name, site.kind, tuple(site.weight.shape), density, chosen, times, why)
