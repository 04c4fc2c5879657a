"""Draws `docs/figures/resnet50-time.png` from what `resnet50_end_to_end.py` wrote to `results/speed/resnet50.json`.

Milliseconds of one image through ResNet-50: the dense engines, and the accelerated network by density.
Run: ``python benchmarks/speed_figure.py``
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
GREY, BLUE = "#9a9a9a", "#0072b2"


def main() -> None:
    found = json.loads((ROOT / "results" / "speed" / "resnet50.json").read_text())
    run = found["runs"][0]
    times = {name: time for name, time in run["times"].items() if not name.startswith("bf16")}
    best = times[run["best"]]["median"]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (name, time) in enumerate(times.items()):
        ours = name.startswith("accelerated")
        spread = [[time["median"] - time["low"]], [time["high"] - time["median"]]]
        axes.barh(place, time["median"], color=BLUE if ours else GREY, xerr=spread, error_kw={"lw": 1, "capsize": 2})
        axes.text(time["high"] + 2, place, f"{best / time['median']:.2f}x", va="center", fontsize=8, backgroundcolor="white")
    axes.axvline(best, color="black", lw=1, ls="--")
    axes.set_yticks(range(len(times)), [name if name.startswith("acc") else f"dense, {name}" for name in times])
    axes.invert_yaxis()
    axes.set_xlim(0, max(time["high"] for time in times.values()) * 1.1)
    axes.set_xlabel(f"milliseconds for one image (median, quartiles)\nfactors and dashed line: against {run['best']}, dense")
    axes.set_title(f"ResNet-50, blocks of {found['pattern']}, {run['threads']} thread, torch {found['torch'].split('+')[0]}")
    axes.spines[["top", "right"]].set_visible(False)
    path = ROOT / "docs" / "figures" / "resnet50-time.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
