"""Two processes that each see half of every batch move their masks alike, and as one process that sees all of it."""

import torch
from test_ranks import WORLD, batches, every_rank, network
from torch import nn

import microglia as mg
from microglia.methods import SparseTraining

SIZE = 8


def masks_on_the_way(rank, world=WORLD):
    """The kept positions after every update of three, and the last weights, by way of growing."""
    found = {}
    for grow in ("gradient", "random"):
        model = network()
        evidence = mg.scores.Evidence(generator=torch.Generator().manual_seed(3))
        pruner = SparseTraining(model, density=0.3, total_steps=7, every=2, until=1.0, grow=grow, evidence=evidence)
        wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model.eval()  # batch norm would see other batches
        steps = []
        for x, y in batches(*[SIZE] * 7):
            part = slice(rank * SIZE // world, (rank + 1) * SIZE // world)
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(x[part]), y[part]).backward()
            if replaced := pruner.replaces_step():
                assert all(p.grad is not None for p in model.parameters())
            else:
                optimizer.step()
            pruner.step(optimizer)
            if replaced:
                steps.append({name: mask.flatten().nonzero().flatten().tolist() for name, mask in pruner.masks.items()})
        found[grow] = steps, {name: value.tolist() for name, value in model.state_dict().items()}
    return found


def test_ranks_move_their_masks_as_one_process_would():
    first, second = every_rank(masks_on_the_way)
    assert first == second
    alone = masks_on_the_way(0, world=1)
    for grow, (steps, state) in alone.items():
        assert first[grow][0] == steps
        assert len(steps) == 3
        assert steps[0] != steps[1] != steps[2]
        for name, value in state.items():
            torch.testing.assert_close(torch.tensor(first[grow][1][name]), torch.tensor(value), rtol=1e-4, atol=1e-6)
