"""New Python processes that have imported torch and small libraries, but nothing of this one: a server forks them.

Most of the time of a new process would be the import of torch, which is not what the tests look at.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

LIMIT = 300
"""Seconds after which a process counts as hanging."""

SERVER = """
import atexit, gc, json, os, runpy, select, signal, socket, sys, threading, traceback, types
import torch, numpy, pydantic, yaml, typer, rich, safetensors.torch

def run(asked):
    for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [asked["first"], *places, *(place for place in sys.path[1:] if place not in inherited)]
    sys.argv = asked["argv"]
    status = 0
    try:
        if asked["code"] is None:
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.modules["__main__"] = module = types.ModuleType("__main__")
            exec(compile(asked["code"], "<string>", "exec"), vars(module))
    except SystemExit as end:
        status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

listening = socket.socket(fileno=int(sys.argv[1]))
inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
sys.path.append(sys.argv[2])  # what test files import from here
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
gc.freeze()
while True:
    ready, _, _ = select.select([listening, 0], [], [])
    if 0 in ready:  # whoever asks is gone
        sys.exit()
    connection, _ = listening.accept()
    if os.fork():
        connection.close()
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # this process waits for the one that runs
    listening.close()
    asked = json.loads(connection.makefile().readline())
    own = os.fork()
    if own == 0:
        connection.close()
        run(asked)
    connection.sendall(b"%d " % own)
    connection.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]))
    os._exit(0)
"""


@functools.cache
def _server() -> tuple[str, subprocess.Popen]:
    """Starts the server of this process; returns its address. It ends when its input does."""
    place = Path(tempfile.mkdtemp(prefix="fresh-")) / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen()
        words = [sys.executable, "-c", SERVER, str(listening.fileno()), str(Path(__file__).parent)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[listening.fileno()])
    atexit.register(_end, place, process)
    return str(place), process


def _end(place: Path, process: subprocess.Popen) -> None:
    process.stdin.close()
    process.wait()
    place.unlink()
    place.parent.rmdir()


class Fresh:
    """A running process; see `start`."""

    def __init__(self, asked: dict) -> None:
        self.words = asked["argv"]
        self._folder = tempfile.TemporaryDirectory(prefix="fresh-")
        asked |= {name: str(Path(self._folder.name) / name) for name in ("out", "err")}
        self._out, self._err = Path(asked["out"]), Path(asked["err"])
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server()[0])
        self._connection.sendall(json.dumps(asked).encode() + b"\n")

    def end(self, limit: float = LIMIT) -> subprocess.CompletedProcess:
        """Waits for the end; a process that says nothing within the limit is killed."""
        said = b""
        self._connection.settimeout(limit)
        try:
            while more := self._connection.recv(64):
                said += more
        except TimeoutError:
            os.kill(int(said.split()[0]), signal.SIGKILL)
            raise
        finally:
            self._connection.close()
        texts = [path.read_text() if path.exists() else "" for path in (self._out, self._err)]
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.words, int(said.split()[1]), *texts)


def start(
    code: str | None = None,
    *words: object,
    script: Path | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Fresh:
    """Starts ``python -c CODE``, or ``python SCRIPT``, with further words; as `run`, which also waits."""
    first = [str(script) if script else "-c"]
    return Fresh(
        {
            "code": code,
            "argv": [*first, *map(str, words)],
            "folder": str(folder or Path.cwd()),
            "first": str(script.parent) if script else "",
            "environment": {**os.environ, **(environment or {})},
        }
    )


def run(code: str | None = None, *words: object, **options) -> subprocess.CompletedProcess:
    """Runs ``python -c CODE`` to its end and returns its status, output and errors.

    What only a process shows that imports torch itself, such as which modules that loads, needs a process of its own.

    Args:
        code: What to run, or None for a script.
        words: Further words of the command line.
        options: ``script``: the file to run. ``folder``: where it works. ``environment``: variables to add.
    """
    return start(code, *words, **options).end()
