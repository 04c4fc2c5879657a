"""Code for scripts of tests: `torch.compile` fails as it does on a machine without a compiler, which costs no time."""

NO_COMPILER = """
import torch
def _no_compiler(*_, **__):
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")
torch.compile = _no_compiler
"""
