"""The command line as a user runs it: what it prints, what it keeps, and one clear sentence for everything wrong."""

import json
import re
from dataclasses import fields

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

import microglia as mg
from commands import LIMIT, TINY, microglia, refused, start, weights
from microglia.cli.app import app
from microglia.lab.recipe import as_dict, resolve
from microglia.train.optim import FitConfig

COLUMN = {"metrics", "parameters", "macs", "bytes"}
RESULT = {"recipe", "environment", "asked", "masks", "dense", "before", "pruned", "latency", "seconds"}


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("run")
    outcome = microglia("prune", *TINY, "--out", folder / "run", "--json", folder=folder / "work")
    assert outcome.status == 0, outcome.err
    return folder / "run", json.loads(outcome.out)


def good(outcome):
    assert outcome.status == 0, outcome
    assert "Traceback" not in outcome.err
    return outcome.out


def test_prune_prints_the_documented_json_and_keeps_it(run):
    directory, result = run
    assert set(result) >= RESULT
    for name in ("dense", "before", "pruned"):
        assert set(result[name]) >= COLUMN
        assert set(result[name]["metrics"]) == {"accuracy", "top5", "loss"}
    assert result["asked"] == {"density": 0.2, "params": None}
    assert result["masks"] == {"kept": 10_040, "total": 50_200}
    assert result["latency"] is None
    assert result["pruned"]["metrics"]["accuracy"] > 0.8
    assert result == json.loads((directory / "result.json").read_text())
    assert result["recipe"] == yaml.safe_load((directory / "recipe.yaml").read_text())
    assert json.loads((directory / "environment.json").read_text())["torch"] == torch.__version__
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["epoch"]) for row in rows] == [("dense", 1), ("dense", 2), *(("train", e) for e in (1, 2, 3))]
    assert mg.masks_of(mg.load(directory / "model")).kept == 10_040


def test_prune_prints_tables_for_people(work, run):
    out = good(microglia("prune", *TINY, "--out", run[0], folder=work))
    assert "lenet-300-100 on digits: magnitude, unstructured, global" in out
    assert "kept 10,040 of 50,200 = 0.2 of the prunable weights" in out
    assert f"Model: {run[0] / 'model'}" in out


def test_a_run_has_a_directory_of_its_own(work):
    words = ("prune", *TINY, "dense.epochs=1", "train.epochs=1")
    assert "Run: runs/lenet-300-100-digits-magnitude-" in good(microglia(*words, folder=work))
    (directory,) = (work / "runs").iterdir()
    times = {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}
    good(microglia(*words, folder=work))
    assert [*(work / "runs").iterdir()] == [directory]
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")} == times


def test_a_recipe_does_what_the_options_do(work, run, tmp_path):
    recipe = {"model": "lenet-300-100", "data": "digits", "prune": {"density": 0.5}, "seed": 3, "dense": {"epochs": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"measure": {"latency": False}, "threads": 4}))
    words = ("--recipe", tmp_path / "recipe.yaml", "--density", "0.2", "train.epochs=3", "train.lr=0.1", "threads=1")
    result = json.loads(good(microglia("prune", *words, "--out", tmp_path / "run", "--json", folder=work)))
    assert result["recipe"] == run[1]["recipe"]
    assert weights(tmp_path / "run") == weights(run[0])


