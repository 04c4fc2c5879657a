"""Masks put on a model that DistributedDataParallel wraps already: two processes train as with masks that came first."""

import pytest
import torch
from test_ranks import batches, every_rank, network
from torch import nn

import microglia as mg
from microglia.core.errors import MicrogliaError

SIZE = 8


def trained(rank):
    """By which came first: the masks, and the weights after every step on this rank's half of the images."""
    found = {}
    for first in ("masks", "wrapper", "wrapper, by its module"):
        model = network()
        pruner = mg.methods.Gradual(model, density=0.3, total_steps=4, updates=2) if first == "masks" else None
        wrapped = nn.parallel.DistributedDataParallel(model)
        if pruner is None:
            given = wrapped if first == "wrapper" else wrapped.module
            pruner = mg.methods.Gradual(given, density=0.3, total_steps=4, updates=2)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
        model.eval()  # batch norm would see other batches
        for x, y in batches(*[SIZE] * 4):
            part = slice(rank * SIZE // 2, (rank + 1) * SIZE // 2)
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(x[part]), y[part]).backward()
            optimizer.step()
            pruner.step(optimizer)
        masks = {n.removeprefix("module."): m.flatten().nonzero().flatten().tolist() for n, m in pruner.masks.items()}
        mg.fold(model)
        found[first] = masks, {name: value.tolist() for name, value in model.state_dict().items()}
    return found


def test_two_ranks_agree_whichever_came_first():
    first, second = every_rank(trained)
    assert first == second
    assert first["masks"] == first["wrapper"] == first["wrapper, by its module"]
    assert sum(map(len, first["masks"][0].values())) == pytest.approx(0.3 * (4 * 9 + 1440), abs=1)


def refused(rank):
    wrapped = nn.parallel.DistributedDataParallel(network())
    try:
        mg.methods.Smart(wrapped.module, pattern="unstructured", density=0.5, total_steps=4)
    except MicrogliaError as error:
        return str(error)
    return ""


def test_a_search_on_the_inner_module_is_refused_on_every_rank():
    assert all("attach it to the model first, then wrap" in text for text in every_rank(refused))
