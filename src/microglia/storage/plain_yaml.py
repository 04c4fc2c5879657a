"""YAML as recipes use it: read in bounded time and memory, whatever the text; a key that is there twice is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST = 2**18
"""Characters that a text may have, and that it may have with every alias written out."""
DEEPEST = 64
"""Mappings and lists that may lie within each other, with every alias written out."""
MERGE = "tag:yaml.org,2002:merge"


def read_yaml_text(path: Path) -> Any:
    """Returns what a YAML file holds; see `parse_yaml`.

    Raises:
        OSError: It cannot be read.
        ValueError: As `parse_yaml`.
    """
    with path.open() as file:
        return parse_yaml(file.read(LARGEST + 1))


def parse_yaml(text: str) -> Any:
    """Returns what a YAML text holds: plain values only.

    Raises:
        ValueError: It is no YAML, larger or deeper than any recipe, a list or mapping holds itself, or a key is there twice;
            the text is one line and says where.
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
    """Refuses what is nested too deeply before Python's own stack is full."""

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
    """Goes through the nodes once each; an alias counts as much as what it stands for."""

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
        self.known[id(node)] = None  # begun
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
                continue  # no recipe has any, and lists cannot be keys
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
