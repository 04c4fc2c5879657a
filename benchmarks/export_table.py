"""Claim: a pruned model gives the same outputs in every engine, and is smaller and faster there as well.

Six models, dense and pruned to a fraction of their operations, are exported to every target that can hold them, each file
compared with its model, and all timed interleaved in one process (medians, one example). Weights are random: time, bytes and
agreement do not depend on them. Writes the table between the markers of a document, by default docs/deploy.md, after each
model. Started again on the same machine, it measures the models that are not in the table yet; ``--again`` measures all.
Run: ``OMP_NUM_THREADS=1 python benchmarks/export_table.py``
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import microglia as mg
from microglia.core.batch import Example
from microglia.core.timing import processor_name
from microglia.export import Export, targets
from microglia.measure import measure_latency
from microglia.storage.files import write_atomic
from models import timm, torchvision

BEGIN, END = "<!-- export table: begin -->", "<!-- export table: end -->"
HEAD = (
    "| model | kept operations | written as | bytes, dense | pruned | difference | ms, dense | pruned | faster |\n"
    "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
)
IMAGE = (1, 3, 224, 224)


class UNet(nn.Module):
    """Three scales of double convolutions with batch norm, transposed convolutions, skip connections."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(_double(before, after) for before, after in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(w, w // 2, 2, stride=2) for w in widths[:0:-1])
        self.join = nn.ModuleList(_double(w, w // 2) for w in widths[:0:-1])
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images (batch, 3, height, width) to logits (batch, 2, height, width)."""
        kept = []
        for block in self.down:
            x = block(x if not kept else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        return self.out(x)


def _double(before: int, after: int) -> nn.Sequential:
    layers = [(nn.Conv2d(n, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()) for n in (before, after)]
    return nn.Sequential(*(layer for group in layers for layer in group))


def bert() -> tuple[nn.Module, Any]:
    import transformers

    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    ids = torch.randint(0, 1000, (1, 64))
    config = transformers.BertConfig(**sizes, vocab_size=1000, num_labels=3)
    return transformers.BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def llama() -> tuple[nn.Module, Any]:
    import transformers

    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=1024, vocab_size=1000)
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 1000, (1, 64))}


def images(build: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Any]:
    return build(), torch.randn(shape)


NOT_MLP = {
    "BERT": ["*embeddings*", "*attention*", "*pooler*", "classifier"],
    "Llama": ["*embed_tokens*", "*self_attn*", "lm_head"],
}
"""What stays whole in a language model, so that a configuration of transformers can say the widths."""
HALF, EQUAL = mg.Budget(flops=0.5), mg.Budget(density=0.5)  # of the operations; of every width, equal in all layers
RESNET56 = partial(mg.tasks.build, "resnet56", classes=10, shape=(3, 32, 32))
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], mg.Budget, dict[str, Any]]] = {
    "ResNet-56, 32x32": (partial(images, RESNET56, 1, 3, 32, 32), HALF, {}),
    "MobileNet-v3 small (torchvision)": (partial(images, torchvision.models.mobilenet_v3_small, *IMAGE), HALF, {}),
    "ViT-Ti (timm)": (partial(images, partial(timm.create_model, "vit_tiny_patch16_224"), *IMAGE), HALF, {}),
    "UNet, 128x128": (partial(images, UNet, 1, 3, 128, 128), HALF, {}),
    "BERT, 4 layers of 256": (bert, EQUAL, {"exclude": NOT_MLP["BERT"]}),
    "Llama, 4 layers of 256": (llama, EQUAL, {"exclude": NOT_MLP["Llama"]}),
}  # fmt: skip
"""Name -> (builder of model and example, what to keep, settings of `prune_channels`)."""


def rows(name: str, folder: Path) -> list[str]:
    """Returns the rows of one model."""
    build, keep, settings = MODELS[name]
    torch.manual_seed(0)
    dense, example = build()
    small = mg.prune_channels(dense.eval(), example, keep, **settings)
    sides = {"dense": dense, "pruned": small}
    files = {side: exports(model, example, folder / side) for side, model in sides.items()}
    given = Example.of(example)
    ready: dict[str, dict[str, Callable[[], object]]] = {side: {} for side in sides}
    for side, written in files.items():
        for target, export in written.items():
            ready[side][target] = partial(export.open(), *given.args, **given.kwargs)
    report = measure_latency(sides, example, executions=("eager", "packed"), ready=ready)
    macs = mg.graph.plan_of(small).macs
    first = f"{name} | {macs[1] / macs[0]:.2f}"
    found = []
    for target in files["pruned"]:
        times = [report.timings[side][target].median for side in sides]
        size = [files[side][target].bytes for side in sides]
        worst = max(files[side][target].difference for side in sides)
        cells = [f"{size[0]:,}", f"{size[1]:,}", f"{worst:.0e}", *(f"{ms:.2f}" for ms in times), f"{times[0] / times[1]:.2f}x"]
        found.append(f"| {first} | {files['pruned'][target].engine} | {' | '.join(cells)} |")
        first = " | "
    best = [report.best(side)[1].median for side in sides]
    engines = {target: written.engine.partition(" ")[0] for target, written in files["pruned"].items()}
    names = " / ".join(engines.get(name := report.best(side)[0], f"PyTorch {name}") for side in sides)
    found.append(
        f"| | | best of all, with PyTorch ({names}) | | | | {best[0]:.2f} | {best[1]:.2f} | **{best[0] / best[1]:.2f}x** |"
    )
    return found


def exports(model: nn.Module, example: Any, folder: Path) -> dict[str, Export]:
    """Returns the files of a model, one for each target that can hold it."""
    written: dict[str, Export] = {}
    for target, kind in targets.items():
        try:
            written[target] = mg.export(model, folder / f"model{kind.suffix}", example, to=target)
        except mg.MicrogliaError as error:
            print(f"  {target}: {error}")
    return written


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--again", action="store_true", help="measure models again that are in the table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "deploy.md")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    where = f"{processor_name()}, {threads} thread(s), batch 1, float32, PyTorch {torch.__version__}; random weights."
    before, _, rest = arguments.out.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    found = measured(written) if where in written else {}
    for name in arguments.models:
        if name not in found or arguments.again:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found[name] = rows(name, Path(folder))
            print(*found[name], f"{time.perf_counter() - start:.0f} s\n", sep="\n", flush=True)
        table = "".join(f"{row}\n" for known in MODELS for row in found.get(known, []))
        write_atomic(arguments.out, f"{before}{BEGIN}\n{HEAD}{table}\n{where}\n{END}{after}")


def measured(written: str) -> dict[str, list[str]]:
    """Returns the rows of each model of a table; the first row of a model begins with its name."""
    found: dict[str, list[str]] = {}
    for row in written.splitlines():
        name = row.strip("|").partition("|")[0].strip()
        if name in MODELS:
            found[name] = [row]
        elif found and not name and row.startswith("|"):
            found[next(reversed(found))].append(row)
    return found


if __name__ == "__main__":
    main()
