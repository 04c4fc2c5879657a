"""The mechanical rules of the house's English: how an entry or a sentence begins, and how long it is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent / "src" / "microglia"
FILES = sorted(ROOT.rglob("*.py"))
LONGEST = 30
SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:", "Example:", "Examples:")
ENTRY = re.compile(r"^    (\*{0,2}[\w.]+(?:, [\w.]+)*(?: \([^)]*\))?):(?: (.*))?$")
BAD_BEGIN = re.compile(r"(Of|Than|What|Whose)\b")


def docstrings(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Yields (place, docstring, whether it is of something public), of attributes too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            name = getattr(node, "name", "")
            yield f"{path.relative_to(ROOT)}:{node.body[0].lineno}", text, not name.startswith("_")
    for one, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(one, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
            value = after.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield f"{path.relative_to(ROOT)}:{after.lineno}", value.value, True


def paragraphs(text: str) -> Iterator[str]:
    """Yields running text: paragraphs, and entries of sections without their names; no lists, equations, tables and code."""
    section, lines = "", list[str]()
    for line in [*text.splitlines(), ""]:
        entry = ENTRY.match(line) if section and section not in ("Returns:", "Yields:", "Example:", "Examples:") else None
        aside = (not section and line.startswith("    ")) or section.startswith("Example")
        if entry or aside or not line.strip() or line in SECTIONS or re.match(r"\s*(- |\d+\. |>>> |\.\.\. |\|)", line):
            if lines:
                yield " ".join(lines)
            lines = [entry.group(2) or ""] if entry else []
            section = line if line in SECTIONS else section
        else:
            section = section if line.startswith(" ") else ""
            lines.append(line.strip())


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of running text; a colon and a semicolon end one too, and code counts as a word."""
    for paragraph in paragraphs(text):
        words = re.sub(r"``[^`]*``|`[^`]*`", "code", paragraph)
        yield from re.split(r"(?<=[.:;?!])\)?\s+", words)


def faults(path: Path) -> list[str]:
    found = []
    for place, text, public in docstrings(path):
        for sentence in sentences(text):
            if BAD_BEGIN.match(sentence):
                found.append(f"{place} begins with {sentence.split()[0]!r}: {sentence}")
            elif public and len(sentence.split()) > LONGEST:
                found.append(f"{place} has {len(sentence.split())} words: {sentence}")
    return found


@pytest.mark.parametrize("room", sorted({p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES}))
def test_sentences_are_plain(room):
    files = [path for path in FILES if path.relative_to(ROOT).parts[0].removesuffix(".py") == room]
    assert files
    assert [fault for path in files for fault in faults(path)] == []


def test_faults_are_seen(tmp_path, monkeypatch):
    """What the rules are for, in an entry, an attribute, a sentence of its own and a long one."""
    path = tmp_path / "bad.py"
    long = " ".join(["word"] * (LONGEST + 1))
    path.write_text(
        f'"""Fine.\n\nOf all, one. {long}.\n\n    an equation {long}\n"""\n\nX = 1\n"""Whose."""\n\n\n'
        'def f(a):\n    """Returns it.\n\n    Args:\n        a: Of the plane.\n\n    Returns:\n        What: it is.\n    """\n'
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [re.sub(r".*? (begins|has)", r"\1", fault.split(":")[1].strip()) for fault in faults(path)] != []
    told = "\n".join(faults(path))
    assert told.count("begins with 'Of'") == 2
    assert "begins with 'Whose." in told
    assert "begins with 'What:" in told
    assert f"has {LONGEST + 1} words" in told
    assert "equation" not in told
