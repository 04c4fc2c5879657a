"""Two processes over gloo do what one does: the same masks, the same weights up to the order of sums, one writer."""

import functools
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.train.recover import recalibrate
from commands import CONTEXT, LIMIT, TINY, microglia, start
from microglia.core.layers import prunable_layers
from microglia.scores.gradient import gradient_magnitude
from microglia.tasks.metrics import Gathered

WORLD = 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank, port):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def on_ranks(*words, folder):
    """Runs a command on all ranks, as torchrun would; returns how each ended."""
    port = free_port()
    return [c.end() for c in [start(*words, folder=folder, environment=environment(rank, port)) for rank in range(WORLD)]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp("alone")
        outcome = microglia("prune", *TINY, "--method", method, "--out", folder / "run", folder=folder / "work")
        assert outcome.status == 0, outcome.err
        return folder / "run"

    return run


def read_plan(run):
    """Returns what was removed from a run's model, nothing where its channels are masked or all there."""
    return json.loads((run / "model" / "plan.json").read_text())["shrunk"] or {}


def assert_equivalent(run, other):
    """The same masks; weights, measurements and training curves equal up to the order of sums."""
    mine, theirs = mg.load(run / "model"), mg.load(other / "model")
    assert mg.masks_of(mine).same(mg.masks_of(theirs))
    assert read_plan(run).get("kept") == read_plan(other).get("kept")
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-3, atol=1e-5)
    results = [json.loads((directory / "result.json").read_text()) for directory in (run, other)]
    assert results[0]["masks"] == results[1]["masks"]
    assert results[0]["pruned"]["metrics"] == pytest.approx(results[1]["pruned"]["metrics"], rel=1e-3)
    curves = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (run, other)]
    assert len(curves[0]) == len(curves[1])
    for row, twin in zip(*curves, strict=True):
        assert row["loss"] == pytest.approx(twin["loss"], rel=1e-3)
        assert row["validation_loss"] == pytest.approx(twin["validation_loss"], rel=1e-3)


GATED = ("conv-2", "--data", "digits", "--method", "ftwt", "--seed", "3", "dense.epochs=1", "train.epochs=2", "train.lr=0.02")
GATED += ("prune.flops=0.5", "dense.max_batches=6", "train.max_batches=6", "measure.latency=false", "threads=1")


def test_two_ranks_gate_as_one(tmp_path):
    """Heads learn, then rest: under DDP too they stay where they were, though their gradients there are zeros, not none."""
    outcome = microglia("prune", *GATED, "--out", tmp_path / "one", folder=tmp_path / "work")
    assert outcome.status == 0, outcome.err
    both = on_ranks("prune", *GATED, "--out", tmp_path / "two", folder=tmp_path / "work")
    assert [each.status for each in both] == [0, 0], both
    assert_equivalent(tmp_path / "two", tmp_path / "one")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["estimate"] == results[1]["estimate"]
    for mine, theirs in zip(*(result["routes"]["layers"] for result in results), strict=True):
        assert mine["kept"] == pytest.approx(theirs["kept"], abs=1e-3)


def gates_trained(rank):
    """All parameters after each step of a decoupled training on this rank's half of the images."""
    model = network()
    pruner = mg.methods.Ftwt(model, r=0.8, total_steps=6, example_inputs=torch.zeros(1, 1, 8, 8), cooldown=0.5,
                     generator=torch.Generator().manual_seed(0))  # fmt: skip
    heads = {id(p) for p in pruner.parameters()}
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if id(p) not in heads], lr=0.05, momentum=0.9)
    optimizer.add_param_group(*pruner.param_groups())
    steps = []
    for x, y in batches(*[8] * 6):
        part = slice(rank * 4, rank * 4 + 4)
        loss = nn.functional.cross_entropy(wrapped(x[part]), y[part]) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
        steps.append({n: p.tolist() for n, p in model.named_parameters()})
    return steps


