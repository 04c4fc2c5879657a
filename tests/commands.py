"""Commands as a user starts them: real processes with their own output, which share the slow start-up of one server.

No C++ compiler is found there but where one is asked for, and timings are short: see `no_compiler` and `short_timings`.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from no_compiler import without_compiler
from short_timings import shorten

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "microglia.cli.commands",
        "microglia.cli.studies",
        "microglia.dynamic.activation_kernels",
        "microglia.dynamic.tuning",
        "microglia.measure.latency",
        "accelerate",
        "matplotlib.backends.backend_agg",
        "sklearn.datasets",
        "scipy.io",
        "torch.distributed.tensor",
        "torch._dynamo",
        "torch._inductor.compile_fx",
    ]
)
LIMIT = 120
"""Seconds after which a command counts as hanging."""

TINY = ("lenet-300-100", "--data", "digits", "--density", "0.2", "--seed", "3")
TINY += ("dense.epochs=2", "train.epochs=3", "train.lr=0.1", "measure.latency=false", "threads=1")
"""A whole run in about a second."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


class Command:
    """A running `microglia ...`; see `start`."""

    def __init__(self, process, folder):
        self.process, self.folder = process, folder

    def wait_for(self, path: Path):
        """Returns as soon as a file is there; the command has to be alive until then."""
        while not path.exists():
            assert not self._ended(0.001), f"ended before {path.name} was there: {self.end()}"

    def signal(self, number: int):
        os.kill(self.process.pid, number)

    def kill(self) -> Outcome:
        """kill -9, unless it ended by itself a moment before."""
        self.process.kill()
        return self.end()

    def end(self, limit: float = LIMIT) -> Outcome:
        """Waits for the end."""
        if not self._ended(limit):
            self.process.kill()
            raise AssertionError(f"hangs: {self._text('out')} {self._text('err')}")
        self.process.join()
        return Outcome(self.process.exitcode, self._text("out"), self._text("err"))

    def _ended(self, seconds):
        return bool(multiprocessing.connection.wait([self.process.sentinel], seconds))

    def _text(self, name):
        path = self.folder / f"{self.process.name}.{name}"
        return path.read_text() if path.exists() else ""


def python(code: str, folder: Path) -> Outcome:
    """Runs a script as ``python script.py`` does, in a new process whose deprecated calls are errors; the folder is there."""
    process = CONTEXT.Process(target=_script, args=(code, folder, folder.parent))
    process.start()
    return Command(process, folder.parent).end()


def start(
    *words: object,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    file_size: int | None = None,
    prepare: Callable[[], None] | None = None,
    compiler: bool = False,
) -> Command:
    """Starts ``microglia WORDS`` in a folder.

    Args:
        words: The command line.
        folder: Where it works; its output is kept beside it.
        environment: Variables to add.
        file_size: Bytes a file may have, beyond which the disk counts as full.
        prepare: Called in the new process before the command.
        compiler: Whether `torch.compile` finds one, which takes half a minute.
    """
    folder.mkdir(exist_ok=True)
    beside = folder.parent
    arguments = ([str(word) for word in words], folder, beside, dict(environment or {}), file_size, prepare, compiler)
    process = CONTEXT.Process(target=_child, args=arguments)
    process.start()
    return Command(process, beside)


def microglia(*words: object, folder: Path, **options) -> Outcome:
    """Runs ``microglia WORDS`` to its end; options as of `start`."""
    return start(*words, folder=folder, **options).end()


def refused(outcome: Outcome, *texts: str, status: int = 1) -> None:
    """Checks that a command ended in one clear sentence that contains the texts."""
    assert outcome.status == status, outcome
    assert "Traceback" not in outcome.out + outcome.err, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 or status == 2, outcome.err
    missing = [text for text in texts if text not in outcome.err]
    assert not missing, outcome.err


def weights(run: Path) -> bytes:
    """Returns the bytes of a run's model."""
    return (run / "model" / "model.safetensors").read_bytes()


def _enter(folder, beside, compiler=False):
    """Works in a folder from now on, and writes beside it."""
    gc.freeze()  # what the server has imported is shared as long as no collection touches it
    name = multiprocessing.current_process().name
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(beside / f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    if not compiler:
        without_compiler()
    shorten()


def _script(code, folder, beside):
    _enter(folder, beside)
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    exec(compile(code, "script.py", "exec"), vars(module))


def _child(words, folder, beside, environment, file_size, prepare, compiler):
    _enter(folder, beside, compiler)
    os.environ.update({"COLUMNS": "300", "TERM": "dumb"} | environment)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    from microglia.cli import main

    if prepare is not None:
        prepare()
    sys.argv = ["microglia", *words]
    main()
