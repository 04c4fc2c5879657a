"""`accelerate`: the fastest exact execution of sparse weights on this machine, chosen layer by layer by timing.

Never slower than dense: what comes back was timed as a whole against the best dense executions, and is the best of these
where it lost.
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
from microglia.core.timing import time_interleaved
from microglia.runtime.accelerated import Accelerated, refuse_autocast
from microglia.runtime.bfloat16 import TOLERANCE, dense_lowered, lower, lowered_site
from microglia.runtime.candidates import Candidate
from microglia.runtime.dense.execution import bind, difference, runners
from microglia.runtime.dense.fusion import Site, fuse
from microglia.runtime.dense.kinds import TORCH, Runner, execution_names, is_exact
from microglia.runtime.devices import CPU, Device, device_of
from microglia.runtime.report import AccelerationReport, LayerChoice, is_dense, left_dense
from microglia.runtime.sparse_layers.chain import chained
from microglia.runtime.timing_cache import Choices, Times, default_cache

DENSE = TORCH
"""The dense executions that are timed against, as `microglia.measure.executions` names them."""
CONTIGUOUS = ("rows 4x1", "unstructured")
"""Ways to run a layer that take and give contiguous images; all others keep channels last."""
Measured = tuple[Site, dict[str, tuple[Candidate, float]]]
"""A layer and, by name, each way to run it and its milliseconds."""
PRECISIONS = ("float32", "bf16")
Progress = Callable[[int, int], None]
"""Told after each layer how many of how many are timed."""


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
    each way that could be fastest: dense (oneDNN with a packed weight), without its rows and columns of zeros, in blocks of
    16 outputs x 1 to 8 inputs, in groups of rows, or by single weights. On a CUDA GPU: dense (cuDNN, cuBLAS), without rows
    and columns of zeros, in blocks of 16 to 128 outputs x 1 to 64 inputs (Triton), or 2:4. Then the whole is timed.

    In ``bf16``, which is not exact and therefore only done when asked for, weights and everything between the layers are
    rounded to bfloat16, sums are not. Layers are timed dense and in blocks of pairs, and the whole against the dense
    executions in bfloat16 and in float32 both: where these are faster, one of them is returned. Inputs and outputs stay
    float32, and an execution whose outputs are further than 5 % of the largest from the model's is left out.

    Example:
        >>> fast = mg.accelerate(model, images)               # doctest: +SKIP
        >>> print(fast.report())                              # doctest: +SKIP

    Args:
        model: Any model that torch.export can trace, on the CPU in float32 or on one CUDA GPU in float32, float16 or
            bfloat16; stays as it is.
        example_inputs: Inputs of the shape to serve: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        against: The dense executions that it must not be slower than; the fastest of them is returned if it is. ``torch``
            for PyTorch's own; ``all`` adds the engines that are installed (ONNX Runtime, OpenVINO), which takes seconds
            more and may return a model that runs in one of them; or names (see `microglia.measure.executions`). One that
            rounds the weights, such as ``openvino-int8``, is timed and reported, never returned.
        precision: ``float32`` or ``bf16``.
        cache: Folder of times measured earlier on this machine; ``"default"`` for `default_cache`, None for none.
        rounds: Of every timing.
        progress: Called after each layer with how many of how many are timed.
        notes: A list to which is added what could not be timed.

    Raises:
        MicrogliaError: The model is neither on the CPU nor on one CUDA GPU, cannot be traced, has no convolution or linear
            layer of these types, or does not run on these inputs; or the precision is another; or autocast is on.
    """
    if precision not in PRECISIONS:
        raise MicrogliaError(f"A model is accelerated in {' or '.join(PRECISIONS)}, not in {precision!r}.")
    half = precision == "bf16"
    example = Example.of(example_inputs).copied()
    device = device_of([*example.tensors, *model.parameters()])
    refuse_autocast(next((tensor.device.type for tensor in [*example.tensors, *model.parameters()]), "cpu"))
    if half and device is not CPU:
        raise MicrogliaError("bf16 is for float32 models on the CPU; on a GPU convert the model with .bfloat16() instead.")
    against = execution_names(against)
    folder = default_cache() if cache == "default" else None if cache is None else Path(cache)
    own = notes if notes is not None else []
    dense = folded_twin(model)
    with undisturbed():
        run(dense, example.copied())
        sites = [lowered_site(site) if half else site for site in _sites(dense, example)]
        own += left_dense(model, {site.name for site in sites})
        choices = Choices(folder, device.machine())
        measured = _measure(sites, device, choices, rounds, progress=progress, notes=own)
        ready: dict[str, Runner] = runners(dense, example, against, notes=own)
        if not any(map(is_exact, ready)):
            ready["eager"] = dense
        ready.update(dense_lowered(dense, example, [name for name in against if name in TORCH], own) if half else {})
        ready.update(_plans(dense, example, measured, own, half))
        fast = {name: Accelerated(runner, dense, example) for name, runner in ready.items()}
        calls = {name: bind(ready[name] if is_dense(name) else fast[name], example) for name in ready}
        # The least of many medians is too small by chance: one timing says which sparse way to take, another one whether.
        first, second = (time_interleaved(calls, rounds=rounds, warmup=2) for _ in range(2))
    times = {name: time.median for name, time in second.items()}
    best_dense = min(filter(is_exact, filter(is_dense, times)), key=times.__getitem__)
    sparse = min((name for name in times if not is_dense(name)), key=lambda name: first[name].median, default=best_dense)
    best = min(best_dense, sparse, key=times.__getitem__)
    layers = tuple(_choice(site, found, best) for site, found in measured)
    where = device.level(), torch.get_num_threads()
    fast[best]._report = AccelerationReport(layers, times, best, best_dense, *where, tuple(own), precision)
    return fast[best]


def _sites(dense: nn.Module, example: Example) -> list[Site]:
    sites: list[Site] = []

    def note(site: Site) -> nn.Module:
        sites.append(site)
        return nn.Identity()

    fuse(dense, example, note)
    if not sites:
        raise MicrogliaError("There is no 2-d convolution or linear layer, on the CPU in float32, that could be accelerated.")
    return sites


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
    """Returns the time of each way to run a layer, in milliseconds, without those that fail or differ from the first."""
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
    """Returns an input as the way to run takes it without a copy."""
    return t if t.ndim != 4 or name in CONTIGUOUS else t.contiguous(memory_format=torch.channels_last)


def _plans(dense: nn.Module, example: Example, measured: list[Measured], notes: list[str], half: bool) -> dict[str, Runner]:
    """Returns the whole model with the fastest way of each layer: of all ways, and of those that keep channels last.

    A layer in the other layout makes its neighbours copy, which only the time of the whole shows.
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
            plan = _plan(dense, example, ways, half)
            problem = difference(expected, run(plan, example.copied()), TOLERANCE if half else None)
        except Exception as error:
            problem = first_line(error)
        if problem is None:
            plans[title] = plan
        else:
            notes.append(f"{title} was left out: {problem}")
    return plans


def _plan(dense: nn.Module, example: Example, ways: Sequence[Candidate], half: bool) -> nn.Module:
    """Returns the whole model with one way for each layer; blocks in float32 that follow each other run as one operator."""
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