def test_options_reach_the_recipe(work, tmp_path):
    words = ("conv-2", "--method", "gradual", "--pattern", "block:4x1", "--scope", "layer", "--params", "0.5")
    words += ("--layers", "type:Conv2d", "--layers", "classifier.0", "--exclude", "features.0", "--protect", "features.2")
    words += ("--epochs", "1", "--lr", "0.01", "--seed", "5", "--device", "cpu", "prune.updates=3", "train.batch_size=512")
    words += ("dense.epochs=0", "measure.latency=false", "threads=1")
    result = json.loads(good(microglia("prune", *words, "--out", tmp_path / "run", "--json", folder=work)))
    recipe = result["recipe"]
    assert recipe["prune"] | {
        "pattern": "block:4x1", "scope": "layer", "params": 0.5, "density": None, "updates": 3,
        "layers": ["type:Conv2d", "classifier.0"], "exclude": ["features.0"], "protect": ["features.2"],
    } == recipe["prune"]  # fmt: skip
    assert (recipe["train"]["epochs"], recipe["train"]["lr"], recipe["seed"], recipe["device"]) == (1, 0.01, 5, "cpu")
    masks = mg.masks_of(mg.load(tmp_path / "run" / "model"))
    assert list(masks) == ["features.2.weight", "classifier.0.weight"]
    assert masks["features.2.weight"].all()
    kept = masks["classifier.0.weight"].unflatten(0, (-1, 4))
    assert torch.equal(kept.all(1), kept.any(1))
    assert result["pruned"]["parameters"]["nonzero_all"] == pytest.approx(0.5 * result["dense"]["parameters"]["all"], rel=0.01)


def test_density_1_is_the_dense_control(work, tmp_path):
    words = ("prune", *TINY, "--density", "1", "--out", tmp_path / "run", "--json")
    result = json.loads(good(microglia(*words, folder=work)))
    assert result["masks"]["kept"] == result["masks"]["total"]
    assert result["before"]["metrics"] == result["dense"]["metrics"]


def test_a_checkpoint_spares_the_dense_training(work, run, tmp_path):
    model = mg.fold(mg.load(run[0] / "model"))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    words = ("prune", *TINY, "--checkpoint", tmp_path / "weights.pt", "normalize=half", "--out", tmp_path / "run", "--json")
    result = json.loads(good(microglia(*words, folder=work)))
    expected = mg.evaluate(model, mg.tasks.image_task("lenet-300-100", "digits", normalize="half"))
    assert result["dense"]["metrics"] == pytest.approx(expected, rel=1e-5)
    assert not (tmp_path / "run" / "stages" / "dense.safetensors").exists()


@pytest.mark.parametrize("below", [".", "model"])
def test_eval_gives_the_accuracy_of_the_result(work, run, below):
    metrics = json.loads(good(microglia("eval", run[0] / below, "--json", folder=work)))
    assert metrics == run[1]["pruned"]["metrics"]
    assert f"{metrics['accuracy']:.4f}" in good(microglia("eval", run[0] / below, folder=work))


def test_eval_of_another_split(work, run):
    row = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads(good(microglia("eval", run[0], "--split", "validation", "--json", folder=work)))
    assert found["accuracy"] == pytest.approx(row["validation_accuracy"])
    refused(microglia("eval", run[0], "--split", "all", folder=work), "train, validation or test", "'all'")


@pytest.mark.parametrize("below", [".", "model"])
def test_measure_gives_the_numbers_of_the_result(work, run, below):
    measured = json.loads(good(microglia("measure", run[0] / below, "--no-latency", "--json", folder=work)))
    for name in ("parameters", "macs", "bytes"):
        assert measured[name] == run[1]["pruned"][name]


def test_the_size_of_the_file_that_was_written_is_told(work, run):
    size = (run[0] / "model" / "model.safetensors").stat().st_size
    assert run[1]["saved"] == size > run[1]["pruned"]["bytes"]["raw"]
    assert json.loads(good(microglia("measure", run[0], "--no-latency", "--json", folder=work)))["saved"] == size
    shown = good(microglia("measure", run[0], "--no-latency", folder=work))
    assert f"{size:,}" in shown[shown.index("bytes of the saved") :]
    assert json.loads(good(microglia("measure", "lenet-5", "--no-latency", "--json", folder=work)))["saved"] is None


def test_measure_a_network_by_name(work):
    measured = json.loads(good(microglia("measure", "resnet20", "--no-latency", "--json", folder=work)))
    assert measured["parameters"]["all"] > 260_000
    assert "MACs" in good(microglia("measure", "resnet20", "--no-latency", folder=work))


def test_methods(work):
    found = json.loads(good(microglia("methods", "--json", folder=work)))
    assert {"magnitude", "gradient", "random", "gradual"} <= set(found["methods"])
    assert {"magnitude", "gradient", "random"} <= set(found["scores"])
    assert found["methods"]["gradual"]["defaults"]["schedule"] == "cubic"
    table = good(microglia("methods", folder=work))
    assert all(name in table for name in found["methods"])


