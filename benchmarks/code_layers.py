"""Claim: at a batch of one, a large linear layer in codes of 4 bits is faster than the packed dense one.

The layers are those of AlexNet, with random weights of 16 or 256 values; both ways are timed interleaved in one process.
`accelerate` makes the same comparison for each layer of a model, and keeps codes only where they win.

    python benchmarks/code_layers.py [ROUNDS]
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from microglia.core.timing import time_interleaved
from microglia.runtime.dense.fusion import Site
from microglia.runtime.dense.packing import Packed
from microglia.runtime.operators import level
from microglia.runtime.sparse_layers.codes import CodeLinear, code_bits

SHAPES = ((1000, 4096), (4096, 4096), (4096, 9216))


def layer(outputs: int, inputs: int, values: int) -> Site:
    table = torch.randn(values)
    weight = table[torch.randint(values, (outputs, inputs))]
    return Site("fc", "linear", weight, torch.randn(outputs), (1, inputs), (1, outputs))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ratio = 0.0
    print(f"level {level()}, 1 thread\n{'outputs x inputs':>18}  bits  dense, ms  codes, ms  faster")
    for outputs, inputs in SHAPES:
        for values in (16, 256):
            site = layer(outputs, inputs, values)
            bits = code_bits(site)
            if bits is None:
                raise SystemExit("There are no compiled kernels with a layer of codes.")
            x, ways = torch.randn(1, inputs), {"dense": Packed(site), "codes": CodeLinear(site, bits)}
            torch.testing.assert_close(ways["codes"](x), ways["dense"](x), rtol=1e-3, atol=1e-3)
            found = time_interleaved({name: partial(way, x) for name, way in ways.items()}, rounds=rounds)
            times = {name: time.median for name, time in found.items()}
            quotient = times["dense"] / times["codes"]
            ratio = quotient if (bits, inputs) == (4, 9216) else ratio
            print(f"{outputs:>8} x {inputs:<7}{bits:6}{times['dense']:11.3f}{times['codes']:11.3f}{quotient:8.2f}")
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
