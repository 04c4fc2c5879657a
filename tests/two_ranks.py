"""A script run by one process and by two gloo ranks, for tests that compare them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def alone_and_on_two_ranks(script: str, limit: float) -> list[Any]:
    """Returns the JSON that a script prints: alone, on rank 0, on rank 1."""

    def start(**environment: str) -> "subprocess.Popen[str]":
        source = Path(__file__).parents[1] / "src"
        env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(RANK=str(rank), LOCAL_RANK=str(rank), **names) for rank in range(2)]
    return [json.loads(process.communicate(timeout=limit)[0]) for process in [start(), *ranks]]
