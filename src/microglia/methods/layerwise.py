"""Pruning of a sequence of blocks, one at a time, by what each layer reads: SparseGPT (2023), Wanda (Sun et al. 2023).

The procedure (spec: tasks 8.1):
    hidden = inputs of the first block, for every calibration batch
    for each block in order:
        run hidden through the block; sum the second moments of what each of its layers reads
        prune each layer by its rule: a mask, and perhaps new values of the weights that stay
        hidden = outputs of the pruned block

At any moment one block's moments and the calibration batches between two blocks are in memory. Every block is a stage of the
run. The batches are not stored: a resumed run computes them again by the pruned blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from microglia.core.batch import call
from microglia.core.errors import BudgetError, MicrogliaError, PatternError
from microglia.core.layers import Layer, oriented, prunable_layers
from microglia.core.masks import MaskSet, attach_mask, masks_of
from microglia.core.modes import evaluating
from microglia.core.patterns import NM, Block, Unstructured, parse_pattern
from microglia.core.progress import progress_bar
from microglia.core.restore import restore
from microglia.graph.blocks import Passage, check_finite, find_blocks, passages
from microglia.methods.arguments import check_model, plain_settings
from microglia.methods.config import MethodConfig, method, preset
from microglia.methods.exact_obs import exact_least_squares as _exact  # noqa: F401 -- registers its rule
from microglia.methods.layer_inputs import Reading, Shared
from microglia.methods.layerwise_checks import block_layers, check_pattern, warn, weights_to_keep
from microglia.methods.layerwise_densities import UNIFORM, densities
from microglia.methods.layerwise_rules import Rule, Wish, rules
from microglia.methods.procedure import dense_model, evidence, observe, train
from microglia.methods.what import SAMPLING, Takes
from microglia.scores.second_moments import Moments, largest_moments
from microglia.scores.second_order import wanda_values
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig

NO_TRAINING = FitConfig(epochs=0)
"""The training after this method by default: none."""


@dataclass(frozen=True)
class LayerwiseConfig(MethodConfig):
    """Layer-wise pruning, one block of a sequence at a time.

    Attributes:
        rule: ``magnitude``, ``wanda``, ``sparsegpt``, ``wanda-update`` (Wanda's mask, SparseGPT's update), or
            ``optimal-brain-compression`` (exact OBS, for small layers).
        densities: ``uniform``, ``owl`` (blocks with more outliers keep more), or ``budget`` (one budget for all layers).
        blocks: Path of the list of blocks, such as ``model.layers``; None for the longest list of modules of one class.
        mask_block: Columns whose mask SparseGPT chooses at once; N:M chooses within each run of M.
        update_block: Columns that SparseGPT updates one by one; for a given mask it changes the speed alone.
        dampening: Fraction of the mean of the Hessian's diagonal that is added to it; it rises where that does not suffice.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("density", "layers", "exclude", *SAMPLING),
        patterns={Unstructured: "masked", Block: "masked", NM: "masked"},
        needs=("blocks",),
        why={
            "scope": "its densities share the budget out",
            "score": "its rule ranks the weights",
            "reduction": "its rule ranks the weights",
            "protect": "it takes exclude, which leaves layers dense and uncounted",
            "channel": "it removes no whole rows, which no other weight of the row could compensate",
        },
    )
    train: FitConfig = NO_TRAINING
    score_batches: int = 16
    score_batch_size: int = 8
    rule: str = "sparsegpt"
    densities: str = UNIFORM
    blocks: str | None = None
    mask_block: int = 128
    update_block: int = 8
    dampening: float = 0.01

    def check_values(self) -> None:
        """Raises unless the rule exists and its numbers are in range."""
        rules[self.rule]
        densities[self.densities]
        if self.densities != UNIFORM and (fixed := parse_pattern(self.pattern).fixed_density) is not None:
            raise BudgetError(f"{self.pattern} keeps {fixed:g} of every layer by itself; leave densities out.")
        if self.mask_block < 1 or self.update_block < 1:
            raise PatternError(
                "mask_block and update_block are numbers of columns, at least 1; got "
                f"{self.mask_block} and {self.update_block}."
            )
        if not 0 <= self.dampening <= 1:
            raise BudgetError(f"dampening is a fraction of the Hessian's diagonal, in [0, 1]; got {self.dampening}.")

    def own_bytes(self, model: nn.Module) -> int:
        """Returns the bytes of the second moments of the largest block, and of three matrices of its widest layer at work."""
        if rules[self.rule].needs != "whole":
            return super().own_bytes(model)
        _, blocks = find_blocks(model, self.blocks)
        return max(largest_moments(prunable_layers(block)) for block in blocks)


