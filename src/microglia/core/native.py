"""Compiled functions that work on plain memory, where the optional extension is installed.

The operators on tensors are in `microglia.runtime.operators`; these functions need none of torch's machinery.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "runtime"
"""The folder of the extension."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Returns the extension; None where it was not built, cannot be loaded, or ``MICROGLIA_ISA=torch`` turns it off."""
    built = sorted(FOLDER.glob("_kernels*.so"))
    if not built or os.environ.get("MICROGLIA_ISA") == "torch":
        return None
    try:
        return ctypes.CDLL(str(built[0]))
    except OSError:
        return None


def torch_threads() -> int | None:
    """Returns the address of the function by which compiled functions use torch's threads; None without the extension."""
    library = _library()
    if library is None or not hasattr(library, "mg_torch_parallel"):
        return None
    return ctypes.cast(library.mg_torch_parallel, ctypes.c_void_p).value


def compiled(name: str, arguments: tuple[Any, ...]) -> Callable[..., int] | None:
    """Returns a function of ``kernels.h`` that works on plain memory; None without the extension, or with an older one.

    Args:
        name: Its name.
        arguments: Types of its arguments, of `ctypes`.
    """
    library = _library()
    if library is None or not hasattr(library, name):
        return None
    function: Any = library._FuncPtr((name, library))  # a pointer of its own: another caller may declare other types
    function.argtypes, function.restype = list(arguments), ctypes.c_int
    return function  # type: ignore[no-any-return]
