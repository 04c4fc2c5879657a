"""Prints the sizes of the house: files, lines, public names, the longest function, the lines of each room, arrows.

    python benchmarks/house.py [ROOT ...]

Each ROOT is a checkout (default: this one), so that two versions stand side by side: `git worktree add ../before COMMIT`.
It reads the source and imports none of it. `tests/unit/test_house_shape.py` holds the limits of this file by its functions.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

PACKAGE = "microglia"
LONGEST_FILE, LONGEST_FUNCTION, LINES_OF_LAB = 330, 60, 1500
LANGUAGES = ("runtime/gpu/triton/kernel.py",)
"""Files whose functions may be longer: a kernel in Triton's language calls no functions that it could be split into."""
SHARED = ("lab", "report", "storage", "cli")
"""Rooms that ask registries and name no family; a family's own section of the report lies in ``report/sections``."""
NAMED = r"gates?|gated|ftwt|tickets?|lottery|smart|pas|pdp|awg|acdc|ddnp|rigl|synflow|snip|grasp"
FAMILY = re.compile(rf"(?<![a-z])(dynamic (?:models?|runs?|pruning)|\.dynamic|{NAMED})(?![a-z])", re.I)
"""Words that name a method, a change or a study of the house."""
ROOMS_OF_FAMILIES = ("dynamic", "graph", "methods", "studies", "tasks.classification")
"""Where the types of families are defined."""


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
    for node in _running(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            folder = source.joinpath(*node.module.split(".")[1:])
            for alias in node.names:
                module = (folder / f"{alias.name}.py").exists() or (folder / alias.name / "__init__.py").exists()
                imports.add(f"{node.module}.{alias.name}" if module else node.module)
        elif isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE}.")}
    name = ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))
    room = parts[0] if len(parts) > 1 else f"({parts[0]})"
    return File(name, room, text.count("\n"), tuple(functions), frozenset(imports))


def _running(node: ast.AST) -> list[ast.AST]:
    """Returns everything in a module, functions included, but what is imported for types alone."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return list(itertools.chain.from_iterable(map(_running, node.orelse)))
    return [node, *itertools.chain.from_iterable(map(_running, ast.iter_child_nodes(node)))]


def files_of(root: Path) -> list[File]:
    """Returns the files of a checkout's package."""
    source = root / "src" / PACKAGE
    return [read(source, path) for path in sorted(source.rglob("*.py"))]


def long_functions(files: list[File], limit: int) -> list[tuple[int, str]]:
    """Returns the functions with more lines than a limit, the longest first, without those of `LANGUAGES`."""
    every = itertools.chain.from_iterable(file.functions for file in files)
    return sorted((f for f in every if f[0] > limit and not f[1].startswith(LANGUAGES)), reverse=True)


def arrows(files: list[File]) -> set[tuple[str, str]]:
    """Returns the pairs of rooms of which the first imports from the second."""
    rooms = {file.room for file in files if not file.room.startswith("(")}
    found = {(file.room, name.split(".")[1]) for file in files for name in file.imports if "." in name}
    return {(one, other) for one, other in found if one in rooms and other in rooms and one != other}


def arrows_up(root: Path, files: list[File]) -> list[str]:
    """Returns the arrows that go up, or between rooms on one floor."""
    floor = floors(root)
    return sorted(f"{one} -> {other}" for one, other in arrows(files) if floor.get(other, 99) >= floor.get(one, 99))


def families_named(root: Path) -> list[str]:
    """Returns the lines of shared rooms that name a family, or ask whether a value is of a family's type."""
    found = []
    for path in _shared(root):
        text, place = path.read_text(), path.relative_to(root / "src" / PACKAGE)
        found += [f"{place}:{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if FAMILY.search(line)]
        found += [f"{place}:{node.lineno}: {ast.unparse(node)}" for node in _asked_types(ast.parse(text))]
    return found


def _shared(root: Path) -> list[Path]:
    source = root / "src" / PACKAGE
    paths = itertools.chain.from_iterable(sorted((source / room).rglob("*.py")) for room in SHARED)
    return [path for path in paths if "sections" not in path.relative_to(source).parts]


def _asked_types(tree: ast.Module) -> list[ast.Call]:
    """Returns the calls of isinstance with a type that is imported from a family's room."""
    places = tuple(f"{PACKAGE}.{room}" for room in ROOMS_OF_FAMILIES)
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(places)]
    types = {alias.asname or alias.name for node in imported for alias in node.names}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"]
    return [node for node in calls if types & {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}]


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
    files, floor, lines = files_of(root), floors(root), Counter[str]()
    functions = long_functions(files, 0)
    for file in files:
        lines[file.room] += file.lines
    rooms, up = {file.room for file in files if not file.room.startswith("(")}, arrows_up(root, files)
    longest = max(files, key=lambda file: file.lines)
    ordered = sorted(file.lines for file in files)
    return {
        "Python files": f"{len(files):,}",
        "lines": f"{sum(ordered):,}",
        "public names at the top": f"{public(root)}",
        "lines of a file, median / 90 % / most": f"{median(ordered):.0f} / {ordered[len(ordered) * 9 // 10]} / {ordered[-1]}",
        "longest file": longest.name,
        f"files over {LONGEST_FILE} lines": f"{sum(count > LONGEST_FILE for count in ordered)}",
        "functions": f"{len(functions):,}",
        "longest function": f"{functions[0][0]}: {functions[0][1]}",
        "functions over 40 / over 60 lines": " / ".join(str(len(long_functions(files, limit))) for limit in (40, 60)),
        "rooms / arrows between them": f"{len(rooms)} / {len(arrows(files))}",
        "arrows up": f"{len(up)} {', '.join(up)}".strip(),
        "circles of files": "; ".join(circles(files)) or "none",
        "lines of shared rooms that name a family": f"{len(families_named(root))}",
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
