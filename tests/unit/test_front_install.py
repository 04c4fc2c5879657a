"""What is installed: kernels without torch at build time, a wheel without a compiler, few dependencies, extras, `doctor`."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from rich.text import Text

import fresh
import microglia as mg
from microglia.cli.doctor import doctor, examined
from microglia.core.errors import MissingLibraryError
from microglia.core.optional import EXTRAS, needs, present
from microglia.runtime.operators import LEVELS
from microglia.train.engine import OneProcess

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "src" / "microglia" / "runtime" / "kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
TORCH = Path(torch.__file__).parent
BLOCK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {modules}
        return None if absent else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
"""Python in which modules are not installed."""


def without(modules, code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    settings = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    return fresh.run(BLOCK.format(modules=set(modules)) + code, folder=folder, environment=settings)


def microglia(*words: str) -> str:
    return f"sys.argv = ['microglia', *{list(words)!r}]\nfrom microglia.cli import main\nmain()\n"


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!;\[ ]", requirement)[0].lower() for requirement in requirements}


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
class TestTheKernelsBuildWithoutTorch:
    def compiled(self, *files: Path, includes: list[Path]) -> subprocess.CompletedProcess:
        words = [COMPILER, "-std=c++17", "-fsyntax-only", *(f"-I{place}" for place in includes), *map(str, files)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    def test_the_files_that_call_torch_need_none_of_its_headers(self):
        done = self.compiled(*sorted(KERNELS.glob("register*.cpp")), includes=[KERNELS])
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(("given", "fits"), [("int64_t* size", True), ("int32_t* size", False)])
    def test_the_declarations_are_those_of_the_torch_that_is_installed(self, tmp_path, given, fits):
        declarations = (KERNELS / "libtorch.h").read_text()
        assert "int64_t* size" in declarations
        (tmp_path / "ours.h").write_text(declarations.replace("int64_t* size", given))
        text = "#define TORCH_TARGET_VERSION 0x020b000000000000ULL\n#include <torch/csrc/stable/c/shim.h>\n"
        (tmp_path / "both.cpp").write_text(text + '#include "ours.h"\n')
        done = self.compiled(tmp_path / "both.cpp", includes=[TORCH / "include", tmp_path])
        assert (done.returncode == 0) == fits, done.stderr
        assert fits or "aoti_torch_get_size" in done.stderr

    def test_the_library_of_torch_has_every_function(self):
        block = (KERNELS / "libtorch.h").read_text().partition('extern "C" {')[2]
        functions = re.findall(r"^\w+ (\w+)\(", block, re.MULTILINE)
        library = ctypes.CDLL(str(TORCH / "lib" / "libtorch_cpu.so"))
        assert len(functions) > 25
        assert [name for name in functions if not hasattr(library, name)] == []


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """The wheel of a machine without a compiler, and what its build says."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, place)
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    words = [sys.executable, "-m", "pip", "wheel", ".", "-v", "--no-deps", "--no-build-isolation", "--wheel-dir", "out"]
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (place / "out").iterdir()
    return wheel, done.stdout + done.stderr


class TestWithoutACompiler:
    def test_the_wheel_is_one_of_python_alone_and_the_build_says_so_once(self, pure_wheel):
        wheel, said = pure_wheel
        assert wheel.name == f"microglia-{PROJECT['version']}-py3-none-any.whl"
        assert said.count("built without its compiled kernels") == 1
        assert "install g++ or clang++" in said

    def test_the_wheel_has_what_is_needed_and_no_kernels(self, pure_wheel):
        with zipfile.ZipFile(pure_wheel[0]) as wheel:
            inside = set(wheel.namelist())
        assert {"microglia/report/page.html", "microglia/py.typed", "microglia/cli/doctor.py"} <= inside
        assert not [name for name in inside if name.endswith((".so", ".cpp"))]

    def test_doctor_says_how_to_get_the_kernels(self, pure_wheel, tmp_path):
        with zipfile.ZipFile(pure_wheel[0]) as wheel:
            wheel.extractall(tmp_path)
        done = without([], microglia("doctor", "--json"), tmp_path, PYTHONPATH=str(tmp_path))
        found = json.loads(done.stdout)
        assert found["kernels"] == "torch"
        (kernels,) = (gap for gap in found["missing"] if gap["what"] == "kernels")
        assert "pip install" in kernels["command"]
        assert done.stderr == ""


