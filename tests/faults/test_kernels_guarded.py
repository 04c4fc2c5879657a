"""The kernels never touch a byte outside their arrays: guard pages at every level, and a build with sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fresh
import microglia.runtime
from microglia.runtime.operators import LEVELS, level

SCRIPTS = [
    Path(__file__).with_name(f"guarded_{name}.py") for name in ("kernels", "chains", "huffman", "int8", "passes", "thresholded")
]
RUNTIME = Path(microglia.runtime.__file__).parent
HERE = LEVELS[1 : LEVELS.index(level()) + 1]


def level_told(done):
    """Returns the level that a script names when all went well."""
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout.split()[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.parametrize("isa", HERE)
def test_no_byte_outside_the_arrays_is_touched(isa, script):
    environment = {"OMP_NUM_THREADS": "1", "MICROGLIA_ISA": isa}
    library = next(RUNTIME.glob("_kernels*.so"))
    assert level_told(fresh.run(None, library, 400, script=script, environment=environment)) == isa


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The kernels, without the part that speaks to torch, built with both sanitizers."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "the sanitizers need the C++ compiler that built the kernels"
    folder = tmp_path_factory.mktemp("sanitized")
    sources = sorted(file for file in RUNTIME.glob("kernels/*.cpp") if not file.name.startswith("register"))
    plain = ["-O0", "-g1", "-std=c++17", "-fPIC"]
    # Undefined behaviour ends in a trap, whose line the other sanitizer tells: calls with texts are twice as much code.
    flags = [*plain, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-undefined-trap-on-error"]
    absent = tuple(LEVELS[len(HERE) + 1 :])  # what this processor cannot run is only linked
    building = [
        subprocess.Popen([compiler, *own, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
        for source in sources
        for own in [plain if source.stem.endswith(absent) else flags]
    ]
    assert all(process.wait(300) == 0 for process in building)
    library = folder / "kernels.so"
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    subprocess.run([compiler, *flags, "-shared", *objects, "-o", str(library)], check=True)
    preloaded = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return library, preloaded.stdout.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.parametrize("isa", HERE)
def test_address_and_undefined_behaviour_sanitizers_find_nothing(sanitized, isa, script):
    library, runtime = sanitized
    settings = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:handle_sigill=1"}
    own = {**os.environ, "OMP_NUM_THREADS": "1", "MICROGLIA_ISA": isa, **settings}
    words = [sys.executable, str(script), str(library), "150"]  # no server has the sanitizers: a process of its own
    assert level_told(subprocess.run(words, env=own, capture_output=True, text=True, timeout=300, check=False)) == isa
