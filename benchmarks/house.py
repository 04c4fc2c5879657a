"""Prints the sizes of the house: files, lines, public names, the longest function, the lines of each room, arrows.

    python benchmarks/house.py [ROOT ...]

Each ROOT is a checkout (default: this one), so that two versions stand side by side: `git worktree add ../before COMMIT`.
It reads the source and imports none of it.
"""

from __future__ import annotations

import ast
import itertools
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

PACKAGE = "microglia"


@dataclass(frozen=True)
class File:
    """One Python file of the package."""

    name: str
    room: str
    lines: int
    functions: tuple[tuple[int, str], ...]
    imports: frozenset[str]


def read(source: Path, path: Path) -> File:
    """Returns what one file is made of."""
    text, parts = path.read_text(), path.relative_to(source).with_suffix("").parts
    tree = ast.parse(text)
    functions = [
        (node.end_lineno - node.lineno + 1, f"{'/'.join(parts)}.py {node.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]
    imports = set()
    for node in _running(tree.body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            folder = source.joinpath(*node.module.split(".")[1:])
            for alias in node.names:
                module = (folder / f"{alias.name}.py").exists() or (folder / alias.name / "__init__.py").exists()
                imports.add(f"{node.module}.{alias.name}" if module else node.module)
        elif isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE}.")}
    name = ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))
    room = parts[0] if len(parts) > 1 else f"({parts[0]})"
    return File(name, room, text.count("\n"), tuple(functions), frozenset(imports))


def _running(body: list[ast.stmt]) -> list[ast.AST]:
    """Returns everything in a module but what is imported for types alone."""
    own = [node for node in body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    return list(itertools.chain.from_iterable(ast.walk(node) for node in own))


def floors(root: Path) -> dict[str, int]:
    """Returns the floor of every room, from the layers of the import linter, the lowest 0."""
    linter = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in linter["contracts"] if contract["type"] == "layers")
    named = [[room.strip().removeprefix(f"{PACKAGE}.") for room in layer.replace(":", "|").split("|")] for layer in layers]
    return {room.strip("()"): floor for floor, rooms in enumerate(reversed(named)) for room in rooms}


def public(root: Path) -> int:
    """Returns the number of names in ``__all__`` at the top."""
    tree = ast.parse((root / "src" / PACKAGE / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return len(ast.literal_eval(node.value))
    return 0


def circles(files: list[File]) -> list[str]:
    """Returns the groups of files that import each other in a circle; what is imported for types alone is left out."""
    names = {file.name for file in files}
    after = {file.name: {name for name in file.imports if name in names and name != file.name} for file in files}
    reach: dict[str, set[str]] = {}
    for start, first in after.items():
        seen, todo = set(), list(first)
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += after[name]
        reach[start] = seen
    found = {frozenset(other for other in reach[name] if name in reach[other]) for name in after if name in reach[name]}
    return sorted(", ".join(sorted(group)) for group in found)


def sizes(root: Path) -> dict[str, str]:
    """Returns the rows of the table."""
    source = root / "src" / PACKAGE
    files = [read(source, path) for path in sorted(source.rglob("*.py"))]
    functions = sorted(itertools.chain.from_iterable(file.functions for file in files), reverse=True)
    python = [f for f in functions if "triton/kernel" not in f[1]]  # Triton's language has no functions to split into
    lines, floor = Counter[str](), floors(root)
    for file in files:
        lines[file.room] += file.lines
    arrows = {(file.room, name.split(".")[1]) for file in files for name in file.imports if not name.endswith(f".{PACKAGE}")}
    rooms = {file.room for file in files if not file.room.startswith("(")}
    arrows = {(one, other) for one, other in arrows if one in rooms and other in rooms and one != other}
    up = sorted(f"{one} -> {other}" for one, other in arrows if floor.get(other, 99) > floor.get(one, 99))
    longest = max(files, key=lambda file: file.lines)
    ordered = sorted(file.lines for file in files)
    return {
        "Python files": f"{len(files):,}",
        "lines": f"{sum(ordered):,}",
        "public names at the top": f"{public(root)}",
        "lines of a file, median / 90 % / most": f"{median(ordered):.0f} / {ordered[len(ordered) * 9 // 10]} / {ordered[-1]}",
        "longest file": longest.name,
        "files over 330 lines": f"{sum(count > 330 for count in ordered)}",
        "functions": f"{len(functions):,}",
        "longest function": f"{python[0][0]}: {python[0][1]}",
        "functions over 40 / over 60 lines": f"{sum(f[0] > 40 for f in python)} / {sum(f[0] > 60 for f in python)}",
        "rooms / arrows between them": f"{len(rooms)} / {len(arrows)}",
        "arrows up": f"{len(up)} {', '.join(up)}".strip(),
        "circles of files": "; ".join(circles(files)) or "none",
        **{f"lines of {room}": f"{lines[room]:,}" for room in sorted(rooms, key=lambda room: (floor.get(room, 99), room))},
    }


def main() -> None:
    roots = [Path(word).resolve() for word in sys.argv[1:]] or [Path(__file__).resolve().parent.parent]
    columns = [sizes(root) for root in roots]
    table = Table("", *(root.name for root in roots), title="The house")
    for row in dict.fromkeys(itertools.chain.from_iterable(columns)):
        table.add_row(row, *(column.get(row, "-") for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
