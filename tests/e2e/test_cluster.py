"""Sweeps on a real Ray cluster of two local nodes, one of which dies, and through submitit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from microglia.cli.app import app
from microglia.cluster import ClusterError, launcher_of
from microglia.lab.execute import execute
from microglia.lab.recipe import identity_of
from microglia.lab.sweep import Sweep, run_sweep

SHORT = {"epochs": 3, "max_batches": 3, "batch_size": 32}
BASE = {
    "model": "conv-2",
    "prune": {"density": 0.5},
    "dense": SHORT,
    "train": SHORT,
    "measure": {"latency": False},
    "threads": 1,
}
SLOW = {**BASE, "train": {"epochs": 8, "batch_size": 32}}
"""A recipe whose training takes seconds, so that its node can die within it."""


def weights(out: Path) -> dict[str, bytes]:
    return {path.parent.parent.name: path.read_bytes() for path in out.glob("*/model/model.safetensors")}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster on this machine: a head without cores, and two nodes of one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        quick = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 3}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the slow sweep on this machine, by cell, from this process: a sweep would start one for each cell."""
    out = tmp_path_factory.mktemp("here")
    for cell in Sweep(grid={"seed": [0, 1]}, base=SLOW, name="slow").cells:
        execute(cell.recipe, out / cell.name)
    return weights(out)


def ended(node: Any) -> None:
    """Kills a node as a machine that dies: its daemon and all processes below it, cells included."""
    import psutil

    parts = [child for one in node.all_processes.values() for process in one for child in _tree(psutil, process.process.pid)]
    for part in parts:
        part.kill()
    psutil.wait_procs(parts)


def _tree(psutil: Any, number: int) -> list[Any]:
    top = psutil.Process(number)
    return [top, *top.children(recursive=True)]


def test_the_cell_of_a_dead_node_goes_on_elsewhere_to_the_same_bits(
    cluster: Any, here: dict[str, bytes], tmp_path: Path
) -> None:
    sweep = Sweep(grid={"seed": [0, 1]}, base=SLOW, name="slow")
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    launcher = launcher_of("ray", [f"address={cluster.address}"])
    assert launcher is not None
    out, found = tmp_path / "there", []
    thread = threading.Thread(target=lambda: found.append(run_sweep(sweep, out, jobs=2, launcher=launcher)))
    try:
        thread.start()
        limit = time.monotonic() + 120
        while not all((out / cell.name / "stages" / "train.partial.safetensors").is_file() for cell in sweep.cells):
            assert time.monotonic() < limit, "both cells train"
            assert thread.is_alive(), found
            time.sleep(0.02)
        ended(nodes[1])
        thread.join(180)
    finally:
        launcher.stop()
        thread.join(30)
        launcher.close()
    assert sorted(found[0].done) == ["seed-0", "seed-1"], found[0].sentence
    assert weights(out) == here
    logs = [(out / cell.name / "log.txt").read_text() for cell in sweep.cells]
    assert sum("train: resumed after epoch" in log for log in logs) == 1, logs


def test_submitit_runs_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-the-user")
    monkeypatch.setenv("WANDB_MODE", "offline-as-the-user-says")
    sweep = Sweep(grid={"seed": [0]}, base=BASE, name="jobs")
    execute(sweep.cells[0].recipe, tmp_path / "here" / "seed-0")
    launcher = launcher_of("slurm", ["cluster=local"])
    assert run_sweep(sweep, tmp_path / "jobs", launcher=launcher).done == ["seed-0"]
    assert weights(tmp_path / "jobs") == weights(tmp_path / "here")
    assert list(weights(tmp_path / "jobs")) == ["seed-0"]
    orders = list((tmp_path / "jobs" / ".slurm").glob("*_submitted.pkl"))
    assert orders, "it was a job of submitit"
    for order in orders:
        assert b"offline-as-the-user-says" in order.read_bytes()
        assert b"a-secret-of-the-user" not in order.read_bytes(), "no file on a shared disk holds a token"


