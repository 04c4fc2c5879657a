"""The command line: `microglia`."""

from microglia.cli.app import main

__all__ = ["main"]