def test_recipe_prints_every_default_and_can_be_run(work, run, tmp_path):
    words = ("model=lenet-300-100", "prune.density=0.2", "seed=3", "dense.epochs=2", "train.epochs=3", "train.lr=0.1")
    text = good(microglia("recipe", *words, "measure.latency=false", "threads=1", folder=work))
    assert as_dict(resolve(yaml.safe_load(text))) == run[1]["recipe"]  # which leaves out later fields at their defaults
    assert yaml.safe_load(text)["train"].keys() == {field.name for field in fields(FitConfig)}
    (tmp_path / "recipe.yaml").write_text(text)
    assert yaml.safe_load(good(microglia("recipe", tmp_path / "recipe.yaml", folder=work))) == yaml.safe_load(text)
    good(microglia("prune", "--recipe", tmp_path / "recipe.yaml", "--out", run[0], folder=work))


def test_recipe_schema(work):
    schema = json.loads(good(microglia("recipe", "--schema", folder=work)))
    assert {"model", "data", "method", "prune", "dense", "train", "measure", "seed"} <= set(schema["properties"])
    schema = json.loads(good(microglia("recipe", "method=gradual", "--schema", "--json", folder=work)))
    assert "updates" in schema["properties"]["prune"]["properties"]


@pytest.mark.slow
def test_demo(work):
    """Three roads, each timed, counted and tested; save and load are proved to be equal."""
    done = start("demo", "--out", "demo", folder=work, compiler=True).end(3 * LIMIT)
    good(done)
    assert "bit for bit" in done.out
    result = json.loads((work / "demo" / "result.json").read_text())
    assert result["masks"]["kept"] == pytest.approx(0.1 * result["masks"]["total"], rel=1e-3)
    assert result["pruned"]["metrics"]["accuracy"] > 0.9
    assert set(result["latency"]["timings"]) == {"dense", "pruned"}
    channels, blocks = (json.loads((work / "demo" / road / "result.json").read_text()) for road in ("channels", "blocks"))
    assert channels["pruned"]["macs"]["total"] <= 0.26 * channels["dense"]["macs"]["total"]
    assert channels["pruned"]["bytes"]["raw"] < 0.5 * channels["dense"]["bytes"]["raw"]
    assert result["pruned"]["bytes"]["zipped"] < 0.2 * result["dense"]["bytes"]["zipped"]
    assert blocks["masks"]["kept"] == pytest.approx(0.2 * blocks["masks"]["total"], rel=0.02)
    assert all(road["dense"]["metrics"] == result["dense"]["metrics"] for road in (channels, blocks))
    assert all(road["pruned"]["metrics"]["accuracy"] > 0.9 for road in (channels, blocks))
    rows = [line for line in done.out.splitlines() if line.startswith(("│ dense", "│ masks", "│ channels", "│ blocks"))]
    assert len(rows) == 4
    assert all(len(re.findall(r"[\d,.]*\d", row)) >= 3 for row in rows)  # accuracy, bytes and milliseconds


COMMANDS = (
    *("prune", "shrink", "eval", "measure", "routes", "shifts", "connect", "surface", "descent", "tickets", "instability"),
    *("sweep", "report", "demo", "methods", "recipe"),
)


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_help(work, words):
    outcome = microglia(*words, folder=work)
    assert outcome.status == (0 if words else 2)
    assert "Usage:" in outcome.out + outcome.err
    assert all(f" {name} " in outcome.out + outcome.err for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name):
    outcome = CliRunner().invoke(app, [name, "--help"])  # in this process: a new one takes seconds for its imports
    assert outcome.exit_code == 0
    assert f" {name} " in outcome.output


