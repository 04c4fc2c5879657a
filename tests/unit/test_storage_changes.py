"""The registry of changes: a family registers one value; files, results and the command line know it from there."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fresh
import microglia as mg
from microglia.cli.app import app
from microglia.core.errors import FileError
from microglia.core.house import ALWAYS, CHANGES
from microglia.dynamic import GatePlan, Site, attach_gates, gate_plan
from microglia.lab.recipe import resolve
from microglia.storage import changes as seam
from microglia.storage.changes import Change, changes_of, decode, register_change, replay

SOURCES = Path(mg.__file__).parent


# A family of its own, as a package outside the house would write it: outputs times a factor that the model notes.
class Times:
    """Multiplies what a model returns."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module, args, output):
        return output * self.factor


def times(model: nn.Module, factor: float) -> nn.Module:
    model.register_forward_hook(Times(factor))
    return model


def factor_of(model: nn.Module) -> float | None:
    return next((hook.factor for hook in model._forward_hooks.values() if isinstance(hook, Times)), None)


def read_factor(written, state) -> float:
    if not isinstance(written, float):
        raise FileError(f"A factor is a number, not {written!r}.")
    return written


@pytest.fixture
def scaled(monkeypatch):
    """Registers the change for one test."""
    monkeypatch.setattr(seam.changes, "_items", dict(seam.changes._items))
    return register_change(
        "scaled",
        Change(
            of=factor_of,
            encode=float,
            decode=read_factor,
            replay=times,
            result=lambda factor, model, dense: {"scaled": {"by": factor, "parameters": sum(1 for _ in dense().parameters())}},
            measured=lambda factor: {"scaled_by": factor},
            executions=lambda model, example, batches: {"halved": lambda: model(example / 2)},
        ),
    )


def model() -> nn.Module:
    torch.manual_seed(0)
    return mg.tasks.build("lenet-300-100", classes=10, shape=(1, 8, 8)).eval()


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_change_from_outside_is_saved_loaded_and_measured(scaled, tmp_path):
    made = times(model(), 3.0)
    mg.mask(made, {name: layer.weight > 0 for name, layer in mg.core.layers.prunable_layers(made).items()})
    assert {key: done.kind is scaled for key, done in changes_of(made).items()} == {"masks": False, "scaled": True}
    mg.save(made, tmp_path / "saved")
    again = mg.load(tmp_path / "saved")
    assert torch.equal(again(X), made(X))
    assert changes_of(again)["scaled"].value == 3.0
    shown = CliRunner().invoke(app, ["measure", str(tmp_path / "saved"), "--no-latency", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["scaled_by"] == 3.0


def test_a_run_tells_of_a_change_from_outside(scaled, tmp_path, monkeypatch):
    from microglia.lab import execute

    class Registered:
        def __getattr__(self, name):
            return getattr(kept, name)

        def procedure(self, task, run, config):
            return times(kept.procedure(task, run, config), 2.0)

    kept = execute.methods["oneshot"]
    monkeypatch.setitem(execute.methods._items, "oneshot", Registered())
    recipe = resolve({"model": "lenet-300-100", "method": "oneshot", "prune": {"density": 0.5},
                         "dense": {"epochs": 1}, "train": {"epochs": 0},
                         "measure": {"rounds": 2, "executions": ["eager"]}})  # fmt: skip
    result = mg.execute(recipe, tmp_path / "run")
    assert result["scaled"] == {"by": 2.0, "parameters": 6}
    assert result["masks"]["kept"] < result["masks"]["total"]
    assert "halved" in json.dumps(result["latency"])


def test_no_other_change_is_replayed_under_the_weights(scaled, tmp_path):
    mg.save(times(model(), 3.0), tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"scaled": 4.0}))
    with pytest.raises(FileError, match="do not belong together"):
        mg.load(tmp_path)


def test_a_damaged_value_is_one_sentence(scaled):
    with pytest.raises(FileError, match="A factor is a number, not 'much'"):
        decode({"scaled": "much"}, {})
    with pytest.raises(FileError, match="what was removed is no plan"):
        decode({"shrunk": 3}, {})


