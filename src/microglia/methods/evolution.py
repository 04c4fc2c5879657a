"""Evolution over vectors of genes under a constraint, with the numbers of MetaPruning's code (Liu et al. 2019).

The algorithm (spec: survey 8.4), every iteration:
    evaluate the population; the best vectors so far are the parents
    25 mutants: each gene of a random parent changes with probability 0.1, by a non-zero offset modulo the options
    25 crossovers: each gene is that of one of two different parents, by a coin
    vectors that break the constraint or were there before are rejected; random ones fill the population up
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from microglia.core.errors import BudgetError

Genes = tuple[int, ...]
"""One option per place, 0 .. options - 1."""

PATIENCE = 10
"""Tries for each mutant and each crossover, as in the code; then random vectors take its place."""


@dataclass(frozen=True)
class Evolution:
    """The numbers of an evolution.

    Attributes:
        population: Vectors of each iteration.
        parents: The best vectors so far that mutate and cross.
        mutants: Mutated vectors of each iteration.
        crossovers: Crossed vectors of each iteration.
        probability: Probability that a gene mutates.
        iterations: Populations that are evaluated.

    Raises:
        BudgetError: A number is out of range, such as a population of 1, which has no two parents to cross.
    """

    population: int = 50
    parents: int = 10
    mutants: int = 25
    crossovers: int = 25
    probability: float = 0.1
    iterations: int = 20

    def __post_init__(self) -> None:
        if self.population < 2:
            raise BudgetError(f"population is at least 2, because a crossover needs two parents; got {self.population}.")
        if self.parents < 2 or self.iterations < 1 or min(self.mutants, self.crossovers) < 0:
            raise BudgetError(
                f"parents is at least 2, iterations at least 1, mutants and crossovers at least 0; got {self.parents}, "
                f"{self.iterations}, {self.mutants} and {self.crossovers}."
            )
        if not 0 < self.probability <= 1:
            raise BudgetError(f"probability is that of a gene to mutate, in (0, 1]; got {self.probability}.")

    def run(
        self,
        options: int,
        evaluate: Callable[[list[Genes]], Sequence[float]],
        feasible: Callable[[Genes], bool],
        draw: Callable[[torch.Generator], Genes | None],
        generator: torch.Generator,
        *,
        key: Callable[[Genes], object] = tuple,
    ) -> list[tuple[Genes, float]]:
        """Returns every evaluated vector with its value, in order; higher is better.

        Args:
            options: Values of a gene.
            evaluate: Different feasible vectors -> their values.
            feasible: The constraint.
            draw: Returns a random feasible vector, or None where it finds none.
            generator: Source of all random numbers.
            key: Vectors with equal keys count as the same.
        """
        seen: set[object] = set()
        found: list[tuple[Genes, float]] = []

        def fresh(genes: Genes | None) -> bool:
            if genes is None or key(genes) in seen or not feasible(genes):
                return False
            seen.add(key(genes))
            return True

        for _ in range(self.iterations):
            parents = [genes for genes, _ in sorted(found, key=lambda pair: -pair[1])[: self.parents]]
            born = self._offspring(parents, options, generator, fresh)
            while len(born) < self.population and (drawn := self._fill(draw, generator, fresh)) is not None:
                born.append(drawn)
            if not born:
                break  # every feasible vector was there
            found += zip(born, evaluate(born), strict=True)
        return found

    def _offspring(
        self, parents: list[Genes], options: int, generator: torch.Generator, fresh: Callable[[Genes | None], bool]
    ) -> list[Genes]:
        """Returns new mutants and crossovers."""
        if len(parents) < 2:
            return []
        mutants = self._bred(
            self.mutants, lambda: mutated(_one_of(parents, generator), options, self.probability, generator), fresh
        )
        return mutants + self._bred(self.crossovers, lambda: crossed(*_two_of(parents, generator), generator), fresh)

    def _fill(
        self,
        draw: Callable[[torch.Generator], Genes | None],
        generator: torch.Generator,
        fresh: Callable[[Genes | None], bool],
    ) -> Genes | None:
        """Returns a new random vector, or None after some tries."""
        return next((genes for _ in range(PATIENCE) if fresh(genes := draw(generator))), None)

    def _bred(self, count: int, make: Callable[[], Genes], fresh: Callable[[Genes | None], bool]) -> list[Genes]:
        """Returns at most ``count`` new vectors."""
        born: list[Genes] = []
        for _ in range(count * PATIENCE):
            if len(born) == min(count, self.population):
                break
            if fresh(genes := make()):
                born.append(genes)
        return born


def mutated(genes: Genes, options: int, probability: float, generator: torch.Generator) -> Genes:
    """Returns a vector whose genes changed with a probability: each by an offset of 1 .. options - 1, modulo the options."""
    changes = (torch.rand(len(genes), generator=generator) < probability).tolist()
    offsets = torch.randint(1, max(2, options), (len(genes),), generator=generator).tolist()
    return tuple(
        (gene + offset) % options if change else gene for gene, offset, change in zip(genes, offsets, changes, strict=True)
    )


def crossed(one: Genes, other: Genes, generator: torch.Generator) -> Genes:
    """Returns a vector whose genes are those of one or the other, by a fair coin each."""
    coins = torch.randint(2, (len(one),), generator=generator).tolist()
    return tuple(b if coin else a for a, b, coin in zip(one, other, coins, strict=True))


def _one_of(parents: Sequence[Genes], generator: torch.Generator) -> Genes:
    return parents[int(torch.randint(len(parents), (1,), generator=generator))]


def _two_of(parents: Sequence[Genes], generator: torch.Generator) -> tuple[Genes, Genes]:
    first, second = torch.randperm(len(parents), generator=generator)[:2].tolist()
    return parents[first], parents[second]
