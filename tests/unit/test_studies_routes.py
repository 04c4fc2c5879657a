"""`microglia routes`: the numbers of a gated model's routes, told again and drawn."""

import io
import json
import xml.etree.ElementTree as ElementTree
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import microglia as mg
from microglia.core.errors import MicrogliaError, UnknownNameError
from microglia.dynamic import Flow, GatePlan, attach_gates, detach_gates, find_sites, gates_of, listening, statistics
from microglia.dynamic.routes import record
from microglia.lab.execute import execute
from microglia.lab.recipe import resolve
from microglia.report.printed import printed as drawn
from microglia.studies.images import image_data
from microglia.studies.routes.figures import core_chart
from microglia.studies.routes.heat import heat_maps
from microglia.studies.routes.study import Viewing, counter_of, layer_table, summary_table, view_routes
from microglia.tasks.classification import image_task

RECIPE = {
    "model": "resnet8",
    "data": "digits",
    "method": "ftwt",
    "prune": {"flops": 0.5, "exclude": ["conv1"]},
    "dense": {"epochs": 1},
    "train": {"epochs": 1},
    "measure": {"latency": False},
}


@pytest.fixture(scope="module")
def task():
    return image_task("resnet8", "digits")


@pytest.fixture(scope="module")
def model(task):
    """Untrained, with gates that differ from input to input."""
    plain = task.build().eval()
    sites = find_sites(Flow(plain, task.example), plain).sites
    gated = attach_gates(plain, GatePlan(sites, softmax=False).with_r(0.8), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for gate in gates_of(gated).values():
            gate.weight.mul_(5)
            gate.bias.add_(0.3)
    return gated


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return mg.save(model, tmp_path_factory.mktemp("saved") / "mine")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "ftwt"
    return directory, execute(resolve(RECIPE), directory)


@pytest.fixture(scope="module")
def of_run(run):
    """What the command tells of the run."""
    return view_routes(Viewing(str(run[0])))


@pytest.fixture(scope="module")
def of_saved(saved):
    return view_routes(Viewing(str(saved)))


def printed(table, width=300):
    console = Console(width=width, file=io.StringIO())
    console.print(table, highlight=False)
    return console.file.getvalue()


class TestNumbers:
    def test_of_a_run_they_are_those_of_its_result(self, run, of_run):
        (directory, result), told = run, of_run
        assert {key: told[key] for key in result["routes"]} == result["routes"]
        assert told["estimate"] == {key: result["estimate"][key] for key in ("r", "honest", "paper")}
        assert sorted(path.name for path in (directory / "routes").iterdir()) == [
            f"test-{name}.{form}" for name in ("classes", "core", "heat") for form in ("png", "svg")
        ]
        assert sorted(told["pictures"]) == sorted(str(path) for path in (directory / "routes").iterdir())
        assert json.loads(json.dumps(told)) == told

    def test_the_model_inside_a_run_and_another_split(self, run, tmp_path):
        directory, result = run
        told = view_routes(Viewing(str(directory / "model"), split="validation", out=tmp_path / "here"))
        assert told["inputs"] != result["routes"]["inputs"]
        assert told["estimate"]["r"] == result["estimate"]["r"]
        assert (tmp_path / "here" / "validation-core.png").is_file()
        assert Viewing(str(directory / "model")).directory == directory / "routes"

    def test_of_a_saved_model_alone(self, saved, model, task, of_saved):
        told = of_saved
        assert told["estimate"] is None
        routes = record(model, task.data.batches("test", 64).epoch(0))
        expected = statistics(routes, counter_of(model, task, "it"))
        assert {key: told[key] for key in expected} == expected
        assert told["routes"] > 10
        assert (saved.parent / "mine-routes" / "test-heat.svg").is_file()

    def test_tables_say_them(self, of_run):
        told = of_run
        text = printed(layer_table(told.result))
        for row in told["layers"]:
            line = next(line for line in text.splitlines() if line.startswith(f"{row['layer']} "))
            cells = line.split()
            assert cells[1] == str(row["filters"])
            assert cells[2] == f"{100 * row['kept']:.1f}±{100 * row['std']:.1f}"
            assert cells[3:5] == [str(row["core"]), str(row["dead"])]
            assert cells[6] == f"{100 * row['macs']:.1f}"
            assert cells[9] == f"{row['within']:.2f}"
        summary = printed(summary_table(told.result))
        honest = next(line for line in summary.splitlines() if "honest" in line)
        for value in (*(told["honest"][key] for key in ("mean", "std", "min", "max")), told["estimate"]["honest"]):
            assert f" {100 * value:.2f} " in honest
        assert f"{told['routes']:,} distinct routes" in summary

    def test_tables_fit_80_columns(self, of_run):
        text = printed(layer_table(of_run.result), width=80)
        assert "…" not in text
        assert "layer3.0.conv2 " in text

    def test_without_an_estimate_nothing_is_said_to_be_predicted(self, of_saved):
        line = next(line for line in printed(summary_table(of_saved.result)).splitlines() if "honest" in line)
        assert line.rstrip("│ ").endswith(" -")


class TestHeat:
    LAYER = "layer2.0.conv2"

    def test_dense_is_the_model_without_gates_and_masked_what_it_passes_on(self, model, task):
        data = image_data(task)
        before = deepcopy(model.state_dict())
        heat = heat_maps(model, data, "test", self.LAYER)
        inputs = data.normalization.apply(heat.images)

        def response(network):
            """What leaves the norm of the layer, behind its activation, by a hook of our own."""
            found = []
            handle = network.layer2[0].bn2.register_forward_hook(lambda m, a, out: found.append(out))
            with torch.no_grad():
                network(inputs)
            handle.remove()
            return found[0].abs().mean(1)  # the activation behind this norm comes after the sum

        torch.testing.assert_close(heat.dense, response(detach_gates(deepcopy(model))))
        torch.testing.assert_close(heat.masked, response(model))
        for number, (one, other) in enumerate(zip(heat.dense.flatten(1).numpy(), heat.masked.flatten(1).numpy(), strict=True)):
            expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert float(heat.cosine[number]) == pytest.approx(expected, rel=1e-5)
            assert float(heat.correlation[number]) == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-5)
        assert not torch.allclose(heat.dense, heat.masked)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_each_image_is_of_another_class(self, model, task):
        heat = heat_maps(model, image_data(task), "test", self.LAYER)
        images = image_data(task).test
        labels = [int(images.labels[(images.images == image).flatten(1).all(1)][0]) for image in heat.images]
        assert labels == [0, 1, 2, 3, 4, 5]
        masks = []
        with torch.no_grad(), listening(model, lambda p: masks.append(p.mask) if p.gate.site.layer == self.LAYER else None):
            model(image_data(task).normalization.apply(heat.images))
        assert heat.kept.tolist() == masks[0].sum(1).tolist()
        assert (heat.filters, heat.layer) == (32, self.LAYER)

    def test_open_gates_leave_the_maps_equal(self, model, task):
        opened = deepcopy(model)
        with torch.no_grad():
            for gate in gates_of(opened).values():
                gate.bias.fill_(1e6)
        heat = heat_maps(opened, image_data(task), "test", self.LAYER)
        assert torch.equal(heat.dense, heat.masked)
        torch.testing.assert_close(heat.cosine, torch.ones(6))
        assert heat.kept.tolist() == [32] * 6


