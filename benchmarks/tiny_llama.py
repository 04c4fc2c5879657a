"""A tiny Llama-style model trained here on the standard library's own texts: one-shot pruning, recovery, structure, time.

`LlamaForCausalLM` with 586,624 parameters (128 wide, 352 in its MLPs, 3 blocks, 4 heads, pairs of which share keys and values,
tied embeddings) learns the first 90 % of the bytes of `pydoc_data.topics`. Perplexity per byte is that of the rest, on the
first 60 windows and on all. The training is durable in ``--out``: started again it goes on. Then 50 % and 2:4 by magnitude,
Wanda and SparseGPT (64 windows calibrate, mask block 32), each recovered for ``--recovery`` steps with its masks fixed. Then
0.75 of the parameters by width, heads and depth, with milliseconds for each generated token.

Run: ``python benchmarks/tiny_llama.py --out runs/tiny_llama --write docs/language.md`` (about 12 minutes on two cores; a trial:
``--steps 8 --recovery 2``). Last line: ``ratio: <loss added by magnitude / by SparseGPT, at 50 %>``.

``--activations`` leaves the weights and gives the layers in the blocks thresholds instead, uniform and greedy. Last line then:
``ratio: <loss added by uniform / by greedy thresholds, at 50 %>``.
"""

from __future__ import annotations

import argparse
import copy
import math
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import microglia as mg
from language_document import PATTERNS, RULES, pruned, section, smaller, times
from microglia.core.restore import restore
from microglia.methods.procedure import train
from microglia.storage.run import Run
from microglia.tasks.language import language_task, logits_of, next_token_losses
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig
from microglia.zoo.external import declare_operators

LENGTH, BATCH, WINDOWS, FIRST = 128, 24, 64, 60
EPOCH = 125
"""Steps after which the training is stored."""
SPARSITIES = (0.25, 0.4, 0.5, 0.65)
"""Fractions of activations that count as zero."""


def made(out: Path) -> Path:
    """Returns a folder with the untrained model."""
    declare_operators()
    import transformers

    folder = out / "untrained"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def perplexities(model: nn.Module, task: Task, windows: int | None) -> tuple[float, float]:
    """Returns the perplexity on the first 60 windows of the test text, and on all of them."""
    model.eval()
    losses = []
    for inputs, labels in task.data.batches("test", 20).epoch(0):
        losses += next_token_losses(logits_of(model, inputs), labels).view(len(labels), -1).mean(1).tolist()
        if windows is not None and len(losses) >= windows:
            break
    first = losses[:FIRST]
    return math.exp(sum(first) / len(first)), math.exp(sum(losses) / len(losses))


def activations(dense: nn.Module, batches: list[Any], task: Task, given: argparse.Namespace) -> None:
    """Prints the perplexities with thresholds of 16 windows, and the ratio."""
    whole = perplexities(dense, task, given.windows)
    lines = [
        f"The model of the section above, one seed; 16 windows calibrate. Perplexity per byte, first {FIRST} windows / all; "
        f"dense {whole[0]:.3f} / {whole[1]:.3f}. Nothing is trained after the thresholds.",
        "",
        "| activations that count as zero | uniform | greedy |",
        "| ---: | --- | --- |",
    ]
    added: dict[tuple[float, str], float] = {}
    for sparsity in SPARSITIES:
        shown = []
        for rule in ("uniform", "greedy"):
            model = mg.sparse_activations(
                copy.deepcopy(dense), batches[:2], sparsity=sparsity, rule=rule, layers=["model.layers.*"]
            )
            first, every = perplexities(model, task, given.windows)
            added[sparsity, rule] = math.log(first / whole[0])
            shown.append(f"{first:.3f} / {every:.3f}")
        lines.append(f"| {100 * sparsity:.0f} % | {shown[0]} | {shown[1]} |")
        print(lines[-1], flush=True)
    section(given.write, "tiny_llama_activations", lines)
    print(f"ratio: {added[0.5, 'uniform'] / max(added[0.5, 'greedy'], 1e-9):.2f}")