def test_a_change_that_nobody_registered_is_refused_and_never_imported(tmp_path):
    mg.save(model(), tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    for key in ("codebook", "antigravity", "os.path"):
        (tmp_path / "plan.json").write_text(json.dumps(plan | {key: {"module": "antigravity"}}))
        with pytest.raises(FileError, match=f"holds the change '{key}', which is not registered here"):
            mg.load(tmp_path)
    assert "antigravity" not in sys.modules


def test_a_field_is_registered_once_and_the_headers_are_reserved(scaled):
    with pytest.raises(ValueError, match="twice"):
        register_change("scaled", scaled)
    with pytest.raises(ValueError, match="header"):
        register_change("digest", scaled)


@pytest.mark.parametrize("key", CHANGES)
def test_the_modules_of_the_table_register_their_change(key):
    """In a process that has imported nothing else of the house: a file that names the field is enough."""
    code = f"from microglia.storage.changes import changes, _known; _known({key!r}); assert {key!r} in changes"
    # The package imports the house today; the table has to hold without that.
    bare = (
        f"import sys, types; p = types.ModuleType('microglia'); p.__path__ = [{str(SOURCES)!r}]; sys.modules['microglia'] = p"
    )
    done = fresh.run(f"{bare}; {code}")
    assert done.returncode == 0, done.stderr


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()


def test_what_a_model_has_been_through_in_the_order_of_replay(tmp_path):
    dense = net()
    assert changes_of(dense) == {}
    small = mg.prune_channels(dense, X, mg.Budget(density=0.5), round_to=1).eval()
    width = small[0].out_channels
    attach_gates(small, GatePlan((Site("0", "0", "relu", 1, width),)).with_r(0.8), torch.Generator().manual_seed(1))
    mg.mask(small, {"4.weight": torch.rand(small[4].weight.shape) > 0.5})
    assert list(changes_of(small)) == ["masks", "shrunk", "gates"]
    again = mg.load(mg.save(small, tmp_path), net())
    assert torch.equal(again(X), small(X))
    assert list(changes_of(again)) == ["masks", "shrunk", "gates"]
    assert gate_plan(again) == gate_plan(small)


def test_fields_of_files_stay_as_they_were(tmp_path):
    """Files of version 1 hold these fields in this order, also where nothing was done."""
    mg.save(net(), tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert list(plan) == ["format", "version", "source", "class", "masks", "shrunk", "gates", "digest"]
    assert {key: plan[key] for key in ALWAYS} == ALWAYS
    assert list(ALWAYS) == [key for key in CHANGES if key in ALWAYS]


def test_a_permuted_model_tells_so_after_it_was_loaded(tmp_path):
    permuted = mg.permute_channels(net(), X, mg.Block(4, 1), density=0.3)
    again = mg.load(mg.save(permuted, tmp_path), net())
    assert torch.equal(again(X), permuted(X))
    assert mg.graph.permutation_of(again).to_dict() == mg.graph.permutation_of(permuted).to_dict()
    plan = json.loads((tmp_path / "plan.json").read_text())
    for damaged in (3, {}, {"layers": 1, "left": {}, "error": 0}, {**plan["permuted"], "layers": {"0.weight": {"total": "x"}}}):
        (tmp_path / "plan.json").write_text(json.dumps(plan | {"permuted": damaged}))
        with pytest.raises(FileError, match="permuted"):
            mg.load(tmp_path, net())


def test_a_change_that_does_not_fit_is_one_sentence():
    done = decode({"gates": GatePlan((Site("9", "9", "relu", 1, 8),)).to_dict()},
                  {"9.gate.weight": torch.zeros(8, 1), "9.gate.bias": torch.zeros(8)})  # fmt: skip
    with pytest.raises(FileError, match=r"'gates' of the file does not fit Sequential.*another model"):
        replay(net(), done)


@pytest.mark.parametrize("room", ["lab", "storage"])
def test_shared_rooms_name_no_family(room):
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted((SOURCES / room).rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(r"microglia\.dynamic|\bgate_plan|\bremoved_from|\bgated\b|\bftwt\b", line)
    ]
    assert not found, found
