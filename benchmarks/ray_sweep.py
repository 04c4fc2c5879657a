"""A sweep of 24 cells on a Ray cluster of two local nodes, one cell killed on its way, beside one process at a time.

    python benchmarks/ray_sweep.py                      # needs pip install '.[cluster]'; minutes
    python benchmarks/ray_sweep.py --write docs/cluster.md

Every cell is a process with one thread, in both places. The first cell of the second node that has trained an epoch is killed
with its worker; Ray gives it to a node again, and it goes on after that epoch. The weights of all cells are compared by their
bytes. Starting the cluster does not count. The last line is the time of one process over that of Ray.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from microglia.cluster import launcher_of
from microglia.lab.sweep import Sweep, SweepOutcome, run_sweep

SHORT = {"epochs": 4, "max_batches": 6, "batch_size": 32}
SWEEP = Sweep(
    name="tiny",
    grid={"method": ["magnitude", "random", "gradient"], "prune.density": [0.5, 0.3, 0.2, 0.1], "seed": [0, 1]},
    base={
        "model": "lenet-300-100", "prune": {"density": 0.5}, "dense": SHORT, "train": SHORT, "measure": {"latency": False},
        "threads": 1,
    },
)  # fmt: skip
MARK = re.compile(r"(<!-- ray sweep -->\n).*?(<!-- end of ray sweep -->)", re.DOTALL)


def cluster() -> Any:
    """Returns a head without cores, and two nodes of one core."""
    from ray.cluster_utils import Cluster

    os.environ.update(RAY_DISABLE_IMPORT_WARNING="1", RAY_USAGE_STATS_ENABLED="0")
    made = Cluster()
    for cores in (0, 1, 1):
        _add_node(made, num_cpus=cores, include_dashboard=False)
    made.wait_for_nodes()
    return made


def _add_node(made: Any, tries: int = 3, **settings: Any) -> None:
    """Adds a node; on a busy machine Ray does not start one within its 30 seconds, and it is tried again."""
    for left in reversed(range(tries)):
        try:
            made.add_node(**settings)
        except Exception:
            if not left:
                raise
        else:
            return


def kill_one(out: Path, over: threading.Event) -> str:
    """Kills the first running cell that has kept an epoch, with its worker; returns its name."""
    import psutil

    while not over.wait(0.01):
        for partial in out.glob("*/stages/train.partial.safetensors"):
            place = str(partial.parents[1])
            cells = [process for process in psutil.process_iter(["cmdline"]) if place in (process.info["cmdline"] or [])]
            if cells:
                parents = [parent for cell in cells if (parent := cell.parent()) is not None]
                for process in (*parents, *cells):
                    process.kill()
                return partial.parents[1].name
    return ""


def weights(out: Path) -> dict[str, bytes]:
    """Returns the weights of each cell, as bytes."""
    return {path.parents[1].name: path.read_bytes() for path in out.glob("*/model/model.safetensors")}


def on_ray(out: Path, cells: int) -> tuple[SweepOutcome, float, str]:
    """Returns the outcome on the cluster, its seconds, and the cell that was killed."""
    made, over, killed = cluster(), threading.Event(), [""]
    try:
        launcher = launcher_of("ray", [f"address={made.address}"])
        thread = threading.Thread(target=lambda: killed.__setitem__(0, kill_one(out, over)))
        thread.start()
        began = time.perf_counter()
        outcome = run_sweep(sweep_of(cells), out, launcher=launcher)
        seconds = time.perf_counter() - began
        over.set()
        thread.join()
        if launcher is not None:
            launcher.close()
    finally:
        over.set()
        made.shutdown()
    return outcome, seconds, killed[0]


def sweep_of(cells: int) -> Sweep:
    """Returns the sweep, or its part with fewer densities."""
    return replace(SWEEP, grid={**SWEEP.grid, "prune.density": SWEEP.grid["prune.density"][: max(1, cells // 6)]})


def main() -> None:
    """Runs both, prints the table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=24, help="6, 12, 18 or 24")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        there, here = Path(folder) / "ray", Path(folder) / "one"
        outcome, ray_seconds, killed = on_ray(there, asked.cells)
        began = time.perf_counter()
        alone = run_sweep(sweep_of(asked.cells), here, jobs=1)
        seconds = time.perf_counter() - began
        equal = weights(there) == weights(here)
        log = (there / killed / "log.txt").read_text() if killed else ""
        resumed = re.findall(r"train: resumed after epoch \d+", log)
    if outcome.failed or alone.failed or not equal or not resumed:
        raise SystemExit(f"{outcome.sentence}\n{alone.sentence}\nequal {equal}, killed {killed!r}, resumed {resumed}")
    lines = [
        "| where | cells | seconds | |",
        "| --- | ---: | ---: | --- |",
        f"| one process at a time | {len(alone.done)} | {seconds:.0f} | |",
        f"| Ray, two nodes of one core | {len(outcome.done)} | {ray_seconds:.0f} | `{killed}` killed; {resumed[0]} |",
        "",
        f"The weights of all {len(alone.done)} cells are equal, byte for byte. {os.cpu_count()} cores in the machine.",
    ]
    print("\n".join(lines))
    if asked.write is not None:
        table = "\n".join(lines) + "\n"
        asked.write.write_text(MARK.sub(lambda found: found[1] + table + found[2], asked.write.read_text()))
    print(f"ratio: {seconds / ray_seconds:.2f}")


if __name__ == "__main__":
    main()
