"""Microglia's runtime on a machine that has torch and nothing else: its rooms, without the package's public names.

``import bare`` before anything of microglia, or ``python benchmarks/bare.py SCRIPT ...`` to run a script that way.
"""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "microglia"

for name, folder in {"microglia": SOURCE, "microglia.measure": SOURCE / "measure"}.items():
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