WRONG = {
    "unknown model": (("resnet21x",), "There is no model named 'resnet21x'", "resnet20"),
    "unknown timm model": (("timm:nothing-like-it",), "nothing-like-it"),
    "model of no package": (("no_such_package.module:function",), "no_such_package"),
    "unknown method": (("--method", "magnitud"), "There is no method named 'magnitud'", "Did you mean", "'magnitude'"),
    "unknown data": (("--data", "digitz"), "There is no data set named 'digitz'", "'digits'"),
    "missing data folder": (("--data", "./nowhere"), "There is no folder nowhere"),
    "empty image folder": (("--data", "../empty"), "holds no images"),
    "class without images": (("--data", "../hollow"), "holds no images"),
    "unknown layer": (("--layers", "fc9"), "The selector 'fc9' meets no layer", "fc1.weight"),
    "unknown excluded layer": (("--exclude", "fc9"), "The selector 'fc9' meets no layer", "fc1.weight"),
    "unknown protected layer": (("--protect", "fc9"), "The selector 'fc9' meets no layer", "fc1.weight"),
    "all layers excluded": (("--exclude", "*"), "No layer is left to prune"),
    "density 0": (("--density", "0"), "density is the fraction kept, above 0 and at most 1; got 0"),
    "density above 1": (("--density", "1.5"), "density is the fraction kept, above 0 and at most 1; got 1.5"),
    "density in percent": (("--density", "20"), "Did you mean 0.2?"),
    "density nan": (("--density", "nan"), "density is the fraction kept"),
    "no density": (("prune.density=null",), "A budget needs at least one of density, params"),
    "params too small": (("--params", "0.001"), "params=0.001 cannot be met"),
    "missing checkpoint": (("--checkpoint", "../none.pt"), "There is no checkpoint", "none.pt"),
    "checkpoint is a folder": (("--checkpoint", "../empty"), "is a directory"),
    "checkpoint is text": (("--checkpoint", "../text.pt"), "text.pt"),
    "checkpoint of another network": (
        ("--checkpoint", "../other.pt"), "other.pt does not fit LeNet300100", "missing: fc1.weight", "unexpected: 0.weight",
    ),
    "pattern fits no layer": (("--pattern", "block:512x8"), "The pattern block:512x8 fits no layer"),
    "malformed pattern": (("--pattern", "block:4"), "The pattern 'block:4' is none of unstructured, block:OUTxIN"),
    "pattern without sides": (("--pattern", "block:0x4"), "A block needs positive sides"),
    "impossible N:M": (("--pattern", "nm:4:2"), "N:M keeps n of every m"),
    "N:M beside a budget": (("--pattern", "nm:2:4"), "nm:2:4 keeps 0.5 of the weights by itself"),
    "unknown scope": (("--scope", "world"), "scope", "'world'"),
    "unknown score": (("prune.score=magnitud",), "There is no score named 'magnitud'"),
    "unknown key": (("epochz=3",), "epochz: there is no such field"),
    "unknown nested key": (("train.epochz=3",), "train.epochz: there is no such field"),
    "unknown key of the method": (("prune.densety=3",), "densety: there is no such field"),
    "key below a value": (("seed.value=3",), "seed: Input should be a valid integer"),
    "override without =": (("train.epochs",), "Overrides look like key=value", "'train.epochs'"),
    "override without a key": (("=3",), "Overrides look like key=value"),
    "override that is no YAML": (("train.epochs=[",), "train.epochs=["),
    "wrong type": (("train.epochs=many",), "train.epochs", "'many'"),
    "negative epochs": (("--epochs", "-1"), "epochs must be at least 0; got -1"),
    "batch of none": (("train.batch_size=0",), "batch_size must be at least 1"),
    "negative momentum": (("train.momentum=-1",), "momentum"),
    "nesterov without momentum": (("train.nesterov=true", "train.momentum=0"), "momentum"),
    "clip to nothing": (("train.clip=0",), "clip"),
    "label smoothing": (("label_smoothing=2",), "label_smoothing"),
    "no threads": (("threads=0",), "threads"),
    "huge seed": (("seed=100000000000000000000000",), "seed"),
    "unknown normalization": (("normalize=imagenot",), "imagenot"),
    "image size": (("image_size=0",), "image_size"),
    "unknown device": (("--device", "tpu"), "device", "'tpu'"),
    "missing recipe": (("--recipe", "../none.yaml"), "Cannot read the recipe", "none.yaml"),
    "recipe is no YAML": (("--recipe", "../broken.yaml"), "broken.yaml is not valid YAML"),
    "recipe is a list": (("--recipe", "../list.yaml"), "A recipe is a mapping", "list.yaml holds a list"),
    "recipe is binary": (("--recipe", "../binary.yaml"), "binary.yaml"),
    "schedule": (("--method", "gradual", "prune.schedule=cubist"), "There is no schedule named 'cubist'"),
    "gradual from end to begin": (("--method", "gradual", "prune.begin=0.9", "prune.end=0.1"), "begin 0.9, end 0.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_clear_sentence(work, tmp_path, case):
    words, *texts = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "list.yaml").write_text("- model\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    torch.save(nn.Sequential(nn.Linear(3, 2)).state_dict(), tmp_path / "other.pt")
    model = () if "=" not in words[0] and not words[0].startswith("-") and "model" in case else ("lenet-300-100",)
    budget = () if "density" in case or "params" in case else ("--density", "0.3")
    outcome = microglia("prune", *model, *budget, *words, "measure.latency=false", "--out", tmp_path / "run", folder=work)
    refused(outcome, *texts)
    assert outcome.out == ""
    assert not (tmp_path / "run").exists()
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("prune", "lenet-300-100", "--density", "abc"), ("--density", "valid number")),
        (("prune", "--densty", "0.1"), ("--densty",)),
        (("prune", "--seed", "1.5"), ("--seed", "valid integer")),
        (("eval",), ("Missing argument",)),
        (("prun",), ("prun",)),
    ],
)
def test_wrong_usage_ends_in_status_2(work, words, texts):
    outcome = microglia(*words, folder=work)
    refused(outcome, *texts, status=2)
    assert not list(work.iterdir())