class TestDependencies:
    def test_the_core_is_seven_libraries(self):
        assert names(PROJECT["dependencies"]) == {"torch", "numpy", "safetensors", "pydantic", "pyyaml", "typer", "rich"}

    def test_the_extras_of_the_package_are_those_that_the_sentences_name(self):
        declared = {extra: names(given) for extra, given in PROJECT["optional-dependencies"].items()}
        assert {extra: set(packages.values()) for extra, packages in EXTRAS.items()}.items() <= declared.items()
        (everything,) = PROJECT["optional-dependencies"]["all"]
        assert set(everything.removeprefix("microglia[").removesuffix("]").split(",")) == set(EXTRAS)

    def test_what_ci_installs_is_pinned(self):
        pinned = names((ROOT / "constraints.txt").read_text().lower().splitlines())
        (extras,) = re.findall(r"^EXTRAS := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        of_extras = set().union(*(EXTRAS[extra].values() for extra in extras.split(",") if extra not in ("docs", "dev")))
        of_docs = names(PROJECT["optional-dependencies"]["docs"])
        assert names(PROJECT["dependencies"]) | of_extras | of_docs <= pinned


class TestWithoutExtras:
    def test_the_core_does_its_work_without_any(self, tmp_path):
        """Masks, removed channels, saved files, training, accelerated models and the command line."""
        everything = {module for packages in EXTRAS.values() for module in packages}
        code = """
import torch
from torch import nn
import microglia as mg
torch.manual_seed(0)
def build():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
x, model = torch.randn(32, 1, 8, 8), build()
pruner = mg.methods.OneShot(model, density=0.5)
pruner.finish()
mg.save(model, "masked")
assert torch.equal(mg.load("masked", build())(x), model(x))
small = mg.prune_channels(build(), x[:1], mg.Budget(density=0.5), round_to=1)
mg.save(small, "small")
assert torch.equal(mg.load("small", build())(x), small(x))
fast = mg.accelerate(model, x[:1], against=("eager", "packed"), rounds=1)
torch.testing.assert_close(fast(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)
from microglia.train.engine import accelerator
print(type(accelerator()).__name__, sorted(name for name in sys.modules if name in BLOCKED))
"""
        done = without(everything, code.replace("BLOCKED", repr(everything)), tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split("\n")[-2] == "OneProcess []"
        done = without(everything, microglia("--help"), tmp_path)
        assert done.returncode == 0, done.stderr
        assert "doctor" in done.stdout

    @pytest.mark.parametrize(
        ("extra", "words", "sentence"),
        [
            ("data", "prune lenet-300-100 --data digits", "The data set 'digits' needs scikit-learn, not installed here: "),
            ("zoo", "prune timm:resnet18 --data digits", "needs torchvision, which is not installed: "),
            ("report", "report run --out told", "A report needs jinja2 and matplotlib and plotly, not installed here: "),
        ],
    )
    def test_a_command_that_needs_one_says_which_in_one_sentence(self, tmp_path, extra, words, sentence):
        done = without(EXTRAS[extra], microglia(*words.split()), tmp_path)
        assert done.returncode == 1
        assert sentence in done.stderr
        assert f"pip install 'microglia[{extra}]'" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_a_run_needs_neither_accelerate_nor_what_draws(self, tmp_path):
        words = "prune lenet-300-100 --data digits --flops 0.5 --epochs 1 dense.epochs=1 measure.latency=false --out run"
        absent = {module for extra in ("train", "report", "zoo", "export") for module in EXTRAS[extra]}
        done = without(absent, microglia(*words.split()), tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Picture" not in done.stdout
        assert "The picture of the removed channels needs matplotlib" in done.stderr

    def test_several_processes_need_accelerate(self, tmp_path):
        code = "from microglia.train.engine import accelerator\naccelerator()"
        done = without(["accelerate"], code, tmp_path, WORLD_SIZE="2")
        assert "Training in several processes needs accelerate" in done.stderr.splitlines()[-1]


def test_one_process_without_accelerate_trains_to_the_same_bits(monkeypatch):
    task = mg.tasks.image_task("lenet-300-100", "digits")
    ends = []
    for engine in (None, OneProcess(torch.device("cpu"))):
        if engine is not None:
            monkeypatch.setattr("microglia.train.fit.accelerator", lambda device, engine=engine: engine)
        torch.manual_seed(0)
        model = task.build()
        mg.fit(model, task, mg.FitConfig(epochs=1, clip=0.1))
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class TestNeeds:
    def test_what_is_there_is_silent_and_what_is_missing_is_one_sentence(self, monkeypatch):
        with needs("data", "json", "os"):
            pass
        monkeypatch.setitem(sys.modules, "PIL", None)
        said = r"^A cat needs pillow and no_such_thing, not installed here: pip install 'microglia\[data\]' installs .*\.$"
        with pytest.raises(MissingLibraryError, match=said) as told:
            needs("data", "json", "PIL", "no_such_thing", what="A cat")
        assert "\n" not in str(told.value)
        assert not present("no_such_thing")


class TestDoctor:
    def test_it_tells_what_is_here(self):
        found = examined()
        assert found["kernels"] in LEVELS
        assert found["core"]["torch"] == torch.__version__
        assert all(found["core"].values())
        assert set(found["extras"]) == set(EXTRAS)
        assert found["threads"] == torch.get_num_threads()

    @pytest.mark.parametrize("extra", EXTRAS)
    def test_each_extra_that_is_missing_has_its_command(self, extra, monkeypatch):
        gone = next(iter(EXTRAS[extra]))
        monkeypatch.setattr("microglia.core.optional.find_spec", lambda name: None if name == gone else True)
        found = examined()
        package = EXTRAS[extra][gone]
        assert found["extras"][extra][package] is None
        gaps = {gap["what"]: gap for gap in found["missing"]}
        assert gaps[extra]["command"] == f"pip install 'microglia[{extra}]'"
        assert package in gaps[extra]["lacks"].split(", ")

    def test_a_person_reads_the_command_whole(self, monkeypatch, capsys):
        """The brackets of an extra are no markup."""
        monkeypatch.setattr("microglia.core.optional.find_spec", lambda name: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "80")
            doctor(json_=False)
        printed = Text.from_ansi(capsys.readouterr().out).plain
        for extra in EXTRAS:
            assert f"pip install 'microglia[{extra}]'" in printed
