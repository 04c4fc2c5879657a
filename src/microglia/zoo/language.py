"""Causal language models of transformers and their tokenizers; bytes as tokens for models without one."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from microglia.zoo.external import import_torchvision, library, refusals
from microglia.zoo.registry import ModelError

BYTES = "bytes"
"""Name of the tokenizer whose tokens are the bytes of UTF-8."""


class Tokenizer(Protocol):
    """Turns text into tokens."""

    def encode(self, text: str) -> Sequence[int]:
        """Returns the tokens of a text, as one sequence."""
        ...

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files, if it has any."""
        ...


@dataclass(frozen=True)
class Bytes:
    """The bytes of UTF-8 as tokens, 0 to 255."""

    def encode(self, text: str) -> Sequence[int]:
        """Returns the bytes of a text."""
        return list(text.encode())

    def save(self, directory: Path) -> None:
        """Writes nothing: bytes need no files."""


@dataclass(frozen=True)
class Pretrained:
    """A tokenizer of transformers."""

    own: Any

    def encode(self, text: str) -> Sequence[int]:
        """Returns the tokens of a text, with the special tokens that the model begins a text with."""
        return list(self.own(text, verbose=False)["input_ids"])

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files."""
        self.own.save_pretrained(directory)


def causal_model(name: str, *, seed: int | None = None) -> nn.Module:
    """Returns a causal language model of the hub or of a local directory, in evaluation mode.

    Args:
        name: Name or directory, without ``hf:``.
        seed: Seed of new weights by the same configuration; None for the trained weights.

    Raises:
        ModelError: transformers is not installed, or does not read the model.
    """
    transformers = _transformers(name)
    with refusals(f"hf:{name}"):
        if seed is None:
            model = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
        else:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    plain: nn.Module = model.eval()
    return plain


def encoder_model(name: str) -> nn.Module:
    """Returns an encoder of the hub or of a local directory with its trained weights, in evaluation mode.

    Args:
        name: Name or directory, without ``hf:``.

    Raises:
        ModelError: transformers is not installed, or does not read the model.
    """
    transformers = _transformers(name)
    with refusals(f"hf:{name}"):
        model: nn.Module = transformers.AutoModel.from_pretrained(name, trust_remote_code=False).eval()
    return model


def tokenizer_of(name: str) -> Tokenizer:
    """Returns a tokenizer: ``bytes``, or that of a name or directory of transformers.

    Raises:
        ModelError: There is none, or transformers is not installed.
    """
    if name == BYTES:
        return Bytes()
    transformers = _transformers(name)
    try:
        found = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        empty = not found or len(found) == 0
    except Exception as error:  # transformers raises errors of many kinds for a missing file
        raise _no_tokenizer(name) from error
    if empty:
        raise _no_tokenizer(name)
    return Pretrained(found)


def _no_tokenizer(name: str) -> ModelError:
    return ModelError(f"{name} holds no tokenizer that transformers reads: give tokenizer=FOLDER, or tokenizer={BYTES}.")


def _transformers(name: str) -> Any:
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()  # transformers imports it, and would fail on the missing operators
    return library("transformers", f"hf:{name}")
