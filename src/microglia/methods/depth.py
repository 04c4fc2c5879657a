"""Depth pruning by block influence (ShortGPT, Men et al. 2024): blocks go whose outputs differ least from their inputs.

influence of a block = 1 - mean over tokens of cos(input, output)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.batch import call
from microglia.core.errors import BudgetError, MicrogliaError
from microglia.core.modes import evaluating
from microglia.graph.blocks import Passage, check_finite, find_blocks, passages
from microglia.graph.depth import keep_blocks


@torch.no_grad()
def block_influence(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    blocks: str | None = None,
    run: int = 1,
    forward: Callable[[nn.Module, Any], Any] = call,
) -> Tensor:
    """Returns 1 - mean cos(what enters block i, what leaves block i + run - 1) for each i, float64 (blocks - run + 1,).

    Args:
        model: Any model with a sequence of blocks.
        batches: Inputs, batch by batch; padding by an ``attention_mask`` does not count.
        blocks: Path of the list of blocks; None for the longest one.
        run: Consecutive blocks that are taken as one.
        forward: (model, inputs) -> outputs.

    Raises:
        MicrogliaError: There are no batches, or no sequence of blocks.
    """
    path, held = find_blocks(model, blocks)
    if not 1 <= run <= len(held):
        raise BudgetError(f"A run of blocks is 1 to {len(held)} long; got {run}.")
    total, count = torch.zeros(len(held) - run + 1, dtype=torch.float64), 0
    with evaluating(model):
        for passage in passages(model, held, batches, forward):
            states = [_tokens(passage)]
            for index, block in enumerate(held):
                passage.hidden = passage.run(block, index)
                check_finite(passage.hidden, f"{path}.{index}")
                states.append(_tokens(passage))
            for first, (one, other) in enumerate(zip(states, states[run:], strict=False)):
                total[first] += functional.cosine_similarity(one, other, dim=-1).double().sum().cpu()
            count += len(states[0])
    if not count:
        raise MicrogliaError("Block influence is measured on batches of inputs: give at least one.")
    return 1 - total / count


def drop_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    keep: int,
    blocks: str | None = None,
    consecutive: bool = False,
    forward: Callable[[nn.Module, Any], Any] = call,
) -> nn.Module:
    """Returns a copy of a model without the blocks of least influence; see `microglia.graph.keep_blocks`.

    The first block stays, which makes the residual stream out of embeddings.

    Args:
        model: Any model with a sequence of blocks.
        batches: Inputs, batch by batch.
        keep: Number of blocks that stay.
        blocks: Path of the list of blocks; None for the longest one.
        consecutive: Whether the removed blocks are one run, chosen by what enters and what leaves it.
        forward: (model, inputs) -> outputs.

    Raises:
        BudgetError: ``keep`` is not between 1 and the number of blocks.
    """
    path, held = find_blocks(model, blocks)
    gone = len(held) - keep
    if not 1 <= keep <= len(held):
        raise BudgetError(f"keep is the number of blocks that stay, 1 to {len(held)} here; got {keep}.")
    if not gone:
        return keep_blocks(model, path, range(len(held)))
    found = block_influence(model, batches, blocks=path, run=gone if consecutive else 1, forward=forward)[1:]
    if consecutive:
        first = int(found.argmin()) + 1
        removed = set(range(first, first + gone))
    else:
        removed = {int(i) + 1 for i in found.argsort(stable=True)[:gone]}
    return keep_blocks(model, path, [i for i in range(len(held)) if i not in removed])


def _tokens(passage: Passage) -> Tensor:
    """Returns the hidden states that are no padding, (tokens, width)."""
    hidden: Tensor = passage.hidden
    if passage.counted is not None and hidden.shape[:2] == passage.counted.shape:
        return hidden[passage.counted]
    return hidden.flatten(0, -2)
