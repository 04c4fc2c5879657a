"""Evolution: its operators, its constraint, and the known optimum of a synthetic fitness."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from microglia.core.errors import BudgetError
from microglia.methods.evolution import Evolution, Genes, crossed, mutated

OPTIONS, PLACES = 31, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(made: torch.Generator) -> Genes:
    return tuple(torch.randint(OPTIONS, (PLACES,), generator=made).tolist())


def test_a_mutation_changes_a_tenth_of_the_genes_and_never_by_nothing() -> None:
    genes, made = (3,) * 20_000, generator()
    child = mutated(genes, OPTIONS, 0.1, made)
    changed = [value for value in child if value != 3]
    assert 0.09 < len(changed) / len(genes) < 0.11  # an offset of 0 would make it less
    assert set(changed) == set(range(OPTIONS)) - {3}
    assert mutated(genes, OPTIONS, 1.0, made).count(3) == 0
    assert mutated((0, 1), 2, 1.0, made) == (1, 0)


def test_a_crossover_takes_every_gene_from_one_of_two_parents_by_a_fair_coin() -> None:
    child = crossed((0,) * 10_000, (1,) * 10_000, generator())
    assert 0.48 < sum(child) / 10_000 < 0.52
    mixed = crossed((1, 2, 3), (1, 5, 3), generator(3))
    assert mixed[0] == 1
    assert mixed[1] in (2, 5)
    assert mixed[2] == 3


@pytest.mark.parametrize("seed", range(3))
def test_the_known_optimum_of_a_synthetic_fitness_is_reached(seed: int) -> None:
    limit = 7 * 30 + 12

    def feasible(genes: Genes) -> bool:
        return sum(genes) <= limit  # so the greatest sum is the limit itself

    asked: list[list[Genes]] = []

    def evaluate(born: list[Genes]) -> list[float]:
        asked.append(born)
        return [float(sum(genes)) for genes in born]

    found = Evolution(iterations=40).run(OPTIONS, evaluate, feasible, draw, generator(seed))
    assert max(value for _, value in found) == limit
    every = [genes for genes, _ in found]
    assert len(set(every)) == len(every)
    assert all(feasible(genes) for genes in every)
    assert [genes for born in asked for genes in born] == every
    assert {len(born) for born in asked} == {50}
    best = list(accumulate((max(map(sum, born)) for born in asked), max))
    assert best == sorted(best)
    assert best[0] < limit - 20  # chance alone does not find it


def test_the_constraint_rejects_draws_too() -> None:
    found = Evolution(population=6, iterations=3).run(
        OPTIONS, lambda born: [0.0] * len(born), lambda genes: genes[0] < 16, draw, generator()
    )
    assert found
    assert all(genes[0] < 16 for genes, _ in found)


def test_a_space_that_is_used_up_ends_the_search() -> None:
    found = Evolution(population=4).run(
        2, lambda born: [0.0] * len(born), lambda genes: True,
        lambda made: tuple(torch.randint(2, (3,), generator=made).tolist()), generator(),
    )  # fmt: skip
    assert len(found) == len({genes for genes, _ in found}) <= 8


def test_vectors_of_equal_keys_are_one() -> None:
    found = Evolution(population=6, iterations=4).run(
        OPTIONS, lambda born: [0.0] * len(born), lambda genes: True, draw, generator(), key=lambda genes: genes[0] // 8
    )
    assert len({genes[0] // 8 for genes, _ in found}) == len(found) <= 4


def test_numbers_out_of_range_are_told() -> None:
    with pytest.raises(BudgetError, match="population is at least 2, because a crossover needs two parents; got 1"):
        Evolution(population=1)
    with pytest.raises(BudgetError, match="parents is at least 2"):
        Evolution(parents=1)
    with pytest.raises(BudgetError, match="probability is that of a gene to mutate"):
        Evolution(probability=0.0)
