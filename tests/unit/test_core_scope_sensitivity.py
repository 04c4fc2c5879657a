"""Scopes as values in a table, and the densities that measured curves lead to."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import microglia as mg
from microglia.core import allocation
from microglia.core.allocation import check_scope, layer_counts, scope_files, scopes
from microglia.core.errors import BudgetError, FileError, SelectorError, UnknownNameError
from microglia.core.sensitivity import LayerCurve, Sensitivity, envelope
from microglia.lab.recipe import method_config, resolve
from microglia.methods import OneShot
from microglia.storage.sensitivity import read_sensitivity, write_sensitivity

quick = settings(deadline=None, max_examples=60)
FLAT = LayerCurve(100, ((50, 1.0), (10, 1.0)))
STEEP = LayerCurve(100, ((50, 1.5), (10, 4.0)))


def counts(found, keep, *, low=1, high=None):
    sizes = {name: curve.size for name, curve in found.curves.items()}
    return found.counts(sizes, keep, dict.fromkeys(sizes, low), high or sizes)


def test_a_layer_that_costs_nothing_goes_first():
    found = Sensitivity(1.0, {"flat": FLAT, "steep": STEEP})
    assert counts(found, 110) == {"flat": 10, "steep": 100}
    assert counts(found, 60) == {"flat": 10, "steep": 50}
    assert counts(found, 40) == {"flat": 10, "steep": 30}


def test_below_the_smallest_measured_densities_all_shrink_alike():
    assert counts(Sensitivity(1.0, {"flat": FLAT, "steep": STEEP}), 10) == {"flat": 5, "steep": 5}


def test_layers_that_cost_the_same_share():
    twins = Sensitivity(1.0, {"a": FLAT, "b": FLAT, "wide": LayerCurve(300, ((30, 1.0),))})
    assert counts(twins, 275) == {"a": 55, "b": 55, "wide": 165}


def test_the_envelope_is_monotone_and_convex():
    noisy = LayerCurve(100, ((80, 0.9), (60, 1.3), (40, 1.2), (20, 5.0), (10, 5.1)))
    assert envelope(noisy, 1.0) == [(10, 5.1), (40, 1.3), (80, 1.0), (100, 1.0)]


points = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 10)), min_size=1, max_size=5)
curves = st.lists(st.tuples(st.integers(30, 40), points), min_size=1, max_size=4)


@quick
@given(curves, st.data())
def test_the_total_and_the_bounds_are_met_exactly(layers, data):
    found = Sensitivity(1.0, {str(n): LayerCurve(size, tuple(p)) for n, (size, p) in enumerate(layers)})
    sizes = {name: curve.size for name, curve in found.curves.items()}
    high = {name: data.draw(st.integers(5, size)) for name, size in sizes.items()}
    low = {name: data.draw(st.integers(0, 5)) for name in sizes}
    keep = data.draw(st.integers(sum(low.values()), sum(high.values())))
    kept = layer_counts({name: (size,) for name, size in sizes.items()}, keep, found, low=low, high=high)
    assert sum(kept.values()) == keep
    assert all(low[name] <= kept[name] <= high[name] for name in sizes)


def estimate(curve, dense, kept):
    """Loss on the envelope, by interpolation."""
    for (left, upper), (right, lower) in itertools.pairwise(envelope(curve, dense)):
        if left <= kept <= right:
            return upper + (lower - upper) * (kept - left) / (right - left)
    raise AssertionError(kept)


@quick
@given(st.lists(st.lists(st.floats(0, 5), min_size=2, max_size=2), min_size=2, max_size=3), st.data())
def test_no_other_shares_of_the_total_have_a_smaller_estimate(losses, data):
    found = Sensitivity(1.0, {str(n): LayerCurve(9, ((2, a), (6, b))) for n, (a, b) in enumerate(losses)})
    keep = data.draw(st.integers(2 * len(losses), 9 * len(losses)))
    kept = counts(found, keep)
    total = sum(estimate(found.curves[name], 1.0, count) for name, count in kept.items())
    for other in itertools.product(range(2, 10), repeat=len(losses)):
        if sum(other) == keep:
            theirs = sum(estimate(c, 1.0, n) for c, n in zip(found.curves.values(), other, strict=True))
            assert total <= theirs + 1e-9


def test_totals_that_the_layers_do_not_admit_are_refused():
    found = Sensitivity(1.0, {"a": FLAT})
    with pytest.raises(BudgetError, match="admit 5 to 100"):
        layer_counts({"a": (100,)}, 101, found, low={"a": 5}, high={"a": 100})


# ------------------------------------------------------------------------------------------------------ in a network
@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


@pytest.fixture
def file(tmp_path):
    layers = {"0.weight": LayerCurve(600, ((300, 1.0), (60, 1.1))), "2.weight": LayerCurve(300, ((150, 2.0), (30, 9.0)))}
    path = tmp_path / "sensitivity.json"
    write_sensitivity(path, Sensitivity(1.0, layers), pattern="unstructured")
    return path


@pytest.mark.parametrize("form", ["text", "value", "folder"])
def test_masks_have_these_densities_and_the_exact_total(model, file, form):
    scope = {"text": f"sensitivity:{file}", "folder": f"sensitivity:{file.parent}", "value": read_sensitivity(file)}[form]
    kept = {name: int(mask.sum()) for name, mask in OneShot(model, density=0.4, scope=scope).masks.items()}
    assert kept == {"0.weight": 60, "2.weight": 300}
    values = {"0.weight": torch.rand(30, 20), "2.weight": torch.rand(10, 30)}
    masks = mg.select(values, pattern=mg.Unstructured(), keep=360, scope=scope)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == kept
    assert int(mg.mask(model, masks).kept) == 360


def test_blocks_meet_the_total_to_a_block(model, file):
    masks = OneShot(model, density=0.4, scope=f"sensitivity:{file}", pattern="block:5x2").masks
    assert abs(masks.kept - 360) <= 10


def test_a_protected_layer_stays_whole_and_need_not_be_measured(model):
    only = Sensitivity(1.0, {"0.weight": LayerCurve(600, ((60, 1.1),))})
    masks = OneShot(model, density=0.5, scope=only, protect=["2"]).masks
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 150, "2.weight": 300}


def test_a_schedule_goes_down_to_it(model, file):
    pruner = mg.methods.Gradual(model, density=0.4, scope=f"sensitivity:{file}", total_steps=10, updates=3)
    for _ in range(10):
        pruner.step()
    assert {name: int(mask.sum()) for name, mask in pruner.finish().items()} == {"0.weight": 60, "2.weight": 300}


def test_layers_that_differ_are_refused_before_anything_is_masked(model, file):
    other = nn.Sequential(nn.Linear(20, 31), nn.ReLU(), nn.Linear(31, 10))
    with pytest.raises(SelectorError, match=r"another network: there '0.weight' has 600 weights, here 620"):
        OneShot(other, density=0.4, scope=f"sensitivity:{file}")
    deeper = nn.Sequential(*model, nn.Linear(10, 10))
    with pytest.raises(SelectorError, match=r"'3.weight' is not among its 2"):
        OneShot(deeper, density=0.4, scope=f"sensitivity:{file}")
    assert not mg.masks_of(deeper)
    OneShot(deeper, density=0.4, scope=f"sensitivity:{file}", exclude=["3"])


def test_recipes_take_it(file):
    recipe = resolve({"method": "magnitude", "prune": {"density": 0.2, "scope": f"sensitivity:{file}"}})
    assert method_config(recipe).scope == f"sensitivity:{file}"
    with pytest.raises(UnknownNameError, match="sensitivity:FILE"):
        resolve({"method": "magnitude", "prune": {"density": 0.2, "scope": "sensitivity"}})
    with pytest.raises(UnknownNameError, match="Known: global, uniform"):
        resolve({"method": "channels", "prune": {"density": 0.2, "scope": f"sensitivity:{file}"}})
    with pytest.raises(SelectorError, match="so that its scope is global"):
        resolve({"method": "smart", "prune": {"density": 0.2, "scope": f"sensitivity:{file}"}})


# ------------------------------------------------------------------------------------------------------------ the file
def test_a_file_comes_back(file):
    found = read_sensitivity(file)
    assert found.dense == 1.0
    assert found.curves["0.weight"] == LayerCurve(600, ((300, 1.0), (60, 1.1)))
    assert json.loads(file.read_text())["pattern"] == "unstructured"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text.replace("600", "601"), "does not match its digest"),
        (lambda text: text.replace("microglia.sensitivity", "microglia.plan"), "is a microglia.plan file"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "upgrade microglia"),
        (lambda text: text[:50], "damaged or not a JSON file"),
        (lambda text: "{}", "not a file of this library"),
        (lambda text: "[1]", "holds no JSON object"),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(file, damage, sentence):
    file.write_text(damage(file.read_text()))
    with pytest.raises(FileError, match=sentence):
        read_sensitivity(file)


@pytest.mark.parametrize("loss", [math.nan, math.inf, "1", None, True])
def test_losses_that_are_no_numbers_are_refused(tmp_path, loss):
    path = tmp_path / "odd.json"
    write_sensitivity(path, Sensitivity(1.0, {"a": LayerCurve(10, ((5, loss),))}))
    with pytest.raises(FileError, match="holds no curves of layers"):
        read_sensitivity(path)


def test_a_missing_file_and_an_empty_directory_are_named(model, tmp_path):
    with pytest.raises(FileError, match=r"There is no file .*nothing.json; `microglia sensitivity` writes one"):
        OneShot(model, density=0.4, scope=f"sensitivity:{tmp_path / 'nothing.json'}")
    with pytest.raises(FileError, match=r"holds no sensitivity.json"):
        OneShot(model, density=0.4, scope=f"sensitivity:{tmp_path}")


# -------------------------------------------------------------------------------------------------- a scope of others
@pytest.fixture
def toys(monkeypatch):
    """Scopes that a package of somebody else registers."""
    monkeypatch.setattr(scopes, "_items", dict(scopes._items))
    monkeypatch.setattr(scope_files, "_items", dict(scope_files._items))
    scopes.add("last-first")(lambda shapes: {name: float(number == 1) for number, name in enumerate(shapes)})

    class Half:
        def check(self, sizes):
            if len(sizes) != 2:
                raise SelectorError("two layers, please")

        def counts(self, sizes, keep, low, high):
            first, second = sizes
            return {first: keep // 2, second: keep - keep // 2}

    scope_files.add("half")(lambda file: Half())


@pytest.mark.usefixtures("toys")
def test_a_registered_scope_needs_no_change_of_the_house(model):
    masks = OneShot(model, density=0.4, scope="last-first", layers=["*"]).masks
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 60, "2.weight": 300}
    masks = OneShot(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10)), density=0.4, scope="half:x").masks
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 180, "1.weight": 180}
    recipe = resolve({"method": "magnitude", "prune": {"density": 0.2, "scope": "last-first"}})
    assert method_config(recipe).scope == "last-first"
    with pytest.raises(UnknownNameError, match="half:FILE"):
        check_scope("quarter:x")


@pytest.mark.parametrize("scope", ["uniform", "sensitivity:", ":x", 3, None])
def test_scopes_that_are_none_are_refused(scope):
    with pytest.raises(UnknownNameError, match="There is no scope named"):
        allocation.check_scope(scope)
