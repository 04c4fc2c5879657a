"""YAML of recipes: read in bounded time and memory for every text; a duplicate key is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LARGEST = 2**18
"""Maximum number of characters of a text, also with every alias written out."""
EXAMPLES = {
    "recipe": "'model: resnet20'",
    "sweep": "'grid: {seed: [0, 1]}'",
    "sweep or queue": "'grid: {seed: [0, 1]}'",
    "queue": "'parts: [{study: NAME}]'",
    "study": "'base: {model: resnet20}'",
    "list of statements": "'statements: []'",
}
"""The beginning of each kind of YAML file that is read as a mapping."""
DEEPEST = 64
"""Maximum depth of nested mappings and lists, with every alias written out."""
MERGE = "tag:yaml.org,2002:merge"


def read_yaml_text(path: Path) -> Any:
    """Returns the content of a YAML file; see `parse_yaml`.

    Raises:
        OSError: The file cannot be read.
        ValueError: Same as `parse_yaml`.
    """
    with path.open() as file:
        return parse_yaml(file.read(LARGEST + 1))


def parse_yaml(text: str) -> Any:
    """Returns the content of a YAML text: plain values only.

    Raises:
        ValueError: The text is not YAML, exceeds the limits, contains itself by an alias, or has a duplicate key. The message
            is one line and gives the position.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} characters")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Measure(loader)(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class _Loader(yaml.SafeLoader):
    """Refuses deep nesting before Python's own stack overflows."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            raise ValueError(_DEEP)
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        return node


_DEEP = f"lists and mappings lie more than {DEEPEST} deep within each other"


class _Measure:
    """Visits each node once; an alias counts as much as its anchor."""

    def __init__(self, loader: _Loader) -> None:
        self.loader = loader
        self.known: dict[int, tuple[int, int] | None] = {}

    def __call__(self, node: yaml.Node) -> tuple[int, int]:
        """Returns (characters, depth) of a node with all aliases written out."""
        if id(node) in self.known:
            found = self.known[id(node)]
            if found is None:
                raise ValueError(f"what begins in line {_line(node)} holds itself")
            return found
        self.known[id(node)] = None  # visit in progress
        if isinstance(node, yaml.MappingNode):
            self._refuse_twice(node)
        parts = [self(child) for child in _children(node)]
        size = 1 + sum(part for part, _ in parts) + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        depth = 1 + max((below for _, below in parts), default=0)
        if size > LARGEST:
            raise ValueError(f"with its aliases written out it has more than {LARGEST:,} characters")
        if depth > DEEPEST:
            raise ValueError(_DEEP)
        self.known[id(node)] = size, depth
        return size, depth

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no recipe has such keys, and lists cannot be keys
            value = key.value if key.tag == MERGE else self.loader.construct_object(key)  # type: ignore[no-untyped-call]
            if (mark := (key.tag, value)) in seen:
                raise ValueError(f"the key {key.value[:80]!r} is there twice in one mapping, again in line {_line(key)}")
            seen.add(mark)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def merge(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested defaults updated with the given values, so that ``train.epochs`` alone keeps the default rate."""
    result = dict(defaults)
    for key, value in given.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result
