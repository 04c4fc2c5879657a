"""A script run by one process and by two gloo ranks, for tests that compare them."""

import json
import socket
from pathlib import Path
from typing import Any

import fresh


def alone_and_on_two_ranks(script: str, limit: float) -> list[Any]:
    """Returns the JSON that a script prints: alone, on rank 0, on rank 1."""

    def start(**environment: str) -> fresh.Fresh:
        source = Path(__file__).parents[1] / "src"
        return fresh.start(script, environment={"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", **environment})

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(RANK=str(rank), LOCAL_RANK=str(rank), **names) for rank in range(2)]
    return [json.loads(process.end(limit).stdout) for process in [start(), *ranks]]