class Layerwise:
    """Prunes a model block by block on calibration batches, in place.

    Args:
        model: Any model with a sequence of blocks (see `microglia.graph.blocks.find_blocks`).
        batches: Calibration inputs, batch by batch: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        config: See `LayerwiseConfig`.
        forward: (model, inputs) -> outputs.
        **settings: The fields of the config by keyword instead, such as ``rule="wanda", pattern="nm:2:4"``.

    Raises:
        MicrogliaError: The config does not fit the model; the text explains it.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> report = Layerwise(model, [torch.randn(32, 8)], rule="wanda", density=0.5).prune()
        >>> [row["kept"] for row in report["layers"]]
        [32, 32]
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        config: LayerwiseConfig | None = None,
        *,
        forward: Callable[[nn.Module, Any], Any] = call,
        **settings: Any,
    ) -> None:
        check_model(model, "Layerwise")
        if config is not None and settings:
            raise BudgetError(f"Layerwise takes a config or keywords, not both; got a config and {', '.join(settings)}.")
        self.config = config or LayerwiseConfig(**plain_settings(LayerwiseConfig, settings, "Layerwise"))
        self.model, self.forward = model, forward
        self.batches = batches if isinstance(batches, Sequence) else list(batches)
        self.rule: Rule = rules[self.config.rule]
        self.pattern = parse_pattern(self.config.pattern)
        self.path, self.blocks = find_blocks(model, self.config.blocks)
        self.layers = block_layers(model, self.blocks, self.config)
        everything = {name: layer for own in self.layers for name, layer in own.items()}
        check_pattern(self.pattern, everything)
        self.keep = weights_to_keep(everything, self.pattern, self.config)
        self._passed: list[Passage] | None = None
        self._at = 0

    @property
    def masks(self) -> MaskSet:
        """The masks of the pruned layers."""
        attached = masks_of(self.model)
        return MaskSet({name: attached[name] for own in self.layers for name in own if name in attached})

    def prune(self, run: Run | None = None) -> dict[str, Any]:
        """Prunes every block and returns the report, JSON-ready: the rule, the blocks, and one row for each layer.

        Args:
            run: A run whose stages keep each finished block; None computes everything.

        Raises:
            MicrogliaError: There are no batches, or the blocks are not a sequence.
        """
        run = run or Run()
        rows: list[dict[str, Any]] = []
        with evaluating(self.model), torch.no_grad(), _full_precision():
            if self.config.densities != UNIFORM:
                self.keep = run.stage("densities", lambda progress: self._shared_out())
            with progress_bar("blocks", len(self.blocks)) as bar:
                for index, (block, layers) in enumerate(zip(self.blocks, self.layers, strict=True)):
                    if layers:
                        rows += self._stage(run, index, block)
                    bar.advance()
        self._passed, self._at = None, 0
        warn(rows)
        return {"rule": self.config.rule, "blocks": self.path, "layers": rows}

    def _shared_out(self) -> dict[str, int]:
        """Returns how many weights each layer keeps, from one pass through the dense blocks."""
        values: list[dict[str, Tensor]] = []
        for index, layers in enumerate(self.layers):
            shared = self._moments(index, layers, self._inputs(index), whole=False)
            moments = {name: group.moments.mean() for group in shared for name in group.layers}
            weights = oriented(layers, {name: layer.weight.detach() for name, layer in layers.items()})
            values.append({n: wanda_values(w, moments[n]) if n in moments else w.abs() for n, w in weights.items()})
        self._passed, self._at = None, 0
        return densities[self.config.densities](values, sum(self.keep.values()))

    def _stage(self, run: Run, index: int, block: nn.Module) -> list[dict[str, Any]]:
        """Prunes a block as a stage of the run, or restores the finished one."""

        def work(progress: Progress) -> dict[str, Any]:
            rows = self._prune_block(index)
            return {"block": block.state_dict(), "rows": rows}

        done = run.stage(f"block-{index:03d}", work)
        restore(block, done["block"])
        return cast("list[dict[str, Any]]", done["rows"])

    def _inputs(self, index: int) -> list[Passage]:
        """Returns what enters a block, from the pruned blocks before it."""
        if self._passed is None:
            self._passed = passages(self.model, self.blocks, self.batches, self.forward)
            if not self._passed:
                raise MicrogliaError("Layer-wise pruning calibrates on batches of inputs: give at least one.")
        while self._at < index:
            for passage in self._passed:
                passage.hidden = passage.run(self.blocks[self._at], self._at)
                check_finite(passage.hidden, f"{self.path}.{self._at}")
            self._at += 1
        return self._passed

    def _prune_block(self, index: int) -> list[dict[str, Any]]:
        layers, rows = self.layers[index], []
        passed = self._inputs(index)
        shared = [] if self.rule.needs == "none" else self._moments(index, layers, passed, whole=self.rule.needs == "whole")
        read = {name for group in shared for name in group.layers}
        unread = [name for name in layers if name not in read]
        while shared:
            group = shared.pop(0)  # its moments are freed before those of the next are factored
            prepared = self.rule.prepare(group.moments.mean(), self._wish(0))
            rows += [self._prune_layer(name, layers[name], self.rule, prepared, group.moments) for name in group.layers]
            del prepared, group
        plain = self.rule if self.rule.needs == "none" else rules["magnitude"]
        rows += [self._prune_layer(name, layers[name], plain, None, None) for name in unread]
        return sorted(rows, key=lambda row: list(layers).index(row["layer"]))

    def _moments(self, index: int, layers: Mapping[str, Layer], passed: Sequence[Passage], *, whole: bool) -> list[Shared]:
        """Runs every batch through a block and returns the moments of what its layers read, once for each tensor."""
        reading = Reading(layers, whole=whole)
        handles = reading.attach()
        try:
            for passage in passed:
                reading.begin(passage.counted)
                passage.run(self.blocks[index], index)
        finally:
            for handle in handles:
                handle.remove()
        return reading.groups()

    def _prune_layer(self, name: str, layer: Layer, rule: Rule, prepared: Any, moments: Moments | None) -> dict[str, Any]:
        weight = oriented({name: layer}, {name: layer.weight.detach()})[name]
        pruned = rule.prune(weight, prepared, self._wish(self.keep.get(name, 0)))
        found = oriented({name: layer}, {name: pruned.mask})
        layer.raw.copy_(oriented({name: layer}, {name: pruned.weight})[name])
        attach_mask(layer, found[name])
        return {
            "layer": name,
            "rule": next(key for key, known in rules.items() if known is rule),
            "kept": int(pruned.mask.count_nonzero()),
            "total": pruned.mask.numel(),
            "loss": pruned.loss,
            "dampening": pruned.dampening,
            "inputs": None if moments is None else moments.columns,
            "rows": None if moments is None else moments.count,
        }

    def _wish(self, keep: int) -> Wish:
        config = self.config
        return Wish(self.pattern, keep, config.mask_block, config.update_block, config.dampening)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Context in which products of float32 matrices on a GPU are not rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def fits(task: Task, config: LayerwiseConfig) -> None:
    """Raises unless blocks, layers, pattern and density fit the task's model."""
    Layerwise(task.build(), [], config)


@method("layerwise", LayerwiseConfig, check=fits, training=NO_TRAINING, purpose="large models block by block, without training")
def layerwise(task: Task, run: Run, config: LayerwiseConfig) -> nn.Module:
    """Blocks one after another: each layer is pruned by what it reads; by the rule the other weights compensate."""
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None
    inputs = [inputs for inputs, _ in evidence(task, run, config).batches]
    run.observations["layerwise"] = Layerwise(model, inputs, config, forward=task.forward).prune(run)
    observe(task, run, "before", model)
    if config.train.epochs:
        train(task, run, "train", model, config.train, teacher=teacher)
    return model


preset(
    "wanda",
    "layerwise",
    "Wanda: |w| times the norm of its input, compared in each row, block by block.",
    rule="wanda",
    paper="Sun et al. 2023, arXiv 2306.11695",
    purpose="language models, fast",
)
preset(
    "sparsegpt",
    "layerwise",
    "SparseGPT: one-shot masks, the other weights compensate, block by block.",
    rule="sparsegpt",
    paper="Frantar, Alistarh 2023, arXiv 2301.00774",
    purpose="language models, 2:4, more accuracy",
)
