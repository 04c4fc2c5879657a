"""Claim: at one token at a time, activations of which half count as zero make linear layers and a whole decoder faster.

Linear layers of the sizes of a Llama with 7 billion parameters, then a whole Llama decoder with random weights, which
generates token by token with its cache. Dense is the faster of PyTorch's own layers and of layers packed for oneDNN. Ours
has the thresholds of `microglia.sparse_activations`, its layers chosen by `microglia.dynamic.tune_activations`. All ways
are timed interleaved in one process. Weights and calibration tokens are random, so this says nothing about quality: see
``benchmarks/tiny_llama.py``.

    python benchmarks/sparse_activations.py [--small] [--rounds N] [--threads N]

Last line: ``ratio: <dense / ours at 50 %, geometric mean over the layers and the decoder>``.
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial
from typing import Any

import torch
from torch import nn

import microglia as mg
from microglia.core.timing import processor_name, time_interleaved
from microglia.dynamic import ThresholdedLinear, thresholded_layers, tune_activations
from microglia.runtime.dense.fusion import Site
from microglia.runtime.dense.packing import Packed
from microglia.runtime.operators import level
from microglia.zoo.external import declare_operators

SPARSITIES = (0.0, 0.25, 0.5, 0.7)
SHAPES = {False: ((4096, 4096), (4096, 11008)), True: ((512, 512), (512, 1376))}
"""(outputs, inputs), small or not."""
DECODER = {False: (1024, 2816, 8), True: (256, 704, 2)}
"""Width, width of the MLPs, blocks."""
TOKENS = {False: 8, True: 4}
VOCABULARY = 1024


def packed(layer: nn.Linear) -> Packed:
    shape = (1, layer.in_features), (1, layer.out_features)
    return Packed(Site("layer", "linear", layer.weight.detach(), layer.bias, *shape))


class Flat(nn.Module):
    """A packed layer for one token, (1, 1, inputs)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = packed(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output."""
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def line(name: str, times: dict[str, float], dropped: dict[str, float]) -> float:
    """Prints the milliseconds of one layer or model, and returns dense / ours at 50 %."""
    dense = min(time for way, time in times.items() if way.startswith("dense"))
    ours = "".join(f"{times[f'{s:.0%}']:9.3f} ({dense / times[f'{s:.0%}']:4.2f})" for s in SPARSITIES)
    print(f"{name:<16}{times['dense']:9.3f}{times['dense, packed']:9.3f}{ours}   {dropped['50%']:.2f}", flush=True)
    return dense / times["50%"]


@torch.no_grad()
def layer(outputs: int, inputs: int, rounds: int) -> float:
    dense, x = nn.Linear(inputs, outputs, bias=False), torch.randn(1, inputs)
    ways: dict[str, Any] = {"dense": dense, "dense, packed": packed(dense)}
    dropped = {}
    for sparsity in SPARSITIES:
        ours = mg.sparse_activations(nn.Sequential(copy.deepcopy(dense)), [torch.randn(64, inputs)], sparsity=sparsity)[0]
        tune_activations(ours)
        expected = nn.functional.linear(x.masked_fill(x.abs() <= ours.threshold, 0), dense.weight)
        torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-3)
        ways[f"{sparsity:.0%}"], dropped[f"{sparsity:.0%}"] = ours, float((x.abs() <= ours.threshold).float().mean())
    found = time_interleaved({name: partial(way, x) for name, way in ways.items()}, rounds=rounds)
    return line(f"{outputs} x {inputs}", {name: time.median for name, time in found.items()}, dropped)


def decoder(small: bool) -> Any:
    import transformers

    width, middle, blocks = DECODER[small]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=middle, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def zeros(model: nn.Module, run: Any) -> float:
    """Returns the fraction of activations that thresholded layers take for zero in a run, weighted by what they multiply."""
    counts = [0.0, 0.0]

    def note(layer: ThresholdedLinear, args: tuple[torch.Tensor]) -> None:
        counts[0] += float((args[0].abs() <= layer.threshold).sum()) * layer.out_features
        counts[1] += args[0].numel() * layer.out_features

    handles = [layer.register_forward_pre_hook(note) for layer in thresholded_layers(model).values()]
    run()
    for handle in handles:
        handle.remove()
    return counts[0] / counts[1]


@torch.no_grad()
def tokens(small: bool, rounds: int) -> float:
    """Returns dense / ours at 50 % for a decoder that generates, in milliseconds for each token."""
    dense, count = decoder(small), TOKENS[small]
    batches = [{"input_ids": torch.randint(VOCABULARY, (4, 32))}]
    models: dict[str, Any] = {"dense": dense}
    for sparsity in SPARSITIES:
        ours = mg.sparse_activations(copy.deepcopy(dense), batches, sparsity=sparsity, exclude=["lm_head"])
        tune_activations(ours)
        models[f"{sparsity:.0%}"] = ours
    models["dense, packed"] = copy.deepcopy(dense)
    for path, module in list(models["dense, packed"].named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            models["dense, packed"].set_submodule(path, Flat(module))
    prompt = torch.randint(VOCABULARY, (1, 1))  # of one token: every step is one of generation
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    calls = {name: partial(model.generate, prompt, **settings) for name, model in models.items()}
    assert torch.equal(calls["0%"](), calls["dense"]())
    found = time_interleaved(calls, rounds=rounds)
    dropped = {name: zeros(models[name], calls[name]) for name in ("50%",)}
    return line("decoder, token", {name: time.median / count for name, time in found.items()}, dropped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small layers and a tiny decoder, to see that it works")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    declare_operators()
    print(
        f"{processor_name()}, level {level()}, {given.threads} threads, torch {torch.__version__}; milliseconds (times as fast)"
    )
    columns = "".join(f"{f'{sparsity:.0%} zero':>16}" for sparsity in SPARSITIES)
    print(f"{'':<16}{'dense':>9}{'packed':>9}{columns}   measured at 50%")
    found = [layer(*shape, given.rounds) for shape in SHAPES[given.small]]
    found.append(tokens(given.small, given.rounds))
    print(f"ratio: {math.prod(found) ** (1 / len(found)):.2f}")


if __name__ == "__main__":
    main()
