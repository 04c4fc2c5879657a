"""The command `doctor`: what is installed here, what is missing, and the command that gets it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import microglia
from microglia.cli.app import Json, Shown, command
from microglia.core.errors import MicrogliaError
from microglia.core.optional import EXTRAS, present
from microglia.core.optional import command as install
from microglia.core.timing import processor_name
from microglia.runtime.operators import BUILD, has_triton, kernels

CORE = ("torch", "numpy", "safetensors", "pydantic", "pyyaml", "typer", "rich")


@command
def doctor(json_: Json = False) -> Shown:
    """List what is installed and what is missing: kernels, torch, devices, extras, each with the command that installs it."""
    found = examined()
    table = Table(title="Microglia: what is here", title_justify="left", caption_justify="left")
    for heading in ("what", "found"):
        table.add_column(heading, overflow="fold")
    for what, words in _rows(found):
        table.add_row(what, escape(words))
    gaps = [f"{gap['what']} ({gap['lacks']}): {gap['command']}" for gap in found["missing"]]
    return found, [table, *map(escape, ["Missing:", *gaps] if gaps else ["Nothing is missing."])]


def examined() -> dict[str, Any]:
    """Returns what is here and what is missing, JSON-ready; it needs no optional library and no kernels."""
    extras = {extra: {name: _version(name, module) for module, name in EXTRAS[extra].items()} for extra in EXTRAS}
    level, lacks = _kernels()
    missing = [] if lacks is None else [{"what": "kernels", "lacks": lacks, "command": BUILD}]
    for extra, packages in extras.items():
        if absent := [name for name, found in packages.items() if found is None]:
            missing.append({"what": extra, "lacks": ", ".join(absent), "command": install(extra)})
    return {
        "microglia": microglia.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "kernels": level,
        "core": {name: _version(name, name if name != "pyyaml" else "yaml") for name in CORE},
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "extras": extras,
        "missing": missing,
    }


def _kernels() -> tuple[str, str | None]:
    """Returns the level of the kernels, and why there are none."""
    try:
        return kernels()
    except MicrogliaError as error:  # MICROGLIA_ISA asks for what is not there
        return "torch", str(error)


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    with_kernels = "block kernels by triton" if has_triton() else "without block kernels: triton is not installed"
    return [f"cpu: {processor_name()}", *(f"cuda:{index}: {name} ({with_kernels})" for index, name in enumerate(gpus))]


def _version(package: str, module: str) -> str | None:
    """Returns the version of a package that can be imported, without importing it; None where it is missing."""
    if not present(module):
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    level = found["kernels"]
    rows = [
        ("microglia", f"{found['microglia']}, Python {found['python']}, {found['platform']}"),
        ("kernels", "none: sparse layers run as dense ones" if level == "torch" else f"compiled; they run as {level}"),
        ("core", _listed(found["core"])),
        ("devices", "\n".join(found["devices"])),
        ("threads", f"{found['threads']} (OMP_NUM_THREADS or torch.set_num_threads)"),
    ]
    return [*rows, *((f"extra {extra}", _listed(packages)) for extra, packages in found["extras"].items())]


def _listed(packages: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" if number else f"{name} is missing" for name, number in packages.items())
