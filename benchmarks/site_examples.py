"""Shows the examples of docstrings as code on the site: griffe reads a section ``Examples``, the house writes ``Example``."""

from __future__ import annotations

from typing import Any

from griffe import Extension


class Examples(Extension):
    """Renames the section before docstrings are parsed; the files stay as they are."""

    def on_object(self, *, obj: Any, **_: Any) -> None:  # noqa: D102
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
