"""What a report and the command line call a number: bytes, one dense model, images that a checkpoint may have seen."""

import pytest
import torch
from test_report import curves, result, save
from typer.testing import CliRunner

from microglia.cli.app import app
from microglia.report.page import page
from microglia.report.rows import groups
from microglia.report.summary import result_table
from microglia.report.table import markdown
from microglia.report.write import read_results
from microglia.tasks.task import SEEN
from microglia.zoo import build


def told(folder):
    found = read_results([folder])
    return found, groups(found.records)


def test_one_checkpoint_is_one_dense_model_however_a_setting_is_spelled(tmp_path):
    for name, normalize, params in (("a", "auto", 0.5), ("b", "imagenet", 0.25)):
        save(tmp_path / name, result(params=params, checkpoint="net.th", normalize=normalize))
    (group,) = told(tmp_path)[1]
    (dense,) = group.baselines
    assert (dense.settings, len(dense.records)) == ("", 2)


def test_one_checkpoint_that_measures_otherwise_is_another_dense_model(tmp_path):
    for name, normalize, accuracy in (("a", "auto", 0.92), ("b", "imagenet", 0.7)):
        save(tmp_path / name, result(params=0.5, checkpoint="net.th", normalize=normalize, dense=accuracy))
    (group,) = told(tmp_path)[1]
    assert sorted(row.settings for row in group.baselines) == ["normalize=auto", "normalize=imagenet"]


def test_bytes_are_said_to_be_of_the_weights_alone(tmp_path):
    save(tmp_path / "a", result())
    found, tasks = told(tmp_path)
    assert "*bytes*: size of the weights alone" in markdown(found, tasks, [])
    labels = [str(cell) for cell in result_table(found_result()).columns[0].cells]
    assert {"bytes of the weights alone, raw", "bytes of the weights alone, zipped"} <= set(labels)


def found_result():
    return {**result(), "asked": {"params": 0.5}, "masks": {"kept": 1, "total": 2}}


def test_the_page_keeps_its_first_column(tmp_path):
    save(tmp_path / "a", result())
    text = page(*told(tmp_path))
    assert "tr > :first-child { position: sticky; left: 0;" in text


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_precision_of_nothing_accelerated_is_refused(precision, capsys):
    with pytest.raises(SystemExit):
        app(["measure", "lenet-5", "--data", "digits", "--no-latency", "--precision", precision])
    assert f"--precision {precision} applies to the accelerated model" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["net.th", None])
def test_validation_numbers_of_a_checkpoint_say_that_it_may_have_seen_the_images(tmp_path, checkpoint):
    save(tmp_path / "a", result(checkpoint=checkpoint), curves())
    assert (f"training. {SEEN}" in page(*told(tmp_path))) == (checkpoint is not None)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_eval_of_a_checkpoint_says_it_too(tmp_path, split):
    torch.save(build("lenet-5", classes=10, shape=(1, 8, 8)).state_dict(), tmp_path / "net.pt")
    words = ["eval", "lenet-5", "--data", "digits", "--split", split]
    for checkpoint in ([], ["--checkpoint", str(tmp_path / "net.pt")]):
        outcome = CliRunner().invoke(app, [*words, *checkpoint])
        assert outcome.exit_code == 0
        assert (SEEN in " ".join(outcome.output.split())) == bool(checkpoint and split != "test")
