"""The site is built without a warning, the code of its pages runs, and the commands that they show exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from commands import python
from microglia.cli.app import app
from microglia.cli.listed import COMMANDS
from microglia.lab.recipe import Recipe, method_config

ROOT = Path(__file__).parent.parent.parent
PAGES = ("start", "roads", "own", "tracking", "hub", "cluster", "gpu", "faq", "migration")
"""Pages whose code runs here from the first line to the last."""
INTRODUCED = [
    f"{folder}/{path.stem}" for folder in ("task", "family") for path in sorted((ROOT / "docs" / folder).glob("*.md"))
]
INTRODUCED.append("choose")
"""Pages for newcomers, one for each task and family; their commands are checked to the last option."""


def text(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text()


def code(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the site, and what the builder said."""
    pytest.importorskip("material", reason="the site needs pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="the site needs pip install '.[docs]'")
    place = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=quiet, check=False)
    assert done.returncode == 0, done.stderr
    return place, done.stdout + done.stderr


def test_the_site_is_built_without_a_warning(built: tuple[Path, str]) -> None:
    place, said = built
    assert "WARNING" not in said
    assert "ERROR" not in said
    wanted = [name for part in nav() for name in part]
    assert len(wanted) > 30
    missing = [name for name in wanted if not _page(place, name).is_file()]
    assert missing == []


def test_no_page_of_the_documents_is_left_out_of_the_menu() -> None:
    listed = {name for part in nav() for name in part}
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert there == listed


def test_the_reference_is_made_of_the_docstrings(built: tuple[Path, str]) -> None:
    page = _page(built[0], "reference/verbs.md").read_text()
    for verb in ("prune_channels", "accelerate", "shrink", "execute", "push"):
        assert re.search(rf'id="microglia\.[\w.]*\b{verb}"', page), verb
    assert "huggingface_hub" in page  # an error that a docstring names
    assert "&gt;&gt;&gt;" not in re.sub(r"<(pre|code).*?</\1>", "", page, flags=re.DOTALL)  # examples are code


def test_the_site_asks_no_other_machine_for_fonts(built: tuple[Path, str]) -> None:
    assert not re.search(r'(?:src|href)="https?://[^"]*(?:font|cdn|unpkg)', (built[0] / "index.html").read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if page != "hub" and "```python" in text(page)])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    done = python(code(page), tmp_path)
    assert done.status == 0, done.err


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("uvicorn")
    words = [sys.executable, str(ROOT / "tests" / "hub_server.py"), str(tmp_path_factory.mktemp("hub"))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


def test_the_code_of_the_page_of_the_hub_runs(hub: str, tmp_path: Path) -> None:
    before = f"""
import os
os.environ |= {{"HF_ENDPOINT": {hub!r}, "HF_TOKEN": "good"}}
from huggingface_hub import constants
constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = {str(tmp_path / "cache")!r}, False, True
import torch
import microglia as mg
from microglia.tasks import build
saved = build("lenet-300-100", classes=10, shape=(1, 28, 28))
mg.save(saved, "runs/a")
"""
    after = "\nassert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved.state_dict().values()))\n"
    done = python(before + code("hub") + after, tmp_path)
    assert done.status == 0, done.err


@pytest.mark.parametrize("page", [*PAGES, *INTRODUCED])
def test_the_commands_of_a_page_exist(page: str) -> None:
    found = text(page)
    commands = re.findall(r"(?:^|`|-m )microglia ([a-z][\w-]*)", found, re.MULTILINE)
    assert [name for name in commands if name not in COMMANDS] == []
    scripts = re.findall(r"python (\S+\.py)", found)
    assert [name for name in scripts if not (ROOT / name).is_file()] == []
    checker = compare()
    assert [why for shown in re.findall(r"`(tests/\w+/\w+\.py(?:::\w+)?)`", found) if (why := checker.wrong(shown))] == []


class Resolved(Exception):
    """A command came as far as its recipe, which is whole."""


@pytest.mark.parametrize("page", INTRODUCED)
def test_each_command_that_prunes_has_a_whole_recipe(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(recipe: Recipe, *_: object, **__: object) -> None:
        method_config(recipe)  # every setting of the method is known and fits
        raise Resolved

    monkeypatch.setattr("microglia.cli.commands.execute", execute)
    lines = [shlex.split(line) for line in re.findall(r"^microglia prune .*", text(page), re.MULTILINE)]
    assert lines, "a page begins with a command"
    for _, *words in lines:
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, Resolved), (words, done.output, done.exception)


@pytest.mark.parametrize("page", INTRODUCED)
def test_the_other_commands_have_the_options_that_a_page_names(page: str) -> None:
    for line in re.findall(r"^microglia (?!prune).*", text(page), re.MULTILINE):
        _, name, *words = shlex.split(line)
        helped = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        assert [word for word in words if word.startswith("--") and word not in helped] == [], line


def test_every_question_says_what_shows_the_answer() -> None:
    answers = re.findall(r"^\*\*.*?(?=^\*\*|^## |\Z)", text("faq"), re.MULTILINE | re.DOTALL)
    assert len(answers) == len(compare().listed()["pains"]) == 25
    bare = [answer.split("**")[1] for answer in answers if not re.search(r"`[^`]+`|\]\(", answer)]
    assert bare == []


class TestCompare:
    def test_each_y_is_shown_by_what_exists(self) -> None:
        assert compare().faults(compare().listed()) == []

    def test_the_page_is_the_one_of_the_list(self) -> None:
        assert text("compare") == compare().page(compare().listed())

    def test_all_of_the_field_is_there(self) -> None:
        parts = compare().listed()
        assert {part: len(rows) for part, rows in parts.items()} == {"features": 44, "pains": 25}
        assert len({row["name"] for rows in parts.values() for row in rows}) == 69

    @pytest.mark.parametrize(
        ("row", "why"),
        [
            ({"state": "y", "shown": []}, "nothing shows it"),
            ({"state": "p", "shown": ["make test"]}, "what is missing"),
            ({"state": "yes", "shown": ["make test"]}, "one of y, p and -"),
            (
                {"state": "y", "shown": ["tests/unit/test_report.py::test_that_nobody_wrote"]},
                "has no test test_that_nobody_wrote",
            ),
            ({"state": "y", "shown": ["tests/unit/test_nowhere.py"]}, "there is no file"),
            ({"state": "y", "shown": ["python benchmarks/nowhere.py"]}, "there is no script"),
            ({"state": "y", "shown": ["microglia fly"]}, "there is no command fly"),
            ({"state": "y", "shown": ["believe me"]}, "neither a test nor a command"),
        ],
    )
    def test_a_claim_without_a_proof_is_seen(self, row: dict, why: str) -> None:
        (said,) = compare().faults({"features": [{"name": "wings", **row}]})
        assert said.startswith("wings: ")
        assert why in said


def nav() -> list[list[str]]:
    config = (ROOT / "mkdocs.yml").read_text()
    parts = yaml.safe_load(config)["nav"]
    return [[name for entry in entries for name in entry.values()] for part in parts for entries in part.values()]


def _page(place: Path, name: str) -> Path:
    plain = name.removesuffix(".md")
    return place / "index.html" if plain == "index" else place / plain / "index.html"


def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
