"""`--accelerate` as a user runs it: while pruning and afterwards, in words and as JSON."""

import json

import pytest

from commands import microglia

NET = ("lenet-5", "--data", "digits", "--pattern", "block:16x1", "--density", "0.3", "--seed", "3", "threads=1")
SHORT = ("dense.epochs=2", "train.epochs=2", "measure.executions=[eager,packed]", "measure.rounds=3", "measure.batch=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("accelerated")


@pytest.fixture(scope="module")
def result(folder):
    own = {"MICROGLIA_CACHE": str(folder / "cache")}
    outcome = microglia(
        "prune", *NET, *SHORT, "--accelerate", "--out", folder / "run", "--json", folder=folder / "work", environment=own
    )
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


def test_pruning_ends_with_the_fastest_exact_execution(result, folder):
    record = result["accelerated"]
    assert [layer["name"] for layer in record["layers"]]
    assert {"eager", "packed", "sparse"} <= set(record["times"])
    # Not the least of all: which sparse way it is was said by an earlier timing.
    assert record["times"][record["chosen"]] <= record["times"][record["best_dense"]]
    assert record["best_dense"] in ("eager", "packed", "dense, layer by layer")
    assert record["speedup"] >= 1
    assert record["batch"] == 2
    agreed = record["agreement"]
    assert agreed["images"] == agreed["equal"] == 359
    assert agreed["correct"][0] == agreed["correct"][1]
    assert agreed["difference"] < 1e-4
    assert "accelerated" in result["latency"]["timings"]["pruned"]
    assert result["recipe"]["measure"]["accelerate"] is True
    assert list((folder / "cache").glob("times-*.json"))


def test_a_finished_run_is_measured_in_words(result, folder):
    own = {"MICROGLIA_CACHE": str(folder / "cache")}
    outcome = microglia(
        "measure", folder / "run", "--accelerate", "--batch", "4", "--no-latency", folder=folder / "work", environment=own
    )
    assert outcome.status == 0, outcome.err
    assert "layers run as" in outcome.out
    assert "The same class on 359 of 359 test images" in outcome.out.replace("\n", " ")


def test_a_finished_run_is_measured_in_bfloat16_when_asked(result, folder):
    own = {"MICROGLIA_CACHE": str(folder / "cache")}
    words = ("measure", folder / "run", "--accelerate", "--batch", "4", "--no-latency", "--json", "--precision")
    outcome = microglia(*words, "bf16", folder=folder / "work", environment=own)
    assert outcome.status == 0, outcome.err
    record = json.loads(outcome.out)["accelerated"]
    assert record["precision"] == "bf16"
    assert {"eager", "bf16 eager"} <= {*record["times"]}
    assert record["agreement"]["images"] == 359
    outcome = microglia(*words, "fp8", folder=folder / "work", environment=own)
    assert outcome.status != 0
    assert "float32, bf16 or int8, not in 'fp8'" in outcome.err.replace("\n", " ")


def test_a_finished_run_is_measured_in_8_bits_calibrated_on_its_training_data(result, folder):
    own = {"MICROGLIA_CACHE": str(folder / "cache")}
    words = ("measure", folder / "run", "--accelerate", "--batch", "4", "--no-latency", "--json", "--precision", "int8")
    outcome = microglia(*words, folder=folder / "work", environment=own)
    assert outcome.status == 0, outcome.err
    record = json.loads(outcome.out)["accelerated"]
    assert record["precision"] == "int8"
    assert any("int8" in name for name in record["times"])
    assert all("int8 blocks" in layer["times"] for layer in record["layers"] if layer["shape"][0] >= 16)
    assert record["agreement"]["images"] == 359
    assert record["agreement"]["equal"] >= 350


def test_an_accelerated_model_is_saved_with_its_kernels_and_measured(result, folder):
    own = {"MICROGLIA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    given = {"folder": folder / "work", "environment": own}
    outcome = microglia("accelerate", folder / "run", "--batch", "2", "--executions", "eager,packed", "--json", **given)
    assert outcome.status == 0, outcome.err
    record = json.loads(outcome.out)
    assert record["model"] == str(folder / "run" / "accelerated")
    assert record["agreement"]["equal"] == 359
    measured = microglia("measure", record["model"], "--batch", "2", "--executions", "eager", "--json", **given)
    assert measured.status == 0, measured.err
    assert set(json.loads(measured.out)["latency"]["timings"]["model"]) == {"eager", "accelerated"}
    assert "timed anew" not in measured.err
