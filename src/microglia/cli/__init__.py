"""The command line: `microglia`."""

from microglia.cli.commands import main

__all__ = ["main"]