def test_a_job_that_reaches_its_time_limit_is_submitted_again() -> None:
    pytest.importorskip("submitit")
    from microglia.cluster.slurm import Work

    order = {"name": "a", "variables": {}, "directory": "/nowhere/a", "starts": None}
    again = Work().checkpoint(order)
    assert again.result() == Work()(order)
    assert again.result()["name"] == "a"


def test_the_user_hears_that_no_node_is_large_enough(recwarn: pytest.WarningsRecorder) -> None:
    from microglia.cluster.ray import _warn_of_no_room

    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    _warn_of_no_room(nodes, 2, 0)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"No node of the Ray cluster has 8 cores and 0 GPUs now \(there are 2 and 0\)"):
        _warn_of_no_room(nodes, 8, 0)
    with pytest.warns(UserWarning, match="has 1 cores and 0.5 GPUs now"):
        _warn_of_no_room(nodes, 1, 0.5)


def test_a_worker_that_misses_the_directory_or_the_data_fails_in_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    from microglia.cluster.launcher import order_of, work

    sweep = Sweep(grid={"seed": [0]}, base={**BASE, "model": "resnet20", "data": "cifar10"}, name="lost")
    (cell,) = sweep.cells
    order = order_of(cell, tmp_path / "elsewhere" / cell.name, None, 1)
    told = work(order)
    assert told["status"] == "failed"
    assert f"The node {os.uname().nodename} does not see {tmp_path / 'elsewhere'}" in told["problem"]
    monkeypatch.setenv("MICROGLIA_DATA", "the value before, which comes back after the test")  # `work` changes it
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "sweep.yaml").write_text("")
    told = work({**order, "variables": {"MICROGLIA_DATA": str(tmp_path / "nothing")}})
    assert told["status"] == "failed"
    assert "cifar10" in told["problem"]
    assert "MICROGLIA_DATA" in told["problem"]


def test_a_cluster_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray"), pytest.importorskip("submitit")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"Which Ray cluster\? Start one by `ray start --head`"):
        launcher_of("ray")
    with pytest.raises(ClusterError, match=r"No Ray cluster answers at 127.0.0.1:9"):
        launcher_of("ray", ["address=127.0.0.1:9"])
    with pytest.raises(ClusterError, match=r"looks like 10.0.0.1:6379; got 'nowhere'"):
        launcher_of("ray", ["address=nowhere"])
    with pytest.raises(ClusterError, match="does not take these settings"):
        launcher_of("ray", ["adress=127.0.0.1:9"])
    with pytest.raises(ClusterError, match="looks like address="):
        launcher_of("ray", ["127.0.0.1:9"])
    with pytest.raises(ClusterError, match=r"The setting cpus of a launcher is a whole number, 1 or more; got 'two'"):
        launcher_of("ray", ["address=127.0.0.1:9", "cpus=two"])
    with pytest.raises(ClusterError, match=r"The setting gpus of a launcher is a number, 0 or more; got -1"):
        launcher_of("ray", ["address=127.0.0.1:9", "gpus=-1"])
    with pytest.raises(ClusterError, match=r"submitit does not take these settings: Unknown argument 'partitoin'"):
        launcher_of("slurm", ["cluster=local", "slurm_partitoin=gpu"])
    with pytest.raises(ClusterError, match="take no settings"):
        launcher_of(None, ["address=127.0.0.1:9"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="There is no Slurm on this machine"):
        launcher_of("slurm")


def test_a_queue_refuses_what_it_does_not_do(tmp_path: Path) -> None:
    (tmp_path / "queue.yaml").write_text("parts: []\n")
    for words in (["--launcher", "ray"], ["--again"]):
        done = CliRunner().invoke(app, ["sweep", str(tmp_path / "queue.yaml"), *words])
        assert done.exit_code == 1
        assert f"leave {words[0]} out" in done.stderr


def test_known_results_are_not_run_again(tmp_path: Path) -> None:
    sweep = Sweep(grid={"seed": [0, 1]}, base=BASE, name="known")
    outcome = run_sweep(sweep, tmp_path, known={identity_of(cell.recipe) for cell in sweep.cells})
    assert [cell.status for cell in outcome.cells] == ["known", "known"]
    assert not outcome.done
    assert outcome.skipped == ["seed-0", "seed-1"]
