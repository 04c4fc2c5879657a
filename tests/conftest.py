"""What all tests need: threads that do not fight, a torchvision that imports, files in memory, short timings, real data."""

import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from microglia.zoo.external import declare_operators
from short_timings import shorten

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
MEMORY = Path("/dev/shm")
ROOM = 8 * 2**30
"""Free bytes below which temporary files stay on the disk."""


def pytest_configure():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    if in_memory(MEMORY):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    prepare_torchvision()
    shorten()


def in_memory(folder: Path) -> bool:
    """Tells whether temporary files can lie in a folder of the memory: nobody waits there for a disk at each durable write.

    Tests also run scripts and load libraries that they have written, which some containers do not allow there.
    """
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return False
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize >= ROOM and not found.f_flag & getattr(os, "ST_NOEXEC", 0)


def pytest_collection_finish():
    """Leaves what is imported out of the collections of garbage, which would look at all of it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_unconfigure():
    gc.unfreeze()  # libraries complain at the end about what they find alive


def prepare_torchvision():
    """Makes a plain ``import torchvision`` or ``import timm`` work, without paying for that import here.

    The CUDA-built wheel cannot load its operators beside a CPU-only torch and then fails to import; in that case their
    schemas are declared first (see `microglia.zoo.external.import_torchvision`).
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    for library in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    if not hasattr(torch.ops.torchvision, "nms"):
        declare_operators()


@pytest.fixture(scope="session")
def data_root():
    """The folder of the real data sets and checkpoints."""
    folder = os.environ.get("MICROGLIA_DATA")
    if not folder:
        pytest.skip("MICROGLIA_DATA is not set")
    if not Path(folder).is_dir():
        pytest.skip(f"MICROGLIA_DATA={folder} is not a folder")
    return Path(folder)
