"""The task of causal language modelling: windows of a text, perplexity as the field reports it."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.batch import call
from microglia.core.errors import DataError, FileError
from microglia.core.masks import masks_of
from microglia.core.running import folded_twin
from microglia.data.samples import SampleBatches
from microglia.data.text import IGNORED, Windows, read_text, windows
from microglia.storage.changes import changes_digest
from microglia.storage.files import write_atomic
from microglia.tasks.kinds import kind
from microglia.tasks.metrics import AnyMetric, Metric
from microglia.tasks.start import load_start
from microglia.tasks.task import Batches, Split, Task, softened_divergence
from microglia.zoo.external import factory_model
from microglia.zoo.language import Tokenizer, causal_model, tokenizer_of
from microglia.zoo.registry import ModelError

HELD_OUT = 0.1
"""Last part of a text that is the test split, where no test text is given."""
TOKENS = 16384
"""Tokens of one forward pass in an evaluation, at most, unless one window is longer."""
LARGEST = 700.0
"""Largest mean loss, in nats, whose perplexity is a float."""
TOLD = "microglia.json"
"""File beside the weights of a written model that tells what was done to it."""


@dataclass(frozen=True)
class LanguageOptions:
    """The options of causal language modelling.

    Attributes:
        text: File of text, folder of such files (.txt, .md, .rst), or ``hf:NAME`` of a data set of the hub.
        test_text: The same for the test split; None for the last tenth of ``text``.
        tokenizer: ``auto`` for the model's own, ``bytes``, or a name or directory of transformers.
        length: Tokens of a window.
        stride: Tokens between two windows of the test split; None for ``length``, as published tables have it. With a smaller
            one each token is predicted from at least ``length - stride`` tokens before it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    text: str = ""
    test_text: str | None = None
    tokenizer: str = "auto"
    length: int = 2048
    stride: int | None = None


@dataclass(frozen=True)
class TextSource:
    """The windows of a text; see `microglia.tasks.task.Data`. It has no validation split."""

    train: Windows
    test: Windows

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> Batches:
        """Returns batches of windows; those in order, for evaluation, hold at most `TOKENS` tokens."""
        chosen = {"train": self.train, "test": self.test}.get(split, Windows(torch.zeros(0, dtype=torch.int64), 2, 2))
        if not shuffle:
            most = max(1, TOKENS // chosen.length // world) * world
            batch_size = min(batch_size, most)
        return SampleBatches(chosen, batch_size, seed=seed, shuffle=shuffle, rank=rank, world=world)  # type: ignore[arg-type]


def language_task(
    model: str, options: LanguageOptions | None = None, *, checkpoint: str | None = None, seed: int = 0, **settings: Any
) -> Task:
    """Returns the task of predicting the next token of a text.

    Args:
        model: ``hf:NAME_OR_FOLDER`` of a causal language model, or ``package.module:function``, which gets the number of
            different tokens as ``classes`` and returns a model of token ids (batch, length).
        options: See `LanguageOptions`.
        checkpoint: File with trained weights.
        seed: Seed of the initial weights of a model that is not trained.
        **settings: The options by keyword instead.

    Raises:
        DataError: The text is missing, too short, or has tokens that the model lacks.
        ModelError: The model or its tokenizer cannot be read.
    """
    given = options or LanguageOptions(**settings)
    source, _, name = model.partition(":")
    if not given.text:
        raise DataError("The task of language modelling reads a text: give text=FILE, or a folder of text files.")
    if source != "hf" and (not name or source in ("timm", "torchvision")):
        raise ModelError(f"Language modelling takes hf:NAME_OR_FOLDER or package.module:function as its model; got {model!r}.")
    trained = source == "hf"
    if given.tokenizer == "auto" and not trained:
        raise ModelError(f"The model {model} brings no tokenizer: give tokenizer=FOLDER, or tokenizer=bytes.")
    tokenizer = tokenizer_of(name if given.tokenizer == "auto" else given.tokenizer)
    data, bytes_each = _source(given, tokenizer)
    classes = int(max(data.train.tokens.max(), data.test.tokens.max())) + 1

    def fresh(seed: int) -> nn.Module:
        if trained:
            return causal_model(name, seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return factory_model(model, classes, (given.length,))  # type: ignore[arg-type]

    def build() -> nn.Module:
        network = causal_model(name) if trained else fresh(seed)
        _check_model(network, given.length, classes)
        if checkpoint is not None:
            load_start(network, checkpoint)
        return network

    return Task(
        f"{model} on {Path(given.text).name}",
        build,
        data,
        next_token_loss,
        language_metrics(bytes_each),
        {"input_ids": data.test[0][0]["input_ids"][None]},
        pretrained=trained or checkpoint is not None,
        fresh=fresh,
        forward=logits_of,
        distance=lambda student, teacher, t: softened_divergence(student.movedim(-1, 1), teacher.movedim(-1, 1), t),
        agree=same_tokens,
        kind="language",
        deliver=lambda network, directory: write_model(network, directory, tokenizer),
    )


@kind("language", LanguageOptions)
def language(model: str, options: LanguageOptions, *, checkpoint: str | None, seed: int) -> Task:
    """Returns the task of causal language modelling on a text."""
    return language_task(model, options, checkpoint=checkpoint, seed=seed)


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Returns the logits of a model, (batch, length, tokens), also where it returns an output object of transformers."""
    outputs = call(model, inputs)
    logits: Tensor = getattr(outputs, "logits", outputs)
    return logits


def next_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of each predicted token in nats, (predicted tokens,), in float32.

    Args:
        logits: (batch, length, tokens); those at a position predict the token at the next one.
        labels: (batch, length); `microglia.data.text.IGNORED` where no token is predicted.
    """
    wanted = labels[:, 1:].flatten()
    counted = wanted != IGNORED
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1)[counted].float(), wanted[counted], reduction="none")


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean of `next_token_losses`."""
    return next_token_losses(logits, labels).mean()


def language_metrics(bytes_each: float) -> dict[str, AnyMetric]:
    """Returns perplexity, mean loss in nats, and bits per byte, each lower if better.

    Args:
        bytes_each: Bytes of the test text for each of its tokens. Bits per byte are comparable between tokenizers.
    """

    def statistics(logits: Tensor, labels: Tensor) -> Tensor:
        losses = next_token_losses(logits, labels).double()
        return torch.stack([losses.sum(), losses.new_tensor(losses.numel())])

    def mean(total: Tensor) -> float:
        return float(total[0] / total[1])

    return {
        "perplexity": Metric(statistics, lambda total: math.exp(min(mean(total), LARGEST)), "lower", ""),
        "loss": Metric(statistics, mean, "lower", ""),
        "bits_per_byte": Metric(statistics, lambda total: mean(total) / math.log(2) / bytes_each, "lower", ""),
    }


def same_tokens(first: Any, second: Any) -> tuple[int, int] | None:
    """Returns at how many positions two models' logits have the same largest token, and of how many."""
    if not all(isinstance(one, Tensor) and one.ndim == 3 for one in (first, second)):
        return None
    equal = first.argmax(-1) == second.argmax(-1)
    return int(equal.sum()), equal.numel()


