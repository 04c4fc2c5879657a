"""Optional libraries: an error that names the extra if a library is missing."""

from __future__ import annotations

from importlib.util import find_spec

from microglia.core.errors import MicrogliaError


def needs(extra: str, *modules: str) -> None:
    """Raises unless modules of an extra are installed; imports none of them.

    Args:
        extra: Name of the extra that installs them, such as ``export``.
        modules: Top-level modules, such as ``onnx``.

    Raises:
        MicrogliaError: A module is missing; the text names it and the command that installs it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MicrogliaError(
            f"This needs {' and '.join(missing)}, not installed here: pip install 'microglia[{extra}]' installs what it needs."
        )
