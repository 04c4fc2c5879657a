"""`microglia shifts`: clean and shifted images through gated and static models."""

import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import microglia as mg
from microglia.core.errors import DataError, MicrogliaError
from microglia.data.shifts import SHIFTS, shifted
from microglia.dynamic import Flow, GatePlan, attach_gates, find_sites, gates_of, record
from microglia.measure import count_macs
from microglia.studies.images import image_data
from microglia.studies.routes.study import counter_of
from microglia.studies.shifts.study import SEED, Shifting, compare_shifts, shifts_table
from microglia.tasks.classification import ImageSource, image_task


@pytest.fixture(scope="module")
def task():
    return image_task("resnet8", "digits")


@pytest.fixture(scope="module")
def gated(task, tmp_path_factory):
    """A saved model whose gates are random, and the model."""
    plain = task.build().eval()
    sites = find_sites(Flow(plain, task.example), plain).sites
    model = attach_gates(plain, GatePlan(sites, softmax=False).with_r(0.8), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for gate in gates_of(model).values():
            gate.weight.mul_(5)
    return str(mg.save(model, tmp_path_factory.mktemp("gated") / "mine")), model


@pytest.fixture(scope="module")
def masked(task, tmp_path_factory):
    """A saved model that kept a quarter of the weights of one layer."""
    model = task.build()
    mg.mask(model, {"layer3.0.conv2.weight": torch.arange(64 * 64 * 9).reshape(64, 64, 3, 3) % 4 == 0})
    return str(mg.save(model, tmp_path_factory.mktemp("masked") / "mine")), model


@pytest.fixture(scope="module")
def compared(gated, masked):
    return compare_shifts(Shifting((gated[0], masked[0], "resnet8"), severities=(5, 1), limit=100))


def test_conditions_are_those_asked_for_in_order(compared):
    expected = [("clean", 0), *((name, severity) for name in SHIFTS for severity in (1, 5))]
    for run in compared["runs"]:
        assert [(one["shift"], one["severity"]) for one in run["results"]] == expected
    assert (compared["data"], compared["inputs"]) == ("digits", 100)
    assert json.loads(json.dumps(compared)) == compared


def test_a_gated_model_counts_what_it_computes_on_the_shifted_images(compared, gated, task):
    """The same numbers by another way: the task with shifted images, `evaluate` and `record`."""
    results = {(one["shift"], one["severity"]): one for one in compared["runs"][0]["results"]}
    data = image_data(task)
    drawn = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(SEED))[:100].sort().values
    images = data.test.subset(drawn)
    counter = counter_of(gated[1], task, "it")
    means = set()
    for (name, severity), found in results.items():
        changed = images if name == "clean" else replace(images, images=shifted(images.images, name, severity, SEED))
        other = replace(task, data=ImageSource(replace(data, test=changed)))
        assert found["accuracy"] == pytest.approx(mg.evaluate(gated[1], other)["accuracy"], abs=1e-9)
        left = counter(record(gated[1], other.data.batches("test", 50).epoch(0)).masks).honest / counter.dense
        assert found["macs"]["mean"] == pytest.approx(float(left.mean()))
        assert found["macs"]["std"] == pytest.approx(float(left.std(correction=0)))
        assert 0 < found["agreement"]["precision"] < 1
        means.add(found["macs"]["mean"])
    assert len(means) > 5  # what is computed depends on the images


def test_a_static_model_costs_the_same_whatever_the_images(compared, masked, task):
    dense = count_macs(task.build(), task.example).total
    expected = [count_macs(masked[1], task.example).effective / dense, 1.0]
    assert 0.8 < expected[0] < 0.9
    for run, share in zip(compared["runs"][1:], expected, strict=True):
        assert not run["dynamic"]
        assert {one["macs"]["mean"] for one in run["results"]} == {share}
        assert all("agreement" not in one for one in run["results"])


def test_a_shrunk_model_costs_what_is_left_of_it(task, tmp_path):
    small = mg.prune_channels(task.build(), task.example, mg.Budget(flops=0.5), round_to=1)
    mg.save(small, tmp_path / "small")
    (run,) = compare_shifts(Shifting((str(tmp_path / "small"),), severities=(1,), limit=10))["runs"]
    ratio = count_macs(small, task.example).total / count_macs(task.build(), task.example).total
    assert run["results"][0]["macs"]["mean"] == pytest.approx(ratio)
    assert 0.4 < ratio < 0.51


def test_all_images_without_a_limit(masked, task):
    (run,) = (whole := compare_shifts(Shifting((masked[0],), severities=(1,))))["runs"]
    assert whole["inputs"] == len(image_data(task).test)
    assert run["results"][0]["accuracy"] == mg.evaluate(masked[1], task)["accuracy"]


def test_the_table_has_a_column_for_each_run(compared, gated, masked):
    console = Console(width=400, file=io.StringIO())
    console.print(shifts_table(compared.result))
    lines = [[cell.strip() for cell in line.split("│")] for line in console.file.getvalue().splitlines() if "│" in line]
    rows = {cells[1]: cells[2:5] for cells in lines}
    assert list(rows)[:4] == ["clean", "noise 1", "noise 5", "blur 1"]
    for number, run in enumerate(compared["runs"]):
        for one in run["results"][1:]:
            expected = f"{100 * one['accuracy']:.2f} ({100 * one['macs']['mean']:.1f})"
            assert rows[f"{one['shift']} {one['severity']}"][number] == expected
        mean = sum(one["accuracy"] for one in run["results"][1:]) / (len(run["results"]) - 1)
        assert rows["mean of the shifts"][number].startswith(f"{100 * mean:.2f} (")
    names = [run["name"] for run in compared["runs"]]
    assert names == [gated[0], masked[0], "resnet8"]  # both directories are called "mine"


def test_wrong_requests(gated, tmp_path):
    with pytest.raises(DataError, match="severity of a shift is 6"):
        compare_shifts(Shifting((gated[0],), severities=(1, 6)))
    with pytest.raises(MicrogliaError, match="at least 1; got 0"):
        compare_shifts(Shifting((gated[0],), limit=0))
    with pytest.raises(MicrogliaError, match="at least one run"):
        compare_shifts(Shifting(()))
    folder = tmp_path / "pictures"
    for split in ("train", "test"):
        for label in ("a", "b"):
            for number in range(4):
                place = folder / split / label / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                picture(number).save(place)
    task = image_task("lenet-300-100", str(folder))
    mg.save(task.build(), tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text(f"model: lenet-300-100\ndata: {folder}\nprune: {{density: 0.5}}\n")
    with pytest.raises(MicrogliaError, match="have different test images"):
        compare_shifts(Shifting((gated[0], str(tmp_path / "run"))))


def picture(number):
    return Image.new("L", (8, 8), 10 * number)


def test_each_condition_takes_one_pass(gated):
    passes = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: passes.append(type(module).__name__))
    try:
        compare_shifts(Shifting((gated[0],), severities=(1,), limit=4))
        before = passes.count("ResNet")
        compare_shifts(Shifting((gated[0],), severities=(1, 2), limit=4))
    finally:
        handle.remove()
    assert before >= 1 + len(SHIFTS)
    assert passes.count("ResNet") - 2 * before == len(SHIFTS)  # and nothing else is more
