"""The examples of README.md and CONTRIBUTING.md run, each kind by a process of its own, for they register names."""

import re
from pathlib import Path

import pytest

from commands import python

ROOT = Path(__file__).parent.parent.parent


def blocks(document: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def runs(code: str, folder: Path) -> str:
    done = python(code, folder)
    assert done.status == 0, done.err
    return done.out


def test_readme_loop(tmp_path):
    """As a user pastes it: his model, loader, loss and optimizer, and the five lines."""
    (loop,) = blocks("README.md")
    before = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
loader = [(torch.randn(8, 1, 8, 8), torch.randint(0, 16, (8,))) for _ in range(4)]
epochs, loss_fn = 1, nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
    after = """
from copy import deepcopy
masks = mg.masks_of(model)
assert masks.kept <= 0.3 * masks.total + 16 * 8, (masks.kept, masks.total)
torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
again = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
again = mg.load("pruned/", again)
assert torch.equal(again(x), model(x))
"""
    runs(before + loop + after, tmp_path)


def test_contributing(tmp_path):
    """A score, a method, a model, a command, an observation, its section, a study, from outside, through the command line."""
    found = {block.splitlines()[0].rpartition("/")[2]: block for block in blocks("CONTRIBUTING.md")}
    assert set(found) == {"squared.py", "twice.py", "mine.py", "commands.py", "codes.py", "norms.py"}
    code = "\n".join(found.values())
    code += """
import sys
from microglia.cli.app import app

def microglia(*words):
    try:
        app(list(words), prog_name="microglia")
    except SystemExit as end:
        assert not end.code, words

short = ("dense.epochs=1", "dense.max_batches=2", "train.epochs=1", "train.max_batches=2", "measure.latency=false")
words = ("prune", "my-net", "--data", "digits", "--method", "twice", "--density", "0.25", "prune.score=squared")
microglia(*words, *short, "--out", "run")
microglia("parameters", "my-net")
microglia("norms", "my-net", "--powers", "1,3", "--out", "normed")

import json
from pathlib import Path

result = Path("run/result.json")
result.write_text(json.dumps({**json.loads(result.read_text()), "codes": {"bits": 4}}))
microglia("report", "run", "--out", "told")
"""
    told = runs(code, tmp_path)
    assert "twice" in told
    assert "my-net: 650 parameters" in told
    assert "my-net on digits: norm of power 3 is" in told
    assert (tmp_path / "normed" / "norms-powers.html").is_file()
    assert "| twice | 4 |" in (tmp_path / "told" / "results.md").read_text()
    assert {path.name for path in (tmp_path / "run" / "stages").iterdir()} >= {
        "prune-half.safetensors",
        "train-full.safetensors",
    }


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_and_scripts_exist(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    scripts = re.findall(r"python (benchmarks/\w+\.py)", text)
    assert links or scripts
    missing = [name for name in [*links, *scripts] if not (ROOT / name).exists()]
    assert not missing


PRINTED = {
    "export_speed": "export_speed.txt",
    "shrink_speed": "shrink_speed.txt",
    "resnet50_end_to_end": "speed.md",
}
"""Script in `benchmarks` -> document with its output."""


def test_readme_numbers_are_those_of_the_documents_they_come_from():
    """The table repeats what benchmarks printed; a new measurement changes both or fails here."""
    rows = re.findall(r"^\| (?:half|blocks).*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    source = ""
    for row in rows:
        if script := re.search(r"benchmarks/(\w+)\.py", row):  # "the same" in the rows after it
            source = (ROOT / "docs" / PRINTED[script[1]]).read_text()
        numbers = re.findall(r"[\d,]+\.\d+|\d,\d{3}", row.partition("|")[2].partition("|")[2])
        assert len(numbers) == 3
        for number in numbers:
            plain = number.replace(",", "")
            assert re.search(rf"(?<![\d.]){_near(plain)}(?!\d)", source), (row, number)


def _near(number: str) -> str:
    """Returns a pattern of a number as it was printed with more digits, rounded or cut to these."""
    whole, _, digits = number.partition(".")
    if not digits:
        return rf"(?:{int(whole) - 1}|{whole})\.\d+"
    last = int(digits[-1])
    options = {f"{digits[:-1]}{last}", f"{digits[:-1]}{max(0, last - 1)}"}
    return rf"{whole}\.(?:{'|'.join(sorted(options))})\d*"
