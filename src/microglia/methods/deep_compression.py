"""Deep Compression (Han, Mao and Dally 2016): prune, share weights, train the shared weights, entropy-code, one file.

The algorithm (spec: 4.1):
    prune    the smallest weights, along a schedule while the network trains, or in rounds of pruning and training
    share    W = C[I]: k-means of the kept weights of each layer, linear initial centroids
    train    C with the gradient summed over the weights of a centroid; I is fixed
    pack     Huffman codes of I and of the gaps between kept weights

With a budget of bytes, density and bits follow from it. With a largest loss of accuracy, the three steps are repeated with ever
fewer weights, and the smallest file within it is the result (`microglia.methods.file_budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from microglia.compress import Container, Contents, encode, measured
from microglia.compress.bit_budget import Rounding
from microglia.compress.container import read_container
from microglia.compress.contents import contents_of
from microglia.compress.histograms import distributions
from microglia.compress.sharing import bits_by_layer
from microglia.core.errors import BudgetError
from microglia.core.left_out import chosen_layers
from microglia.core.patterns import parse_pattern
from microglia.methods.config import fits, method
from microglia.methods.file_budget import FileBudget, chosen_bits, density_for, fewest_bits, has_density, points_lost
from microglia.methods.gradual import Gradual, GradualConfig
from microglia.methods.packed_observed import PackedLayer, Round
from microglia.methods.procedure import dense_in_order, evidence, observe, train
from microglia.methods.weight_sharing import SharingConfig, WeightSharing
from microglia.storage.files import write_atomic
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.evaluate import evaluate
from microglia.train.optim import FitConfig, epoch_length

FILE = "model.mgpack"
"""Name of the packed file in a run's directory."""
SHARE = FitConfig(epochs=5, lr=0.001)
"""The default training of the shared weights: biases and norms at this rate, centroids at ``centroid_lr``."""
FIRST = 0.2
"""Density of the first round where none is given."""


@dataclass(frozen=True)
class DeepCompressionConfig(SharingConfig, FileBudget, GradualConfig):
    """Deep Compression: gradual pruning, then weight sharing.

    Attributes:
        share: Training of the shared weights.
    """

    share: FitConfig = field(default=SHARE)

    def check_values(self) -> None:
        """Raises `BudgetError` where the bits or the densities are given and are searched too."""
        if self.bits is not None and (self.bytes is not None or self.within is not None):
            goal = "bytes" if self.bytes is not None else "within"
            raise BudgetError(f"{goal} chooses the bits of each layer: leave bits out; got bits={self.bits!r}.")
        if self.within is not None and (self.params is not None or parse_pattern(self.pattern).fixed_density is not None):
            raise BudgetError(
                "within keeps ever fewer weights from a density on: give density, or nothing, and a pattern without a "
                f"density of its own; got params={self.params} and the pattern {self.pattern}."
            )

    def asked_besides(self) -> dict[str, float]:
        """Returns the size of the file, or the loss of accuracy, that is asked for."""
        asked = {"bytes": self.bytes, "within": self.within}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def rounding(self) -> Rounding:
        """How weights are rounded to shared values."""
        return Rounding(self.initial, self.exact, groups=self.codebook_groups)


def _fits(task: Task, config: DeepCompressionConfig) -> None:
    """Raises unless pruning and sharing fit the task's model."""
    own = config.bytes is not None or config.within is not None
    fits(task, replace(config, density=FIRST) if own and not has_density(config) else config)
    bits_by_layer(chosen_layers(task.build(), config.layers, config.exclude), config.numbers)


@method(
    "deep-compression",
    DeepCompressionConfig,
    check=_fits,
    paper="Han et al. 2016, arXiv 1510.00149",
    purpose="the smallest file",
)
def deep_compression(task: Task, run: Run, config: DeepCompressionConfig) -> nn.Module:
    """Prune along a schedule, share the kept weights, train the shared values, and pack one small file."""
    model = dense_in_order(task, run, config)
    teacher = deepcopy(model) if config.train.distill or config.share.distill else None
    rounds: list[Round] = []
    if config.within is not None:
        model, rounds = _smallest(task, run, config, model, teacher)
    else:
        _for_bytes(task, run, config, model, teacher)
    run.observations["packed"] = run.stage("packed", lambda progress: packed(run, model, rounds, progress))
    return model


def _for_bytes(task: Task, run: Run, config: DeepCompressionConfig, model: nn.Module, teacher: nn.Module | None) -> None:
    """Prunes and shares once, in place; with a budget of bytes, density and bits follow from it."""
    budget, rounding = config.bytes, config.rounding
    if budget is not None and not has_density(config):
        found = run.stage(
            "density", lambda progress: {"density": density_for(model, config, budget, evidence(task, run, config))}
        )
        config = replace(config, density=found["density"])
    _prune(task, run, "train", config, model, teacher=teacher)
    observe(task, run, "before", model)
    if budget is not None:
        layers = chosen_layers(model, config.layers, config.exclude)
        known = layers, evidence(task, run, config)
        found = run.stage(
            "bits", lambda progress: {"bits": chosen_bits(model, budget, *known, error=config.bit_error, rounding=rounding)}
        )
        config = replace(config, bits=found["bits"], bytes=None)
    _share(task, run, "share", config, model, teacher=teacher)


