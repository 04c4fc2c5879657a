"""Builds the wheel with the kernels, and the one of a machine without a compiler: seconds, bytes, and what auditwheel says.

    python benchmarks/wheel.py [--out DIRECTORY]

Each is built in an isolated environment without torch. `--fresh` then installs the first into a new virtual environment (torch
pinned by constraints.txt), asks `microglia doctor`, and fails where the kernels do not run. The last line compares the kernels
with those of version 0.1.0, which were not stripped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
UNSTRIPPED = 22_569_872
"""Bytes of the kernels of version 0.1.0, built by g++ 12."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="where the wheels are put; a temporary folder by default")
    parser.add_argument("--fresh", action="store_true", help="install the wheel into a new virtual environment")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = asked.out or Path(folder) / "wheels"
        wheel = build(out, "with a compiler")
        build(out, "without a compiler", CC="/bin/false", CXX="/bin/false")
        audited(wheel)
        if asked.fresh:
            installed(wheel, Path(folder) / "venv")
    with zipfile.ZipFile(wheel) as inside:
        (size,) = (entry.file_size for entry in inside.infolist() if entry.filename.endswith(".so"))
    print(f"kernels: {size:,} bytes; of version 0.1.0: {UNSTRIPPED:,}")
    print(f"ratio: {UNSTRIPPED / size:.2f}")


def build(out: Path, what: str, **environment: str) -> Path:
    """Builds a wheel from a clean copy of the sources, so that nothing built before is used; returns it."""
    before = set(out.glob("*.whl"))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "microglia"
        words = ["git", "ls-files", "-co", "--exclude-standard"]
        files = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in files.stdout.splitlines():
            if name.startswith("src/") or "/" not in name:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes((ROOT / name).read_bytes())
        began = time.perf_counter()
        words = [sys.executable, "-m", "pip", "wheel", str(copy), "--quiet", "--no-deps", "--no-cache-dir"]
        words += ["--wheel-dir", str(out)]
        subprocess.run(words, check=True, env={**os.environ, **environment})
        seconds = time.perf_counter() - began
    (wheel,) = set(out.glob("*.whl")) - before
    with zipfile.ZipFile(wheel) as inside:
        unpacked = sum(entry.file_size for entry in inside.infolist())
    print(f"{what}: {wheel.name}, {wheel.stat().st_size:,} bytes ({unpacked:,} unpacked), {seconds:.0f} s", flush=True)
    return wheel


def audited(wheel: Path) -> None:
    """Prints what auditwheel says; libtorch_cpu.so, which it does not know, is torch's own and comes with torch."""
    print(run(sys.executable, "-m", "auditwheel", "show", str(wheel)))


def installed(wheel: Path, place: Path) -> None:
    """Installs the wheel with its core alone and asks `microglia doctor`."""
    venv.create(place, with_pip=True)
    python, began = str(place / "bin" / "python"), time.perf_counter()
    run(python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel))
    print(f"installed with the core alone: {time.perf_counter() - began:.0f} s")
    found = json.loads(run(python, "-m", "microglia", "doctor", "--json"))
    print(f"microglia doctor: kernels {found['kernels']}, torch {found['core']['torch']}")
    if found["kernels"] == "torch":
        raise SystemExit(f"The kernels do not run: {found['missing']}")


def run(*words: str) -> str:
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=tempfile.gettempdir()).stdout


if __name__ == "__main__":
    main()
