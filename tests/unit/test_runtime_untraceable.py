"""A model that cannot be traced for `accelerate` is refused in one short sentence with its remedy."""

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import MicrogliaError


class Cache:
    """An object that holds tensors and that no graph can return."""


class WithCache(nn.Module):
    """A layer whose output comes with a cache, as a language model's does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return {"logits": self.layer(x), "cache": Cache()}


def test_an_object_among_the_outputs_is_named_with_the_remedy():
    with pytest.raises(MicrogliaError, match=r"its output holds a Cache, and a graph returns tensors alone") as refused:
        mg.accelerate(WithCache(), torch.randn(2, 16))
    assert "use_cache = False" in str(refused.value)
    assert "pytree" not in str(refused.value)
    assert refused.value.__cause__ is not None