def write_model(model: nn.Module, directory: Path, tokenizer: Tokenizer) -> None:
    """Writes a model of transformers so that ``from_pretrained`` reads the directory: masks as zeros, the tokenizer beside.

    A model of another library is not written. A model whose configuration cannot say its widths ends in a warning.
    """
    if not hasattr(model, "save_pretrained"):
        return
    masks = masks_of(model)
    copied: Any = folded_twin(model).cpu()
    try:
        copied.save_pretrained(directory)
    except FileError as error:
        warnings.warn(str(error), stacklevel=2)
        return
    tokenizer.save(directory)
    told = {"format": "microglia.transformers", "changes": changes_digest(model), "kept": masks.kept, "masked": masks.total}
    write_atomic(directory / TOLD, json.dumps(told, indent=2) + "\n")


def _source(options: LanguageOptions, tokenizer: Tokenizer) -> tuple[TextSource, float]:
    """Returns the windows of both splits, and the bytes of the test text for each of its tokens."""
    text = read_text(options.text)
    if options.test_text is not None:
        train, test = text, read_text(options.test_text)
    else:
        border = round((1 - HELD_OUT) * len(text))
        train, test = text[:border], text[border:]
    length, stride = options.length, options.stride or options.length
    names = ("The training text", "The test text")
    first, second = (torch.tensor(list(tokenizer.encode(part)), dtype=torch.int64) for part in (train, test))
    found = TextSource(windows(first, length, length, names[0]), windows(second, length, stride, names[1]))
    return found, len(test.encode()) / len(second)


def _check_model(model: nn.Module, length: int, classes: int) -> None:
    """Raises `DataError` if windows are longer than a model reads, or tokens are beyond its vocabulary."""
    config = getattr(model, "config", None)
    most, known = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    if isinstance(most, int) and length > most:
        raise DataError(
            f"Windows of {length:,} tokens are longer than the {most:,} that the model reads: give a shorter length."
        )
    if isinstance(known, int) and classes > known:
        raise DataError(
            f"The text has the token {classes - 1:,}, and the model knows {known:,} tokens: give the tokenizer it was made for."
        )
