"""Text for language models: read from files, cut into windows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from microglia.core.errors import DataError
from microglia.data.hub import hub_text

SUFFIXES = (".txt", ".text", ".md", ".rst")
"""Endings of the files that are read in a folder."""
HUB = "hf:"
"""Begins the name of a data set of the Hugging Face hub."""
BETWEEN = "\n\n"
"""Text between two files."""
IGNORED = -100
"""Label of a token that is not predicted."""


def read_text(path: str | Path) -> str:
    """Returns the text of a file, of all text files below a folder in the order of their paths, or of a data set.

    Args:
        path: File, folder, or ``hf:NAME`` of a data set of the Hugging Face hub; see `microglia.data.hub.hub_text`.

    Raises:
        DataError: There is no such file, the folder has no text files, or one of them is not UTF-8.
    """
    if str(path).startswith(HUB):
        return hub_text(str(path).removeprefix(HUB))
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"There is no text {path}; give a file, or a folder with files that end in {', '.join(SUFFIXES)}.")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files:
        raise DataError(f"The folder {path} has no text files, which end in {', '.join(SUFFIXES)}.")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    return BETWEEN.join(texts)


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, a map-style dataset of ({"input_ids": (length,)}, labels (length,)); the tail is left out.

    A label is the token itself; ``IGNORED`` where an earlier window predicted it already. The model predicts each token from
    those before it in the window, so that the first one is never predicted.

    Attributes:
        tokens: int64 (tokens,).
        length: Tokens of a window.
        stride: Tokens between the starts of two windows; ``length`` for windows that do not overlap.
    """

    tokens: Tensor
    length: int
    stride: int

    def __len__(self) -> int:
        """Number of whole windows."""
        return max(0, (len(self.tokens) - self.length) // self.stride + 1)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        """Returns one window and its labels."""
        ids = self.tokens[index * self.stride : index * self.stride + self.length]
        labels = ids.clone()
        if index:
            labels[: self.length - self.stride] = IGNORED
        return {"input_ids": ids}, labels


def windows(tokens: Tensor, length: int, stride: int, what: str) -> Windows:
    """Returns the windows of a text.

    Args:
        tokens: int64 (tokens,).
        length: Tokens of a window, at least 2.
        stride: In [1, length].
        what: Name of the text, for messages.

    Raises:
        DataError: The text is shorter than one window, or a number is out of range.
    """
    if length < 2 or not 1 <= stride <= length:
        raise DataError(f"A window has at least 2 tokens and a stride from 1 to its length; got {length} and {stride}.")
    if len(tokens) < length:
        raise DataError(
            f"{what} has {len(tokens):,} tokens, fewer than one window of {length:,}: give more text, or a shorter length."
        )
    return Windows(tokens.to(torch.int64), length, stride)
