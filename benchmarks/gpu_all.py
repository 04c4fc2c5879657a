"""Everything that waits for a GPU, in one command of at most six minutes: results/speed/gpu.json.

In this order: the kernels' results on random problems, their times beside cuDNN, cuBLAS and cuSPARSELt, SMART's share of a
training step, a short run of FTWT. Each part is a process with a limit of its own; the file is written after each, so that a
machine that is taken away leaves what was measured. A part that fails or runs into its limit is recorded with its last lines,
and the next begins.

Run: ``python benchmarks/gpu_all.py``. Last line: the ratio of the blocks (gpu_blocks.py). Without a CUDA GPU: exit status 2.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 360.0
"""Seconds of all parts together."""
LINES = 40
"""Last lines of a part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """One measurement: its command after ``python``, its limit in seconds, and the JSON file that it writes, if it does."""

    name: str
    command: tuple[str, ...]
    seconds: float
    writes: Path | None = None


def parts(folder: Path) -> list[Part]:
    """Returns the parts in the order of their worth; files go to a folder."""
    blocks, run = folder / "blocks.json", folder / "ftwt"
    script = str(HERE / "bare.py")
    recipe = str(ROOT / "recipes" / "ftwt" / "cifar10_resnet20_scaled.yaml")
    return [
        Part("kernels", (script, str(ROOT / "tests" / "unit" / "triton_matrix.py"), "45", "0", "cuda"), 70),
        Part("blocks", (str(HERE / "gpu_blocks.py"), "--seconds", "120", "--json", str(blocks)), 180, blocks),
        Part("smart", (str(HERE / "smart_overhead.py"), "--device", "cuda", "--models", "resnet50", "--rounds", "10"), 60),
        Part(
            "ftwt", ("-m", "microglia", "prune", "--recipe", recipe, "device=cuda", "--out", str(run)), 90, run / "result.json"
        ),
    ]


def measured(part: Part, left: float) -> dict[str, Any]:
    """Returns what one part printed and wrote, its exit status (None past its limit) and its seconds."""
    begin, limit = time.monotonic(), min(part.seconds, left)
    try:
        done = subprocess.run(
            [sys.executable, *part.command],
            cwd=ROOT,
            check=False,
            timeout=limit,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        status, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        status, text = None, late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
    found: dict[str, Any] = {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "tail": text.splitlines()[-LINES:],
    }
    if ratio := re.findall(r"^ratio: ([\d.]+)$", text, flags=re.MULTILINE):
        found["ratio"] = float(ratio[-1])
    if part.writes is not None and part.writes.exists():
        found["result"] = json.loads(part.writes.read_text(encoding="utf-8"))
    return found


def run(wanted: list[Part], out: Path, limit: float) -> dict[str, Any]:
    """Runs parts until the limit, and returns what they gave; ``out`` holds it after each."""
    begin, found = time.monotonic(), dict[str, Any]()
    for part in wanted:
        left = limit - (time.monotonic() - begin)
        if left < 10:
            found[part.name] = {"status": None, "seconds": 0.0, "tail": ["not begun: the limit of all parts was reached"]}
        else:
            print(f"{part.name}: at most {min(part.seconds, left):.0f} s", flush=True)
            found[part.name] = measured(part, left)
            print(*(f"  {line}" for line in found[part.name]["tail"][-6:]), sep="\n", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"torch": torch.__version__, "parts": found}, indent=1) + "\n", encoding="utf-8")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "speed" / "gpu.json")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of all parts together")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_all measures on a GPU, and this machine has no CUDA GPU that torch can use.")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = run(parts(Path(folder)), given.out, given.seconds)
    print(f"ratio: {found['blocks'].get('ratio', float('nan')):.3f}")
    return 0 if all(part["status"] == 0 for part in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
