"""The front of the house: what `import microglia` and `microglia --help` import, and the names at the top."""

import importlib
import json
import os
import subprocess
import sys
import warnings

import pytest

import fresh
import microglia
from microglia.cli.listed import COMMANDS

HEAVY = ("accelerate", "sklearn", "scipy", "datasets", "matplotlib", "plotly", "pandas", "pyarrow", "torch._dynamo")
HEAVY += ("torchvision", "timm", "transformers", "onnx", "onnxruntime", "openvino", "triton", "sympy", "PIL")

OLD = [
    "NM",
    "Accelerated",
    "Acdc",
    "AtInit",
    "Awg",
    "Block",
    "Budget",
    "Channel",
    "Evidence",
    "FitConfig",
    "Ftwt",
    "Gathered",
    "Gradual",
    "MaskSet",
    "MicrogliaError",
    "OneShot",
    "Pas",
    "Pdp",
    "Recipe",
    "Smart",
    "SparseTraining",
    "Task",
    "Unstructured",
    "accelerate",
    "build",
    "enforce",
    "evaluate",
    "execute",
    "fit",
    "fold",
    "image_task",
    "load",
    "load_data",
    "mark_roles",
    "mask",
    "masks_of",
    "measure",
    "measure_latency",
    "permutation_of",
    "permute_channels",
    "plan_of",
    "prunable_layers",
    "prune_channels",
    "recalibrate",
    "resolve",
    "save",
    "score",
    "select",
    "shrink",
    "soft_topk",
]
"""The names that version 0.1.0 had at the top."""


def loaded_by(code: str, *, torch: bool = True) -> set[str]:
    """Returns the names of the modules that a fresh Python, with torch or without, has loaded after some code."""
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "COVERAGE_PROCESS_START": ""}
    if torch:
        done = fresh.run(code, environment=environment)
    else:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


class TestWhatIsImported:
    def test_import_microglia_imports_no_torch(self):
        loaded = loaded_by("import microglia; dir(microglia)", torch=False)
        assert "microglia" in loaded
        assert not loaded & {"torch", "numpy", "pydantic", *HEAVY}

    def test_the_help_imports_no_torch(self):
        code = "import sys; sys.argv = ['microglia', '--help']\nfrom microglia.cli import main\n"
        loaded = loaded_by(code + "try: main()\nexcept SystemExit as end: assert end.code == 0", torch=False)
        assert "typer" in loaded
        assert not loaded & {"torch", "numpy", "pydantic", *HEAVY}

    def test_every_public_name_together_imports_nothing_heavy(self):
        """Registries are full then: methods and scores register themselves when they are imported."""
        loaded = loaded_by(
            "from microglia import *\n"
            "import microglia.cli.commands\n"
            "from microglia.methods import methods as known\n"
            "from microglia.scores import scores\n"
            "assert 'smart' in list(known) and 'ftwt' in list(known) and 'synflow' in list(scores)"
        )
        assert "torch" in loaded
        assert not loaded & set(HEAVY)

    def test_each_public_name_alone(self):
        """A name that is asked for first does not need another one that was asked for before."""
        for name in ("execute", "tasks"):
            loaded_by(f"import microglia; microglia.{name}")


class TestNames:
    def test_29_and_three_rooms(self):
        rooms = {"methods", "tasks", "studies"}
        assert rooms < set(microglia.__all__)
        assert len(set(microglia.__all__) - rooms) == 29
        assert sorted(microglia.__all__) == [name for name in dir(microglia) if not name.startswith("_")]

    @pytest.mark.parametrize("name", OLD)
    def test_every_old_name_works(self, name):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = getattr(microglia, name)
        told = [str(warning.message) for warning in caught if warning.category is DeprecationWarning]
        if name in microglia.__all__:
            assert not told
            return
        (sentence,) = told
        assert caught[0].filename == __file__
        statement = sentence.split("`")[1]
        scope: dict = {}
        exec(statement, scope)
        assert scope[name] is value

    def test_a_verb_is_not_hidden_by_the_room_of_its_name(self):
        code = "import microglia.measure.size, microglia as mg; assert callable(mg.measure)"
        loaded_by(code + "\nfrom microglia import measure; assert callable(measure)")

    def test_rooms_are_attributes(self):
        loaded_by("import microglia as mg; mg.data.load_data; mg.methods.Smart; mg.tasks.image_task; mg.scores.Evidence")

    def test_a_wrong_name(self):
        with pytest.raises(AttributeError, match="'microglia' has no attribute 'shrnik'"):
            _ = microglia.shrnik
        with pytest.raises(ImportError):
            exec("from microglia import _nothing")

    def test_the_version(self):
        assert microglia.__version__ == importlib.metadata.version("microglia")


class TestListedCommands:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_the_list_says_what_the_command_says(self, name):
        module = importlib.import_module(f"microglia.cli.{COMMANDS[name].module}")
        assert getattr(module, name).__doc__.splitlines()[0] == COMMANDS[name].sentence

    def test_no_command_is_left_out(self):
        from microglia.cli.app import app

        for listed in COMMANDS.values():
            importlib.import_module(f"microglia.cli.{listed.module}")
        assert {info.callback.__name__ for info in app.registered_commands} >= set(COMMANDS)
