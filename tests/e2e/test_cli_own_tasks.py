"""Tasks of the user's own on the command line: `task=module:function`, run, evaluated, remembered, and trusted or refused."""

import json

import pytest

from commands import microglia, refused

TASKS = '''
import torch
from torch import nn
import microglia as mg

def scenes(count, seed):
    """Images with a bright square, and the mask of the square."""
    generator = torch.Generator().manual_seed(seed)
    images, masks = torch.rand(count, 1, 8, 8, generator=generator) * 0.6, torch.zeros(count, 1, 8, 8)
    for number in range(count):
        row, column = torch.randint(0, 4, (2,), generator=generator).tolist()
        masks[number, :, row : row + 4, column : column + 4] = 1.0
    return torch.utils.data.TensorDataset(images + masks * 0.8, masks)

def dice(outputs, masks):
    found = outputs.sigmoid()
    return (2 * (found * masks).sum((1, 2, 3)) + 1) / ((found + masks).sum((1, 2, 3)) + 1)

def squares(width: int = 8):
    train, test = scenes(32, 1), torch.utils.data.DataLoader(scenes(16, 2), batch_size=8)
    def build():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(width, 1, 1))
    return mg.Task("squares", build, mg.tasks.loaders(train=train, validation=test, test=test),
                   lambda o, m: 1 - dice(o, m).mean(), {"dice": mg.tasks.mean_metric(dice)}, torch.zeros(1, 1, 8, 8),
                   kind="segmentation")
'''

QUICK = ("dense.epochs=3", "dense.batch_size=8", "train.epochs=2", "train.batch_size=8", "train.distill=0", "threads=1")
QUICK += ("measure.latency=false", "prune.density=0.5")


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "mytasks.py").write_text(TASKS)
    return folder


def test_a_segmentation_of_ones_own_is_pruned_shrunk_evaluated_and_reported(work, tmp_path):
    words = ("task=mytasks:squares", "task_options.width=16", "--method", "magnitude", "--pattern", "channel", *QUICK)
    done = microglia("prune", *words, "--out", tmp_path / "run", "--json", folder=work)
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert (result["task"], list(result["pruned"]["metrics"])) == ("squares", ["dice"])
    told = json.loads((tmp_path / "run" / "environment.json").read_text())["code"]
    assert told == {"module": "mytasks", "folder": str(work)}
    again = microglia("prune", *words, "--out", tmp_path / "run", "--json", folder=work)
    assert json.loads(again.out) == result  # the finished run is known
    shrunk = microglia("shrink", tmp_path / "run", "--no-latency", "--trust", "--json", folder=work)
    assert shrunk.status == 0, shrunk.err
    assert json.loads(shrunk.out)["shrunk"]["metrics"]["dice"] == pytest.approx(result["pruned"]["metrics"]["dice"], abs=1e-5)
    seen = microglia("eval", tmp_path / "run", "--trust", "--json", folder=work)
    assert json.loads(seen.out) == pytest.approx(result["pruned"]["metrics"])
    assert microglia("report", tmp_path / "run", "--out", tmp_path / "report", folder=work).status == 0


def test_a_file_that_names_a_task_is_trusted_or_refused_before_anything_is_imported(work, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mytasks.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n" + TASKS)
    (elsewhere / "recipe.yaml").write_text("task: mytasks:squares\ntask_options: {width: 4}\n")
    words = ("prune", "--recipe", "recipe.yaml", *QUICK, "--out", tmp_path / "run")
    refused(microglia(*words, folder=elsewhere), "names the task 'mytasks:squares'", "--trust")
    assert not (tmp_path / "imported").exists()
    assert microglia(*words, "--trust", folder=elsewhere).status == 0
    (tmp_path / "imported").unlink()
    refused(microglia("eval", tmp_path / "run", folder=work), "the task 'mytasks:squares'", str(elsewhere), "--trust")
    assert not (tmp_path / "imported").exists()
    assert microglia("eval", tmp_path / "run", "--trust", folder=work.parent).status == 0  # from the folder it remembers
    assert (tmp_path / "imported").exists()


def test_words_that_do_not_fit_end_in_a_sentence(work):
    refused(microglia("prune", "task=mytasks:squares", "task_options.wdith=4", *QUICK, folder=work), "squares(width", "wdith")
    refused(microglia("prune", "task=mytasks:square", *QUICK, folder=work), "Did you mean 'squares'")
    refused(microglia("prune", "task=mytasks:squares", "--data", "digits", *QUICK, folder=work), "task_options")
