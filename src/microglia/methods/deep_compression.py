"""Deep Compression (Han, Mao and Dally 2016): prune, share weights, train the shared weights, entropy-code, one file.

The algorithm (spec: 4.1):
    prune    the smallest weights, along a schedule while the network trains, or in rounds of pruning and training
    share    W = C[I]: k-means of the kept weights of each layer, linear initial centroids
    train    C with the gradient summed over the weights of a centroid; I is fixed
    pack     Huffman codes of I and of the gaps between kept weights
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from microglia.compress import Contents, measured, pack
from microglia.compress.sharing import bits_by_layer
from microglia.core.left_out import chosen_layers
from microglia.methods.config import fits, method
from microglia.methods.gradual import Gradual, GradualConfig
from microglia.methods.packed_observed import PackedLayer
from microglia.methods.procedure import dense_in_order, evidence, observe, train
from microglia.methods.weight_sharing import SharingConfig, WeightSharing
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig, epoch_length

FILE = "model.mgpack"
"""Name of the packed file in a run's directory."""
SHARE = FitConfig(epochs=5, lr=0.001)
"""The default training of the shared weights: biases and norms at this rate, centroids at ``centroid_lr``."""


@dataclass(frozen=True)
class DeepCompressionConfig(SharingConfig, GradualConfig):
    """Deep Compression: gradual pruning, then weight sharing.

    Attributes:
        share: Training of the shared weights.
    """

    share: FitConfig = field(default=SHARE)


def _fits(task: Task, config: DeepCompressionConfig) -> None:
    """Raises unless pruning and sharing fit the task's model."""
    fits(task, config)
    bits_by_layer(chosen_layers(task.build(), config.layers, config.exclude), config.numbers)


@method("deep-compression", DeepCompressionConfig, check=_fits)
def deep_compression(task: Task, run: Run, config: DeepCompressionConfig) -> nn.Module:
    """Prune along a schedule, share the kept weights, train the shared values, and pack one small file."""
    model = dense_in_order(task, run, config)
    teacher = deepcopy(model) if config.train.distill or config.share.distill else None
    steps = config.train.epochs * epoch_length(config.train, len(task.data.batches("train", config.train.batch_size)))

    def pruner() -> Gradual:
        return Gradual(model, config, total_steps=max(1, steps), evidence=evidence(task, run, config))

    train(task, run, "train", model, config.train, pruner=pruner, teacher=teacher)
    observe(task, run, "before", model)

    def sharing() -> WeightSharing:
        return WeightSharing(model, config, evidence=evidence(task, run, config))

    train(task, run, "share", model, config.share, pruner=sharing, teacher=teacher)
    run.observations["packed"] = run.stage("packed", lambda progress: packed(run, model, progress))
    return model


def packed(run: Run, model: nn.Module, progress: Progress | None = None) -> dict[str, Any]:
    """Writes the packed file of a run; returns the observation ``packed``, JSON-ready."""
    contents = pack(model, run.directory / FILE) if run.directory is not None and run.main else measured(model)
    return {
        "bytes": contents.bytes,
        "dense": contents.dense,
        "file": FILE if run.directory is not None else None,
        "layers": {name: asdict(layer) for name, layer in _layers(contents).items()},
    }


def _layers(contents: Contents) -> dict[str, PackedLayer]:
    return {
        entry.name: PackedLayer(
            density=entry.kept / entry.size,
            values=entry.values,
            code_bits=8 * entry.code_bytes / max(1, entry.kept),
            index_bits=8 * entry.index_bytes / max(1, entry.kept),
            bytes=entry.bytes,
        )
        for entry in contents.entries
        if entry.form == "shared" and entry.size
    }
