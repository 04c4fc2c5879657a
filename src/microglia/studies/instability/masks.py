"""Masks found anew for every epoch at which copies part: iterative magnitude pruning rewound to that very epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from microglia.core.errors import MicrogliaError
from microglia.core.masks import MaskSet
from microglia.core.patterns import parse_pattern
from microglia.core.shuffle import shuffled
from microglia.lab.recipe import Recipe, RecipeError, method_config
from microglia.methods import LotteryConfig, methods
from microglia.methods.lottery import Tickets, levels_to
from microglia.storage.run import Run
from microglia.tasks.task import Task


def check_rewound(task: Task, recipe: Recipe, at: Sequence[int]) -> None:
    """Raises unless a recipe says how masks are found, and every epoch is one that can be rewound to.

    Args:
        task: The recipe's task.
        recipe: A recipe of iterative magnitude pruning with a density.
        at: Epochs.

    Raises:
        MicrogliaError: The method or one of its fields is another, they do not fit the task, or an epoch is the last.
    """
    config = _config(recipe)
    if config.density is None and config.params is None:
        raise RecipeError("Masks are found down to a density: give --density, such as 0.2.")
    if max(at) >= config.train.epochs:
        raise MicrogliaError(
            f"Masks are found by training on from the epoch at which copies part, at most {config.train.epochs - 1} of "
            f"{config.train.epochs}; got {max(at)}."
        )
    methods[recipe.method].check(task, config)


def _config(recipe: Recipe) -> LotteryConfig:
    config = method_config(recipe)
    if not isinstance(config, LotteryConfig) or not config.iterative or config.to != "weights" or config.control != "none":
        raise RecipeError(
            "Masks are found by the method imp (iterative, to=weights, control=none), rewound to every epoch asked for; "
            f"the recipe is of {recipe.method!r} with other fields."
        )
    return config


class Rewound:
    """The masks of one initialization by epoch, every training a durable stage of a run.

    Source: Frankle et al. 2020, section 4: the subnetworks of figure 5 are found by rewinding to the same k from which their
    copies part; the control permutes a mask within each layer.

    Args:
        task: A task of an untrained network.
        run: Where the stages are kept.
        recipe: See `check_rewound`; its own ``rewind`` is not looked at.
    """

    def __init__(self, task: Task, run: Run, recipe: Recipe) -> None:
        self.task, self.run, self.config = task, run, _config(recipe)
        self._found: dict[int, MaskSet] = {}

    def masks(self, epoch: int) -> MaskSet:
        """Returns what iterative magnitude pruning keeps when each of its levels goes back to an epoch.

        Args:
            epoch: k, before the last one of the training.
        """
        if epoch not in self._found:
            config = replace(self.config, rewind=epoch)
            search = Tickets(self.task, self.run, config, prefix=f"imp-{epoch}-")
            level, last = search.dense(), levels_to(search.pruner.weights, search.pruner.target, config.rate)
            for number in range(1, last):
                level = search.below(level, number)
            # The last level's own training is that of the copies, each with its own noise.
            self._found[epoch] = search.masks_below(level, last, keep=search.pruner.target)
        return self._found[epoch]

    def control(self, epoch: int) -> MaskSet:
        """Returns as many weights of every layer as `masks` keeps, drawn at random.

        Args:
            epoch: See `masks`.
        """
        return shuffled(self.masks(epoch), parse_pattern(self.config.pattern), self.run.seed * 1_009)
