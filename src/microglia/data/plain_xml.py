"""XML of annotations, read without document types: no entity is expanded, no file fetched, depth and size are bounded."""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from microglia.core.errors import DataError

LARGEST = 16 * 2**20
"""Largest file, in bytes."""
DEEPEST = 32
"""Deepest nesting of elements."""


class _Refused(Exception):
    """Content that is not read; the text says which."""


def read_xml(path: Path) -> Element:
    """Returns the root element of an XML file.

    Raises:
        DataError: The file is missing, too large, not XML, nested too deep, or declares a document type.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise _Refused(f"it has more than {LARGEST / 2**20:g} MiB")
        return _parsed(path.read_bytes())
    except _Refused as error:
        raise DataError(f"The annotation {path} is refused: {error}.") from None
    except (OSError, expat.ExpatError, ValueError, LookupError) as error:
        raise DataError(f"The annotation {path} cannot be read as XML ({error}); mend or remove it.") from error


def _parsed(content: bytes) -> Element:
    builder, parser = TreeBuilder(), expat.ParserCreate()
    depth = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise _Refused(f"its elements are nested deeper than {DEEPEST}")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def doctype(*_: object) -> None:
        raise _Refused("it declares a document type, which an annotation does not need and which can hold an entity bomb")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = doctype
    parser.Parse(content, True)
    root: Element = builder.close()
    return root
