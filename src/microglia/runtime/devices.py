"""Properties of a device: the ways to run a layer, their timing, and the key under which times are cached."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microglia.core.errors import MicrogliaError
from microglia.runtime.candidates import Candidate, candidates
from microglia.runtime.dense.fusion import Site
from microglia.runtime.gpu.candidates import cuda_candidates
from microglia.runtime.operators import has_triton, level
from microglia.runtime.timing_cache import machine


@dataclass(frozen=True)
class Device:
    """A device on which layers run.

    Attributes:
        candidates: Returns the ways to run a layer; called with the layer and a list of notes.
        machine: The machine for which times are valid; the key of the cache.
        level: Level of the kernels, for the report.
        calls: Calls of a layer in one timing. A GPU gets several calls at once, as in a network; otherwise the time of a small
            layer would be only its launch time.
    """

    candidates: Callable[[Site, list[str]], Iterable[Candidate]]
    machine: Callable[[], dict[str, Any]]
    level: Callable[[], str]
    calls: int


CPU = Device(lambda site, notes: candidates(site), machine, level, 1)


def device_of(tensors: Iterable[Tensor]) -> Device:
    """Returns the device of a model, from its parameters, buffers and inputs.

    Raises:
        MicrogliaError: The tensors are on several devices, or on a device other than the CPU or a CUDA GPU.
    """
    found = {tensor.device for tensor in tensors}
    if all(device.type == "cpu" for device in found):
        return CPU
    (first, *others) = sorted(map(str, found))
    if others or not first.startswith("cuda"):
        raise MicrogliaError(
            f"accelerate runs on the CPU or on one CUDA GPU, not on {', '.join([first, *others])}; move the model and its "
            "inputs to one of them with .to()."
        )
    return Device(cuda_candidates, functools.partial(gpu, torch.device(first)), cuda_level, 8)


def cuda_level() -> str:
    """Returns the level of the block kernels on a GPU."""
    return f"triton {version('triton')}" if has_triton() else "none: triton is not installed"


def gpu(device: torch.device) -> dict[str, Any]:
    """Returns all that times on a GPU depend on besides the layer."""
    return {
        "processor": torch.cuda.get_device_name(device),
        "level": cuda_level(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "settings": _settings(),
        "kernels": _sources(),
    }


def _settings() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@functools.cache
def _sources() -> str:
    """Returns a digest of the Triton kernels, so that changed kernels are measured anew."""
    files = sorted((Path(__file__).parent / "gpu" / "triton").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