class TestPictures:
    def test_they_show_something_and_are_the_same_again(self, saved, of_saved, tmp_path):
        again = view_routes(Viewing(str(saved), out=tmp_path))["pictures"]
        for one, two in zip(of_saved["pictures"], again, strict=True):
            content = Path(one).read_bytes()
            assert content == Path(two).read_bytes()
            if one.endswith(".png"):
                image = Image.open(io.BytesIO(content)).convert("RGB")
                assert min(image.size) > 400
                assert len(image.getcolors(1 << 24)) > 50
            else:
                assert ElementTree.fromstring(content).tag.endswith("svg")

    def test_bars_of_the_core_figure_have_the_heights_of_the_layers(self):
        layers = [
            {"layer": "one", "filters": 16, "kept": 0.5, "std": 0.1, "core": 4},
            {"layer": "two", "filters": 32, "kept": 0.25, "std": 0.0, "core": 8},
        ]
        (axes,) = drawn(core_chart([SimpleNamespace(**layer) for layer in layers], "title")).axes
        heights = [
            [bar.get_height() for bar in bars] for bars in axes.containers if len(bars) == 2 and hasattr(bars, "patches")
        ]
        assert heights == [[16, 32], [8, 8], [4, 8]]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "two"]

    def test_the_layer_of_the_heat_maps_can_be_chosen(self, saved, tmp_path):
        told = view_routes(Viewing(str(saved), out=tmp_path, layer="conv1"))
        assert told["heat"]["layer"] == "conv1"
        with pytest.raises(UnknownNameError, match="no gated layer named 'conv7'"):
            view_routes(Viewing(str(saved), out=tmp_path, layer="conv7"))


def test_a_model_without_gates_has_no_routes(tmp_path, task):
    mg.save(task.build(), tmp_path / "plain")
    with pytest.raises(MicrogliaError, match=r"plain has no gates.*--method ftwt"):
        view_routes(Viewing(str(tmp_path / "plain")))
    with pytest.raises(MicrogliaError, match="resnet8 has no gates"):
        view_routes(Viewing("resnet8"))
    assert not (tmp_path / "plain-routes").exists()