def heads_fitted(rank):
    """The heads that this rank has after fitting them to images of its own."""
    model = network()
    mg.methods.Ftwt(model, r=0.8, total_steps=6, example_inputs=torch.zeros(1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    mine = batches(8, 8)[rank : rank + 1]
    mg.dynamic.fit_heads(model, mine)
    return {n: p.tolist() for n, p in model.named_parameters() if ".gate." in n}


def test_fitted_heads_are_the_first_rank_s_everywhere():
    first, second = every_rank(heads_fitted)
    assert first
    assert first == second


def test_gates_agree_on_all_ranks_and_rest_after_the_cool_down():
    first, second = every_rank(gates_trained)
    assert first == second
    heads = [{n: v for n, v in step.items() if ".gate." in n} for step in first]
    assert heads[0]
    assert heads[0] != heads[1] != heads[2]
    assert heads[2] == heads[3] == heads[5]
    assert first[2] != first[3]


@pytest.mark.parametrize("method", ["gradient", "magnitude", "gradual", "channels", "smart"])
def test_two_ranks_prune_as_one(tmp_path, alone, method):
    words = ("prune", *TINY, "--method", method, "--out", tmp_path / "run")
    first, second = on_ranks(*words, folder=tmp_path / "work")
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "Model:" in first.out
    assert second.out == ""
    assert_equivalent(tmp_path / "run", alone(method))
    # A finished run answers on all ranks, too.
    again = on_ranks(*words, folder=tmp_path / "work")
    assert [outcome.status for outcome in again] == [0, 0], again


@pytest.mark.slow
def test_torchrun(tmp_path, alone):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(WORLD),
        "--master_port",
        str(free_port()),
    ]
    words = ["-m", "microglia", "prune", *TINY, "--method", "gradient", "--out", str(tmp_path / "run")]
    done = subprocess.run([*launcher, *words], cwd=tmp_path, capture_output=True, text=True, timeout=2 * LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Model:") == 1
    assert_equivalent(tmp_path / "run", alone("gradient"))


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    outcomes = on_ranks("prune", *TINY, "dense.batch_size=63", "--out", tmp_path / "run", folder=tmp_path / "work")
    for outcome in outcomes:
        assert outcome.status == 1
        assert "A batch of 63 images cannot be shared by 2 ranks" in outcome.err
        assert "error: " in outcome.err
        assert "Traceback" not in outcome.err


def in_group(function, rank, port, answers):
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        answers.put((rank, function(rank)))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def every_rank(function):
    """Returns what a function of the rank returns in each process of a group."""
    port, answers = free_port(), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=in_group, args=(function, rank, port, answers)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=LIMIT) for _ in processes)
        for process in processes:
            process.join(LIMIT)
        assert [process.exitcode for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(WORLD)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    made = [(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)) for n in sizes]
    return made


def gradient(batches):
    model = plain()
    values = gradient_magnitude(model, prunable_layers(model), mg.scores.Evidence(batches, nn.functional.cross_entropy))
    return {name: value.tolist() for name, value in values.items()}


SIZES = (8, 5, 1)


def shared_gradient(rank):
    """Each rank takes its part of every batch; the last leaves nothing for the first rank."""
    return gradient([(x[len(x) * rank // 2 : len(x) * (rank + 1) // 2], y[len(y) * rank // 2 : len(y) * (rank + 1) // 2])
                     for x, y in batches(*SIZES)])  # fmt: skip


def test_the_gradient_score_of_split_batches_is_that_of_the_whole():
    first, second = every_rank(shared_gradient)
    assert first == second
    expected = gradient(batches(*SIZES))
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(value), rtol=1e-4, atol=1e-7)


def recalibrated(rank):
    model = network()
    mine = batches(8, 8, 8, 8)[rank::WORLD]
    recalibrate(model, mine)
    return {name: buffer.tolist() for name, buffer in model[1].named_buffers() if name != "num_batches_tracked"}


def test_recalibration_averages_over_ranks():
    first, second = every_rank(recalibrated)
    assert first == second
    model = network()
    recalibrate(model, batches(8, 8, 8, 8))
    torch.testing.assert_close(torch.tensor(first["running_mean"]), model[1].running_mean)
    torch.testing.assert_close(torch.tensor(first["running_var"]), model[1].running_var)


def evaluated(rank):
    task = mg.tasks.image_task("lenet-300-100", "digits")
    return {split: mg.evaluate(task.build(), task, split) for split in ("validation", "test")} | {
        "tiny": mg.evaluate(task.build(), task, "test", batch_size=179)  # 360 images: 358, then one each
    }


def test_evaluation_agrees_over_ranks():
    first, second = every_rank(evaluated)
    assert first == second
    expected = evaluated(0)
    for split, metrics in expected.items():
        assert first[split]["accuracy"] == metrics["accuracy"]
        assert math.isclose(first[split]["loss"], metrics["loss"], rel_tol=1e-6)


def scored(rank):
    """Metrics of both kinds over one image, so that a rank gets no batch at all."""
    def records(outputs, targets):
        return list(zip(targets, outputs.argmax(1), strict=True))

    task = mg.tasks.image_task("lenet-300-100", "digits")
    few = replace(task.data.images, test=task.data.images.test.subset(torch.arange(1)))
    count = Gathered(records, lambda kept: {"kept": float(len(kept))})
    task = replace(task, data=replace(task.data, images=few), metrics={"kept": count, **task.metrics})
    return mg.evaluate(task.build(), task, "test")


def test_a_rank_without_any_batch_ends_with_the_others():
    first, second = every_rank(scored)
    assert first == second == pytest.approx(scored(0))
    assert first["kept"] == 1.0


def averaged(rank):
    task = mg.tasks.image_task("lenet-300-100", "digits")
    model = task.build()
    config = mg.FitConfig(epochs=1, batch_size=128, lr=0.05, ema=0.9, accumulate=3)
    rows = mg.fit(model, task, config, seed=3)
    return {n: p.tolist() for n, p in model.named_parameters() if n.endswith("bias")} | {"loss": rows[-1]["loss"]}


def test_an_average_of_accumulated_steps_is_the_same_on_two_ranks_as_on_one():
    first, second = every_rank(averaged)
    assert first == second
    expected = averaged(0)
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(value), rtol=1e-3, atol=1e-5)
