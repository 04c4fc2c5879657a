"""`torch.compile` fails as it does on a machine without a compiler, which costs no time.

Compiled execution takes half a minute and a compiler. `test_runtime_dense.py` and the demo test it; elsewhere it is left out
with a note.
"""

from typing import NoReturn

import torch


def without_compiler() -> None:
    """Makes `torch.compile` fail in this process."""
    torch.compile = _no_compiler


def _no_compiler(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")
