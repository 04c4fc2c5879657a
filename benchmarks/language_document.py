"""Sections of ``docs/language.md``, each written by the benchmark that measured it, between two marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

import microglia as mg
from microglia.core.timing import processor_name, time_interleaved
from microglia.methods import Layerwise, drop_blocks

RULES = ("magnitude", "wanda", "sparsegpt")
PATTERNS: dict[str, dict[str, Any]] = {"50 %": {"density": 0.5}, "2:4": {"pattern": "nm:2:4"}}


def section(file: Path | None, name: str, lines: Sequence[str]) -> None:
    """Prints lines; with a file it also replaces the section of that name in it, which has marks around it."""
    body = "\n".join(
        [*lines, "", f"Measured on {processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}."]
    )
    print(body)
    if file is None:
        return
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = file.read_text()
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{file} has no marks {begin} and {end}.")
    file.write_text(f"{before}{begin}\n{body}\n{end}{after}")


def pruned(build: Callable[[], nn.Module], batches: Sequence[Any], rule: str, **settings: Any) -> nn.Module:
    """Returns a fresh model pruned block by block."""
    model = build()
    Layerwise(model, batches, rule=rule, mask_block=settings.pop("mask_block", 128), **settings).prune()
    return model


def smaller(
    build: Callable[[], nn.Module], batches: Sequence[Any], share: float, exclude: Sequence[str]
) -> dict[str, nn.Module]:
    """Returns models with about a share of the parameters: by the width of the MLPs, by heads and MLPs, by depth.

    Args:
        build: Makes the dense model.
        batches: Calibration inputs.
        share: Fraction of all parameters to keep.
        exclude: Layers that keep their shapes: embeddings and the output.
    """
    example = batches[0]
    found: dict[str, nn.Module] = {}
    cuts = {"MLP width": [*exclude, "*attn*", "*attention.self*", "*attention.output*"], "heads and MLP width": list(exclude)}
    for name, kept in cuts.items():
        try:
            model = build()
            names = list(mg.core.layers.prunable_layers(model))
            known = [pattern for pattern in kept if any(_matches(pattern, layer) for layer in names)]
            found[name] = mg.prune_channels(model, example, mg.Budget(params=share), exclude=known, round_to=1, keep_class=True)
        except mg.core.errors.MicrogliaError as error:
            print(f"{name}: {error}")
    dense = build()
    total = sum(p.numel() for p in dense.parameters())
    _, blocks = mg.methods.blocks.find_blocks(dense)
    each = sum(p.numel() for p in blocks[0].parameters())
    keep = max(1, len(blocks) - round((1 - share) * total / each))
    found[f"depth, {keep} of {len(blocks)} blocks"] = drop_blocks(dense, batches, keep=keep)
    return found


def _matches(pattern: str, name: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name.rpartition(".")[0], pattern)


def times(models: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median milliseconds of calls that are timed in turns."""
    found = time_interleaved(models, rounds=rounds)
    return {name: timing.median for name, timing in found.items()}