def asked() -> argparse.Namespace:
    """Returns what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_llama"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--recovery", type=int, default=200)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--activations", action="store_true", help="only the table of thresholds")
    return parser.parse_args()


def main() -> None:
    """Prints the tables and the ratio."""
    given = asked()
    given.out.mkdir(parents=True, exist_ok=True)
    text = given.out / "topics.txt"
    text.write_text("\n\n".join(pydoc_data.topics.topics.values()))
    task = language_task(f"hf:{made(given.out)}", text=str(text), tokenizer="bytes", length=LENGTH)
    run = Run(given.out / "run", {"steps": given.steps, "recovery": given.recovery})
    common: dict[str, Any] = {"batch_size": BATCH, "optimizer": "adamw", "weight_decay": 0.1, "clip": 1.0}
    common["evaluate_every"] = 1000
    epochs = max(1, given.steps // EPOCH)
    config = FitConfig(epochs=epochs, max_batches=min(EPOCH, given.steps // epochs), lr=3e-3, warmup_epochs=0.2, **common)
    dense = task.build()
    train(task, run, "dense", dense, config)

    def build() -> nn.Module:
        return restore(task.build(), dense.state_dict())

    calibration = task.data.batches("train", 8, seed=0, shuffle=True).epoch(0)
    batches = [inputs for inputs, _ in (next(calibration) for _ in range(WINDOWS // 8))]
    if given.activations:
        activations(dense, batches, task, given)
        return
    whole = perplexities(dense, task, given.windows)
    lines = [
        f"{sum(p.numel() for p in dense.parameters()):,} parameters, {given.steps} steps, one seed. Perplexity per byte, first "
        f"{FIRST} windows / all; dense {whole[0]:.3f} / {whole[1]:.3f}.",
        "",
        f"| pattern | rule | no training | after {given.recovery} steps |",
        "| --- | --- | --- | --- |",
    ]
    found: dict[tuple[str, str], float] = {}
    recovery = FitConfig(epochs=1, max_batches=given.recovery, lr=3e-4, **common)
    for pattern, settings in PATTERNS.items():
        for rule in RULES:
            model = pruned(build, batches, rule, mask_block=32, **settings)
            before = perplexities(model, task, given.windows)
            found[pattern, rule] = before[0]
            train(task, run, f"{pattern.replace(' %', '').replace(':', '-')}-{rule}", model, recovery)
            after = perplexities(model, task, given.windows)
            shown = " | ".join(f"{one:.3f} / {every:.3f}" for one, every in (before, after))
            lines.append(f"| {pattern} | {rule} | {shown} |")
            print(lines[-1], flush=True)
    models = {"dense": dense, **smaller(build, batches, 0.75, ["*embed_tokens*", "lm_head"])}
    prompt = batches[0]["input_ids"][:1, :16]

    def generated(model: Any) -> Any:
        return lambda: model.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False)

    measured = times({name: generated(model) for name, model in models.items()}, given.rounds)
    lines += [
        "",
        f"| removed | parameters | no training | after {given.recovery} steps | ms a token, with cache |",
        "| --- | --- | --- | --- | --- |",
    ]
    total = sum(p.numel() for p in dense.parameters())
    for name, model in models.items():
        share, before = sum(p.numel() for p in model.parameters()) / total, perplexities(model, task, given.windows)
        if name != "dense":
            train(task, run, "cut-" + "".join(c if c.isalnum() else "-" for c in name), model, recovery)
        after = perplexities(model, task, given.windows)
        shown = " | ".join(f"{one:.3f} / {every:.3f}" for one, every in (before, after))
        lines.append(f"| {name} | {share:.3f} | {shown} | {measured[name] / 32:.2f} |")
    section(given.write, "tiny_llama", lines)
    added = {rule: math.log(found["50 %", rule] / whole[0]) for rule in RULES}
    print(f"ratio: {added['magnitude'] / max(added['sparsegpt'], 1e-9):.2f}")


if __name__ == "__main__":
    main()
