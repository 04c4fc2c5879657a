"""The task of sentence embeddings: how near a pruned encoder stays to the dense one, by cosine, ranks and neighbours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.batch import call
from microglia.core.errors import DataError
from microglia.core.modes import evaluating
from microglia.data.samples import SampleBatches
from microglia.data.text import read_text
from microglia.tasks.kinds import kind
from microglia.tasks.language import HELD_OUT, write_model
from microglia.tasks.metrics import AnyMetric, Gathered, mean_metric
from microglia.tasks.start import load_start
from microglia.tasks.task import Batches, Split, Task
from microglia.zoo.language import Tokenizer, encoder_model, tokenizer_of
from microglia.zoo.registry import ModelError

WORDS = 4
"""Words that a sentence has at least."""
BATCH = 64
"""Sentences of one forward pass that makes the dense embeddings."""


@dataclass(frozen=True)
class EmbeddingOptions:
    """The options of sentence embeddings.

    Attributes:
        text: File of text, folder of such files, or ``hf:NAME`` of a data set; its sentences are embedded.
        test_text: The same for the test split; None for the last tenth of the sentences.
        tokenizer: ``auto`` for the model's own, or a name or directory of transformers.
        length: Tokens of a sentence, at most; longer ones are cut.
        sentences: Sentences of each split, at most, spread evenly over the text.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    text: str = ""
    test_text: str | None = None
    tokenizer: str = "auto"
    length: int = 64
    sentences: int = 1000


class Sentences:
    """Sentences as ({"input_ids", "attention_mask"}, (index, dense embedding)), all of one length.

    Args:
        texts: The sentences.
        tokenizer: Their tokens.
        length: Tokens of each, padding included.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, length: int) -> None:
        self.ids = torch.zeros(len(texts), length, dtype=torch.int64)
        self.mask = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = list(tokenizer.encode(text))
            tokens = tokens if len(tokens) <= length else [*tokens[: length - 1], tokens[-1]]
            self.ids[row, : len(tokens)] = torch.tensor(tokens)
            self.mask[row, : len(tokens)] = 1
        self.dense = torch.zeros(len(texts), 0)

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.ids)

    def inputs(self, rows: slice) -> dict[str, Tensor]:
        """Returns the inputs of some sentences."""
        return {"input_ids": self.ids[rows], "attention_mask": self.mask[rows]}

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], tuple[int, Tensor]]:
        """Returns one sentence, its number and its dense embedding."""
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index]}, (index, self.dense[index])


@dataclass(frozen=True)
class SentenceSource:
    """The sentences of a text; see `microglia.tasks.task.Data`. It has no validation split."""

    train: Sentences
    test: Sentences

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
        """Returns batches of sentences."""
        chosen: Any = {"train": self.train, "test": self.test}.get(split, [])
        return SampleBatches(chosen, batch_size, seed=seed, shuffle=shuffle, rank=rank, world=world)  # type: ignore[return-value]


def embedding_task(
    model: str, options: EmbeddingOptions | None = None, *, checkpoint: str | None = None, **settings: Any
) -> Task:
    """Returns the task of keeping the sentence embeddings of a trained encoder.

    The targets are the embeddings of the dense model, made when the task is. The loss is 1 - cosine.

    Args:
        model: ``hf:NAME_OR_FOLDER`` of an encoder of transformers.
        options: See `EmbeddingOptions`.
        checkpoint: File with other trained weights.
        **settings: The options by keyword instead.

    Raises:
        DataError: The text is missing, or has fewer than two sentences in a split.
        ModelError: The model or its tokenizer cannot be read.
    """
    given = options or EmbeddingOptions(**settings)
    source, _, name = model.partition(":")
    if source != "hf" or not name:
        raise ModelError(f"Sentence embeddings take hf:NAME_OR_FOLDER as their model; got {model!r}.")
    if not given.text:
        raise DataError("The task of sentence embeddings reads a text: give text=FILE, or a folder of text files.")
    tokenizer = tokenizer_of(name if given.tokenizer == "auto" else given.tokenizer)
    data = _source(given, tokenizer)

    def build() -> nn.Module:
        network = encoder_model(name)
        if checkpoint is not None:
            load_start(network, checkpoint)
        return network

    dense = build()
    for part in (data.train, data.test):
        part.dense = embeddings_of(dense, part)
    return Task(
        f"{model} on sentences",
        build,
        data,
        lambda outputs, targets: (1 - cosines(outputs, targets)).mean(),
        embedding_metrics(),
        data.test.inputs(slice(0, 1)),
        pretrained=True,
        forward=embedding,
        distance=lambda student, teacher, t: (1 - functional.cosine_similarity(student, teacher, dim=-1)).mean(),
        agree=lambda first, second: None,
        kind="embedding",
        deliver=lambda network, directory: write_model(network, directory, tokenizer),
    )


@kind("embedding", EmbeddingOptions)
def embedding_kind(model: str, options: EmbeddingOptions, *, checkpoint: str | None, seed: int) -> Task:
    """Returns the task of sentence embeddings."""
    return embedding_task(model, options, checkpoint=checkpoint)


def embedding(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the mean of an encoder's last hidden states over the tokens of each sentence, of length 1, (batch, width)."""
    outputs = call(model, inputs)
    hidden: Tensor = getattr(outputs, "last_hidden_state", outputs)
    counted = inputs["attention_mask"][..., None].to(hidden)
    return functional.normalize((hidden * counted).sum(1) / counted.sum(1).clamp_min(1), dim=-1)


