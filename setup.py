"""The compiled kernels: an optional extension that needs a C++17 compiler to build, and no torch.

It holds no Python code, so one build serves every Python; it calls torch through the LibTorch Stable ABI, so one build serves
every torch from 2.11 on. The functions that it calls are declared in `kernels/libtorch.h`. To link, a library that bears the
name of torch's and has nothing but these functions is made here: the kernels then name libtorch_cpu.so as one that they need
(Python loads torch's symbols for torch alone, and only a library that names torch's finds them), and a function that is not
declared stops the build rather than the user. Everything else about the package is in pyproject.toml.
"""

import platform
import re
import sys
import tempfile
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# From setuptools itself: it puts its own `distutils` in the place of Python's.
from distutils.ccompiler import new_compiler  # isort: skip
from distutils.errors import CCompilerError, DistutilsError  # isort: skip
from distutils.sysconfig import customize_compiler  # isort: skip

KERNELS = Path("src/microglia/runtime/kernels")
# Bytes of debugging information and names would be nine tenths of the library.
COMPILE = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]
LINK = ["-Wl,-s", "-Wl,-z,defs"]
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def declared() -> list[str]:
    """Returns the names of the functions that `libtorch.h` declares."""
    block = (KERNELS / "libtorch.h").read_text(encoding="utf-8").partition('extern "C" {')[2]
    return re.findall(r"^(?:int32_t|AOTITorchError) (\w+)\(", block, flags=re.MULTILINE)


def compiles() -> bool:
    """Tells whether there is a compiler that builds C++17."""
    compiler = new_compiler()
    customize_compiler(compiler)
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n", encoding="utf-8")
        try:
            compiler.compile([str(probe)], output_dir=folder, extra_postargs=COMPILE)
        except (CCompilerError, DistutilsError, OSError):
            return False
    return True


def extensions() -> list[Extension]:
    """Returns the extension, or nothing where it cannot be built: the wheel is then one of Python alone."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    if not BUILDS.isdisjoint(sys.argv) and not compiles():
        print(
            "Microglia is built without its compiled kernels, for there is no C++17 compiler: everything works, and sparse "
            "layers run as dense ones. For the kernels, install g++ or clang++, then build again.",
            file=sys.stderr,
        )
        return []
    return [
        Extension(
            "microglia.runtime._kernels",
            sources=sorted(str(file) for file in KERNELS.glob("*.cpp")),
            depends=[*sorted(str(file) for file in KERNELS.glob("*.h")), "setup.py"],
            libraries=["torch_cpu"],
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


class BuildKernels(build_ext):
    """Builds the extension against a library of torch's name that is made for it."""

    def build_extension(self, ext: Extension) -> None:
        """Makes the library to link against, then builds as usual."""
        folder = Path(self.build_temp) / "link"
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "torch_cpu.cpp"
        functions = "".join(f"void {name}() {{}}\n" for name in declared())
        source.write_text(f'extern "C" {{\n{functions}}}\n', encoding="utf-8")
        objects = self.compiler.compile([str(source)], output_dir=str(folder))
        name = "libtorch_cpu.so"
        self.compiler.link_shared_object(objects, str(folder / name), extra_postargs=[f"-Wl,-soname,{name}"], target_lang="c++")
        ext.library_dirs = [str(folder)]
        with ThreadPool() as pool:  # a file on each processor: one after the other takes minutes
            one = self.compiler.compile
            self.compiler.compile = lambda sources, **settings: list(
                chain.from_iterable(pool.map(lambda source: one([source], **settings), sources))
            )
            super().build_extension(ext)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
