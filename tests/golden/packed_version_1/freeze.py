"""Writes the packed file of version 1, once: a shared, a sparse, a raw and a tied tensor, masks and flags."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import microglia as mg
from microglia.storage.files import digest


class Frozen(nn.Module):
    """A model of every form; a caller's own, so that it is loaded into a fresh one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(30, 40), nn.Linear(40, 30)
        self.embed, self.head = nn.Embedding(9, 30), nn.Linear(30, 9, bias=False)
        self.head.weight = self.embed.weight
        self.short = nn.Parameter(torch.zeros(20, 20, dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("flags", torch.zeros(13, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()))


if __name__ == "__main__":
    torch.manual_seed(0)
    model, target = Frozen().eval(), Path(sys.argv[1])
    model.short.data = torch.randint(-3, 4, (20, 20)).to(torch.bfloat16) / 8
    model.flags[::3] = True
    mg.mask(model, {"first.weight": torch.rand(40, 30) < 0.1, "second.weight": torch.rand(30, 40) < 0.5})
    model.second.parametrizations.weight.original.data[0, :3] = 0.0  # kept zeros
    levels = torch.linspace(-0.2, 0.2, 11)
    raw = model.first.parametrizations.weight.original
    raw.data = levels[torch.bucketize(raw.data, levels).clamp(max=10)]
    print(mg.pack(model, target / "model.mgpack"))
    x = torch.randn(3, 30)
    state = dict(model.state_dict())
    for name, weight in model.state_dict().items():
        if name.endswith("original"):
            state[name] = torch.where(state[name.replace("original", "0.mask")], weight, 0.0)
    save_file({"x": x, "y": model(x).detach()}, target / "outputs.safetensors", metadata={"digest": digest(state)})