def _prune(
    task: Task, run: Run, name: str, config: DeepCompressionConfig, model: nn.Module, *, teacher: nn.Module | None
) -> None:
    steps = config.train.epochs * epoch_length(config.train, len(task.data.batches("train", config.train.batch_size)))

    def pruner() -> Gradual:
        return Gradual(model, config, total_steps=max(1, steps), evidence=evidence(task, run, config))

    train(task, run, name, model, config.train, pruner=pruner, teacher=teacher)


def _share(
    task: Task, run: Run, name: str, config: DeepCompressionConfig, model: nn.Module, *, teacher: nn.Module | None
) -> None:
    def sharing() -> WeightSharing:
        return WeightSharing(model, config, evidence=evidence(task, run, config))

    train(task, run, name, model, config.share, pruner=sharing, teacher=teacher)


def _smallest(
    task: Task, run: Run, config: DeepCompressionConfig, model: nn.Module, teacher: nn.Module | None
) -> tuple[nn.Module, list[Round]]:
    """Returns the model with the smallest file within the loss of accuracy, and all rounds; validation images decide."""
    asked = config.within or 0.0
    dense = _headline(task, run, "dense", model)

    def good(trial: nn.Module) -> bool:
        return points_lost(task, dense, evaluate(trial, task, "validation")[task.headline]) <= asked

    density = config.density if config.density is not None else FIRST
    best: nn.Module | None = None
    rounds: list[Round] = []
    while len(rounds) < config.rounds:
        number = len(rounds) + 1
        own = replace(config, density=density, params=None)
        _prune(task, run, f"train-{number}", own, model, teacher=teacher)
        bits = run.stage(f"bits-{number}", partial(_fewest, task, run, own, (model, good)))["bits"]
        value = _headline(task, run, f"pruned-{number}", model)
        if bits:
            shared = deepcopy(model)
            _share(task, run, f"share-{number}", replace(own, bits=bits, within=None), shared, teacher=teacher)
            value = _headline(task, run, f"shared-{number}", shared)
        lost = points_lost(task, dense, value)
        within = bool(bits) and lost <= asked
        rounds.append(Round(density, measured(shared).bytes if bits else None, value, lost, within, dict(bits or {})))
        if not within:
            break
        best, density = shared, config.factor * density
    if best is None:
        raise BudgetError(
            f"The first round, density {density:g}, loses {rounds[0].lost:.2f} points on validation images, and {asked:g} are "
            "allowed: begin at a higher density, train longer, or allow more."
        )
    return best, rounds


def _headline(task: Task, run: Run, name: str, model: nn.Module) -> float:
    """Returns the headline metric on the validation images, measured once."""
    found = run.stage(f"{name}-validated", lambda progress: {"metrics": evaluate(model, task, "validation")})["metrics"]
    if task.headline not in found:
        raise BudgetError("within compares accuracies on validation images, and these data have none: give bytes, or bits.")
    return float(found[task.headline])


def _fewest(
    task: Task,
    run: Run,
    config: DeepCompressionConfig,
    judged: tuple[nn.Module, Callable[[nn.Module], bool]],
    progress: Progress,
) -> dict[str, Any]:
    model, good = judged
    if not good(model):
        return {"bits": None}
    layers, seen = chosen_layers(model, config.layers, config.exclude), evidence(task, run, config)
    return {"bits": fewest_bits(model, layers, seen, good, error=config.bit_error, rounding=config.rounding)}


def packed(run: Run, model: nn.Module, rounds: list[Round], progress: Progress | None = None) -> dict[str, Any]:
    """Writes the packed file of a run; returns the observation ``packed``, JSON-ready."""
    data = encode(model)
    if run.directory is not None and run.main:
        write_atomic(run.directory / FILE, data)
    container = read_container(data, Path(FILE), limit=2**63)
    contents = contents_of(container)
    return {
        "bytes": contents.bytes,
        "dense": contents.dense,
        "file": FILE if run.directory is not None else None,
        "layers": {name: asdict(layer) for name, layer in _layers(contents, container).items()},
        "steps": contents.steps(),
        **({"rounds": [asdict(one) for one in rounds]} if rounds else {}),
    }


def _layers(contents: Contents, container: Container) -> Mapping[str, PackedLayer]:
    """Returns the shared layers by name, with their distributions."""
    return {
        entry.name: PackedLayer(
            density=entry.kept / entry.size,
            values=entry.values,
            code_bits=8 * entry.code_bytes / max(1, entry.kept),
            index_bits=8 * entry.index_bytes / max(1, entry.kept),
            bytes=entry.bytes,
            distributions=distributions(container, name),
        )
        for entry, name in zip(contents.entries, container.rows, strict=True)
        if entry.values and entry.size
    }