@torch.no_grad()
def embeddings_of(model: nn.Module, sentences: Sentences) -> Tensor:
    """Returns the embeddings of all sentences, (sentences, width)."""
    with evaluating(model):
        parts = [embedding(model, sentences.inputs(slice(at, at + BATCH))) for at in range(0, len(sentences), BATCH)]
    return torch.cat(parts)


def cosines(outputs: Tensor, targets: Any) -> Tensor:
    """Returns the cosine of each embedding and its dense one, (batch,)."""
    return functional.cosine_similarity(outputs, targets[1], dim=-1)


def fidelity(found: Tensor, dense: Tensor) -> dict[str, float]:
    """Returns what two sets of embeddings have in common: ``ranks`` and ``neighbours``.

    Args:
        found: (sentences, width), each of length 1.
        dense: The same of the dense model.

    Returns:
        ``ranks``, the Spearman correlation of the similarities of all pairs; ``neighbours``, the fraction of sentences whose
        nearest other sentence is the same.
    """
    both = [one.double() @ one.double().T for one in (found, dense)]
    above = torch.ones_like(both[0], dtype=torch.bool).triu(1)
    ranks = torch.stack([one[above].argsort().argsort().double() for one in both])
    nearest = [one.fill_diagonal_(-torch.inf).argmax(1) for one in both]
    correlation = float(torch.corrcoef(ranks)[0, 1]) if ranks.shape[1] > 1 else 1.0
    return {"ranks": correlation, "neighbours": float((nearest[0] == nearest[1]).double().mean())}


def embedding_metrics() -> dict[str, AnyMetric]:
    """Returns the mean cosine to the dense embedding, and `fidelity`, each higher if better."""

    def records(outputs: Tensor, targets: Any) -> list[tuple[Tensor, ...]]:
        return list(zip(targets[0], outputs, targets[1], strict=True))

    def value(found: list[Any]) -> dict[str, float]:
        return fidelity(torch.stack([one[1] for one in found]), torch.stack([one[2] for one in found]))

    return {"cosine": mean_metric(cosines, unit=""), "ranks": Gathered(records, value, unit="")}


def sentences_of(text: str) -> list[str]:
    """Returns the sentences of a text with at least `WORDS` words, each on one line, without repetitions."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    return list(dict.fromkeys(part for part in parts if len(part.split()) >= WORDS))


def _source(options: EmbeddingOptions, tokenizer: Tokenizer) -> SentenceSource:
    train = sentences_of(read_text(options.text))
    if options.test_text is None:
        border = round((1 - HELD_OUT) * len(train))
        train, test = train[:border], train[border:]
    else:
        test = sentences_of(read_text(options.test_text))
    if min(len(train), len(test)) < 2:
        raise DataError(
            f"Sentence embeddings need at least two sentences to calibrate on and two to judge by; the text has {len(train)} "
            f"and {len(test)} of {WORDS} words or more."
        )
    return SentenceSource(*(Sentences(_spread(part, options.sentences), tokenizer, options.length) for part in (train, test)))


def _spread(texts: Sequence[str], most: int) -> list[str]:
    """Returns at most ``most`` texts, evenly spread."""
    count = min(most, len(texts))
    return [texts[index * len(texts) // count] for index in range(count)]