@pytest.mark.parametrize("command", ["eval", "measure"])
def test_wrong_targets(work, tmp_path, command):
    (tmp_path / "empty").mkdir()
    refused(microglia(command, tmp_path / "empty", folder=work), "is neither a run directory (recipe.yaml) nor a saved model")
    refused(microglia(command, "resnet21x", folder=work), "no run directory, saved model or network named 'resnet21x'")
    mg.save(nn.Linear(2, 2), tmp_path / "mine")
    refused(microglia(command, tmp_path / "mine", folder=work), "does not say which network it is")
    (tmp_path / "mine" / "plan.json").write_text("{")
    refused(microglia(command, tmp_path / "mine", folder=work), "plan.json is damaged")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: conv-2\nprune: {density: 0.5}\n")
    refused(microglia(command, tmp_path / "run", folder=work), "has no model yet")


def test_errors_as_json(work):
    outcome = microglia("prune", "resnet21x", "--density", "0.5", "--json", folder=work)
    refused(outcome, "There is no model named")
    assert json.loads(outcome.out)["error"].startswith("There is no model named 'resnet21x'")


def test_channels_are_permuted_before_masks_are_attached(work):
    words = (*TINY, "--pattern", "block:16x1", "--permute")
    result = json.loads(good(microglia("prune", *words, "--out", "run", "--json", folder=work)))
    order = result["permutation"]
    assert result["recipe"]["prune"]["permute"] is True
    assert order["after"] > order["before"]
    assert order["error"] < 1e-9
    assert sorted(order["layers"]) == sorted(result["densities"])
    assert all(0 < layer["after"] <= layer["total"] for layer in order["layers"].values())
    kept = mg.masks_of(mg.load(work / "run" / "model"))
    assert kept.kept == result["masks"]["kept"]
    evaluated = json.loads(good(microglia("eval", "run", "--json", folder=work)))
    assert evaluated == result["pruned"]["metrics"]
    assert "of |w|, not" in good(microglia("prune", *words, "--out", "run", folder=work))


def test_permuting_is_refused_where_it_means_nothing(work):
    refused(microglia("prune", *TINY, "--permute", folder=work), "such as block:16x1", "unstructured does not ask")
    words = ("prune", *TINY, "--method", "channels", "--permute")
    refused(microglia(*words, folder=work), "--permute is an option of the methods", "the method here is channels")
    assert not (work / "runs").exists()
