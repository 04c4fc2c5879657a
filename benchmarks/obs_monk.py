"""Optimal Brain Surgeon on XOR and on the MONK's problems, generated from their rules.

Published (Hassibi, Stork 1992): the weights of networks trained with weight decay fall from 58 to 14 (MONK-1), 39 to 15
(MONK-2) and 39 to 4 (MONK-3), at 100, 100 and 97.2 % of the test cases; on XOR the right weights go. The archive's training
cases cannot be drawn again: here 124, 169 and 122 of the 432 cases are drawn with a seed, for MONK-3 with 5 % wrong labels, as
the archive describes. All biases count as weights, as published. A network is trained with weight decay and L-BFGS, then one
weight at a time is removed; where a training case turns wrong the network is trained again without decay; the smallest network
that still has every training case right that the dense one had (of MONK-3: as many) is printed. The test cases are all 432.

Run: ``python benchmarks/obs_monk.py [--seeds 5]`` (about a minute). Its last line is ``ratio: <least published / ours>``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.scores import Evidence

LEVELS = (3, 3, 2, 3, 4, 2)
"""Values of the six attributes of a robot; as inputs they are 17 zeros and ones."""


@dataclass(frozen=True)
class Problem:
    """A problem and what was published for it.

    Attributes:
        rule: Attributes, from 1 -> class.
        cases: Training cases that are drawn; 0 for all.
        noise: Fraction of them whose label is wrong.
        hidden: Hidden units.
        before: Weights, biases included.
        after: Published weights that stay; None where no figure was published.
        decays: Weight decay of one training after another. Wrong labels need more: at 1e-4 the network learns them by heart.
    """

    rule: Callable[[tuple[int, ...]], bool]
    cases: int
    noise: float
    hidden: int
    before: int
    after: int | None
    decays: tuple[float, ...] = (1e-4, 1e-5)


PROBLEMS = {
    "MONK-1": Problem(lambda a: a[0] == a[1] or a[4] == 1, 124, 0.0, 3, 58, 14),
    "MONK-2": Problem(lambda a: sum(v == 1 for v in a) == 2, 169, 0.0, 2, 39, 15),
    "MONK-3": Problem(lambda a: (a[4] == 3 and a[3] == 1) or (a[4] != 4 and a[1] != 3), 122, 0.05, 2, 39, 4, (2e-3,)),
}


class Affine(nn.Module):
    """A linear layer whose bias is one more weight, so that it can be removed too."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs + 1, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns W [x, 1]."""
        return self.linear(torch.cat([x, x.new_ones(len(x), 1)], 1))


def network(inputs: int, hidden: int, seed: int) -> nn.Module:
    """Returns a network of sigmoid units, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(Affine(inputs, hidden), nn.Sigmoid(), Affine(hidden, 1), nn.Sigmoid()).double()


def all_cases(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns all 432 robots as zeros and ones (432, 17), and their classes (432, 1)."""
    robots = list(itertools.product(*[range(1, levels + 1) for levels in LEVELS]))
    inputs = [
        [float(value == v) for value, levels in zip(r, LEVELS, strict=True) for v in range(1, levels + 1)] for r in robots
    ]
    labels = [[float(problem.rule(robot))] for robot in robots]
    return torch.tensor(inputs, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)


def drawn(problem: Problem, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the training cases of a seed."""
    inputs, labels = all_cases(problem)
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(inputs), generator=generator)[: problem.cases]
    wrong = torch.randperm(len(some), generator=generator)[: round(problem.noise * len(some))]
    labels = labels[some].clone()
    labels[wrong] = 1 - labels[wrong]
    return inputs[some], labels


def fit(model: nn.Module, x: Tensor, y: Tensor, decay: float, steps: int = 300) -> None:
    """Trains on the squared error with L-BFGS; masked weights stay 0."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(weights, max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y) + decay * sum(w.square().sum() for w in weights)
        loss.backward()
        return loss

    optimizer.step(closure)


def right(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Returns how many cases a network has right."""
    with torch.no_grad():
        return int(((model(x) > 0.5) == (y > 0.5)).sum())


def smallest(model: nn.Module, x: Tensor, y: Tensor, least: int) -> nn.Module:
    """Returns the smallest network with ``least`` training cases right: weights go one after another, on one inverse a few.

    Where cases turn wrong and training does not help, fewer weights go on one inverse, and at last one.
    """
    evidence, best, few = Evidence([(x, y)], functional.mse_loss), deepcopy(model), 6
    while few:
        trial = deepcopy(best)
        pruner = mg.methods.Obs(trial, density=0.01, evidence=evidence, alpha=1e-6, allow_empty=True, start=False)
        kept = pruner.masks.kept
        if kept <= 1:
            break
        pruner.remove(max(1, kept - few))
        if right(trial, x, y) < least:
            fit(trial, x, y, 0.0)
        if right(trial, x, y) < least:
            few //= 2
        else:
            best = trial
    return best


def solved(problem: Problem, seed: int) -> tuple[int, float, float]:
    """Returns weights that stay and the fractions of all 432 cases that the dense and the small network have right."""
    x, y = drawn(problem, seed)
    candidates = []
    for start in range(4):
        model = network(x.shape[1], problem.hidden, 10 * seed + start)
        for decay in problem.decays:
            fit(model, x, y, decay)
        candidates.append(model)
    model = max(candidates, key=lambda one: right(one, x, y))
    everything = all_cases(problem)
    dense = right(model, *everything) / len(everything[0])
    small = smallest(model, x, y, right(model, x, y))
    return mg.masks_of(small).kept or problem.before, dense, right(small, *everything) / len(everything[0])


def xor(seed: int) -> int:
    """Returns the weights of a 2-2-1 network that computes XOR, after removals that leave it right."""
    x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    y = (x.sum(1, keepdim=True) == 1).double()
    for start in range(20):
        model = network(2, 2, 100 * seed + start)
        fit(model, x, y, 1e-5)
        if right(model, x, y) == 4:
            return mg.masks_of(smallest(model, x, y, 4)).kept or 9
    return 9


def main() -> None:
    """Prints one row for each problem and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    print("| problem | seed | weights | published | ours | dense, 432 cases % | small, 432 cases % |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    ratios = []
    for name, problem in PROBLEMS.items():
        for seed in seeds:
            kept, dense, small = solved(problem, seed)
            shown = f"{100 * dense:.1f} | {100 * small:.1f}"
            print(f"| {name} | {seed} | {problem.before} | {problem.after} | {kept} | {shown} |", flush=True)
            ratios.append((problem.after or kept) / kept)
    for seed in seeds:
        print(f"| XOR 2-2-1 | {seed} | 9 | - | {xor(seed)} | 100 | 100 |", flush=True)
    print(f"ratio: {min(ratios):.2f}")


if __name__ == "__main__":
    main()
