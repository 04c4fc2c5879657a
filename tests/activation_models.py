"""Small models whose activations are left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from microglia.zoo.external import declare_operators

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.SiLU(), nn.Linear(40, 24), nn.SiLU(), nn.Linear(24, 5)).eval()


class Residual(nn.Module):
    """A block whose first branch is a thousand times as loud as its second one."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.quiet.weight.mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.loud(x) + self.quiet(x)


class Stack(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks, self.head = nn.ModuleList(Residual() for _ in range(blocks)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Alone(nn.Module):
    """Two layers, one of which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def llama() -> Any:
    """Returns a tiny decoder of transformers with two blocks of seven linear layers."""
    declare_operators()
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = [{"input_ids": torch.randint(40, (3, 16), generator=GENERATOR)} for _ in range(2)]
