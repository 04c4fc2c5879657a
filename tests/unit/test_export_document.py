"""The examples of docs/deploy.md run, one after the other, as a user pastes them; its table is a generated one."""

import re

from test_front_documents import ROOT, blocks, runs

from microglia.export import targets

BEFORE = """
import torch
from torch import nn
from microglia.zoo.external import import_torchvision
import_torchvision()
import microglia as mg
torch.manual_seed(0)
layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4)).eval()
example, test_inputs = torch.randn(1, 3, 16, 16), [torch.randn(5, 3, 16, 16)]
small = mg.prune_channels(model, example, mg.Budget(flops=0.5))
wanted = small(example).detach()
def check():
    torch.testing.assert_close(torch.as_tensor(outputs), wanted, rtol=0, atol=1e-4)
"""


def test_the_examples_run(tmp_path):
    parts = blocks("docs/deploy.md")
    code = "\n".join(part + ("check()\n" if "outputs" in part else "") for part in parts)
    assert code.count("check()") == 3
    printed = runs(BEFORE + code, tmp_path)
    assert "ONNX Runtime" in printed
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.onnx", "any_size.onnx", "model.xml", "model.bin", "model.pte", "model.pt2", "bert", "model.numpy",
        "fast", "uneven",
    }  # fmt: skip


def test_every_target_has_its_row_and_the_table_its_rows():
    text = (ROOT / "docs" / "deploy.md").read_text()
    for name, target in targets.items():
        assert re.search(rf"^\| .* \| `{name}` \| .*{re.escape(target.suffix)}", text, re.MULTILINE)
    table = text.partition("<!-- export table: begin -->")[2].partition("<!-- export table: end -->")[0]
    models = re.findall(r"^\| (\w[^|]*?) \|.*\| ([\d.]+x) \|$", table, re.MULTILINE)
    assert [name for name, _ in models] == list(dict.fromkeys(name for name, _ in models)), "each model once"
