"""`push`: a model with its card to a repository of the Hugging Face hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from torch import nn

from microglia.core.errors import FileError
from microglia.core.sharded import refuse_shards
from microglia.report.summary import result_table
from microglia.storage import hub
from microglia.storage.archive import check_whole, save
from microglia.storage.run import read_json

RESULT = "result.json"


def push(
    model: nn.Module | str | Path,
    repository: str,
    *,
    result: Mapping[str, Any] | None = None,
    private: bool = False,
    message: str = "Model of Microglia",
) -> str:
    """Writes a model to a repository of the Hugging Face hub, with a card made from its result; ``mg.load`` reads it back.

    The token is that of ``hf auth login`` or ``HF_TOKEN``. No code and no pickle is written.

    Args:
        model: A model that `microglia.save` can write, or the directory of a run or of a saved model.
        repository: ``OWNER/NAME``; it is made if it does not exist.
        result: Content of the card, as `microglia.execute` returns it and ``result.json`` holds it; by default the run's own.
        private: Whether a new repository is private.
        message: Message of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileError: There is no saved model, the result is of another kind, the name is not ``OWNER/NAME``, or the hub refuses
            or cannot be reached.
        MicrogliaError: The parameters of the model are sharded.
        MissingLibraryError: `huggingface_hub` is not installed.
    """
    repository = repository.removeprefix(hub.PREFIX)
    if hub.FORM.fullmatch(repository) is None or "@" in repository:
        raise FileError(f"A repository of the hub is named as OWNER/NAME; got {repository!r}.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        own = _gather(model, folder)
        told = own if result is None else result
        (folder / "README.md").write_text(card(repository, folder, told))
        if told is not None:
            (folder / RESULT).write_text(json.dumps(told, indent=2) + "\n")
        with hub.asking(repository):
            api = hub.client()
            api.create_repo(repository, private=private, exist_ok=True)
            # A file of an earlier push, such as the kernels of an accelerated model, does not belong to this one.
            earlier = [name for name in hub.ALLOWED if not (folder / name).exists()]
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=earlier or None
            )
    return str(done.commit_url)


def _gather(model: nn.Module | str | Path, folder: Path) -> Mapping[str, Any] | None:
    """Puts the files of a model into a folder; returns the result of its run, if it has one."""
    if isinstance(model, nn.Module):
        refuse_shards(model, "push")
        save(model, folder)
        return None
    place = Path(model)
    saved = place / "model" if (place / "model").is_dir() else place
    check_whole(saved)
    for name in hub.ALLOWED:
        if (saved / name).is_file():
            shutil.copy(saved / name, folder / name)
    results = [path for path in (saved / RESULT, place / RESULT) if path.is_file()]
    return read_json(results[-1]) if results else None


def card(repository: str, folder: Path, result: Mapping[str, Any] | None) -> str:
    """Returns the model card: what the model is, dense beside pruned, how to load it, the recipe."""
    plan = read_json(folder / hub.NEEDED[0])
    header = {"library_name": "microglia", "tags": ["pruning", "pytorch"]}
    name = repository.partition("/")[2]
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", f"# {name}", ""]
    lines += [f"A {plan.get('class', 'model')}, pruned with Microglia.", ""]
    load = f'model = mg.load("hub:{repository}"'
    fresh = "" if plan.get("source") else ", fresh"  # a class of the user's own
    lines += ["```python", "import microglia as mg", "", f"{load}{fresh})", "```", ""]
    if fresh:
        lines += [f"`fresh` is a newly built, dense {plan.get('class', 'model')}.", ""]
    if result is not None:
        try:
            table = result_table(result)
            recipe = yaml.safe_dump(json.loads(json.dumps(result["recipe"])), sort_keys=False).strip()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileError(
                f"The result of a card is that of microglia.execute, or what result.json holds; this one is not ({error!r})."
            ) from error
        lines += [f"## {table.title}", "", *markdown(table), "", f"{table.caption}", ""]
        lines += ["<details><summary>Recipe</summary>", "", "```yaml", recipe, "```", "", "</details>", ""]
        if environment := result.get("environment"):
            lines += [", ".join(f"{key} {value}" for key, value in environment.items() if value), ""]
    return "\n".join(lines)


def markdown(table: Table) -> list[str]:
    """Returns the lines of a table of the terminal as Markdown."""
    titles = [str(column.header).replace("|", "\\|") for column in table.columns]
    rows = zip(*([str(cell).replace("|", "\\|") for cell in column.cells] for column in table.columns), strict=True)
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]
