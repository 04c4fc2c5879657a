"""Options that several commands share, what a command returns, and the recipe that a command line stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Shown = tuple[Any, list[Any]]
"""Result of a command: a JSON-ready value, and its text for a person."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]
Data = Annotated[str | None, typer.Option(help="digits, cifar10, mnist, camvid, hf:NAME or a folder.")]
Checkpoint = Annotated[str | None, typer.Option(help="Trained weights: a file, or the directory of a run or a saved model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, or auto: a GPU if there is one; default the recipe's.")
]
SplitName = Annotated[str, typer.Option("--split", help="train, validation or test.")]
Target = Annotated[str, typer.Argument(help="A run directory, a saved model's directory, or a model's name.")]


def given_recipe(
    source: Mapping[str, Any], words: Sequence[str], file: Path | None, *, typed: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a recipe with ``KEY=VALUE`` words put over it, once nothing in it that a file alone names may run code.

    Args:
        source: The recipe so far: the file, and the options over it.
        words: ``KEY=VALUE``, as typed.
        file: Where the recipe was read from, or None.
        typed: Options by key; what is None was not typed. Names that were typed are the user's own.

    Raises:
        FileError: The file names a model that it may not name without ``--trust``.
    """
    from microglia.lab.recipe import override
    from microglia.storage.code_folder import admit

    asked = override(source, words)
    if file is not None:
        own = {word.partition("=")[0] for word in words} | {key for key, value in typed.items() if value is not None}
        admit({key: value for key, value in asked.items() if key not in own}, file / "recipe.yaml" if file.is_dir() else file)
    return asked
