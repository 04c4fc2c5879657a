"""The compiled kernels: an optional extension. Without a C++ compiler, or without torch to build against, there is none.

It holds no Python code, so one build serves every Python; it speaks the LibTorch Stable ABI, so one build serves every torch
from 2.11 on. Everything else about the package is in pyproject.toml.
"""

import importlib.util
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("src/microglia/runtime/kernels")
TORCH_2_11 = "0x020b000000000000ULL"


def extensions() -> list[Extension]:
    """Returns the extension, or nothing where it cannot be built."""
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations or sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    home = Path(torch.submodule_search_locations[0])
    return [
        Extension(
            "microglia.runtime._kernels",
            sources=sorted(str(file) for file in KERNELS.glob("*.cpp")),
            depends=sorted(str(file) for file in KERNELS.glob("*.h")),
            include_dirs=[str(home / "include")],
            library_dirs=[str(home / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11)],
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


setup(ext_modules=extensions(), options={"bdist_wheel": {"py_limited_api": "cp311"}})
