"""Curves between solutions: their mathematics, their training, and what is measured along them."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from microglia.core.errors import MicrogliaError, TrainingError
from microglia.core.masks import MaskSet, fold, mask
from microglia.storage.changes import Change, Done
from microglia.storage.files import read_state, write_state
from microglia.storage.run import Progress
from microglia.studies.connect import ends as connect_ends
from microglia.studies.connect.curve_training import Places, learning_rate, train_curve
from microglia.studies.connect.study import Connecting, connect
from microglia.studies.space.curves import LINE, Bezier, Chain, Curve, equispaced, on_line
from microglia.studies.space.ensembling import Averaged, Cycles, cyclic_rate, fast_ensemble, probabilities
from microglia.studies.space.gauge import Gauge
from microglia.studies.space.plane import evaluate_plane, grid_axes, plane_through
from microglia.studies.space.points import combine, difference, inner, move, norm, point_of
from microglia.studies.space.profile import ensemble, polyline, profile, summary
from microglia.tasks.classification import ImageSource, image_task
from microglia.train.evaluate import evaluate
from microglia.train.fit import fit
from microglia.train.optim import FitConfig
from microglia.train.recover import recalibrate

KINDS = st.builds(Bezier, st.integers(1, 6)) | st.builds(Chain, st.integers(1, 6))
TS = st.floats(0, 1)
drawn = settings(max_examples=50, deadline=None)
SHORT = FitConfig(epochs=3, lr=0.05, batch_size=64, max_batches=5, weight_decay=5e-4)


def small(seed=0):
    """A network with batch norm and convolutions whose weights lie in channels-last order."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(96, 10)).to(memory_format=torch.channels_last)


def places(*seeds, shapes=((3, 4), (5,))):
    made = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        made.append({f"p{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)})
    return made


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def task():
    return replace(image_task("lenet-300-100", "digits"), build=small)


@pytest.fixture(scope="module")
def ends(task):
    """Two small networks of different seeds, trained a little."""
    models = [small(seed) for seed in (1, 2)]
    for seed, model in enumerate(models):
        fit(model, task, replace(SHORT, epochs=2, max_batches=None), seed=seed)
    return models


@pytest.fixture(scope="module")
def curve(ends):
    return on_line(Bezier(2), point_of(ends[0]), point_of(ends[1]))


@pytest.fixture(scope="module")
def bent(task, ends, curve):
    """The curve trained, and its rows."""
    return train_curve(ends[0], task, curve, SHORT, seed=5)


# ------------------------------------------------------------------------------------------------------------- the curves
@drawn
@given(KINDS, TS)
def test_coefficients_are_weights(kind, t):
    found = kind.coefficients(t)
    assert len(found) == kind.last + 1
    assert min(found) >= 0
    assert math.isclose(sum(found), 1, rel_tol=1e-12)


@drawn
@given(KINDS)
def test_coefficients_at_the_ends_are_exact(kind):
    assert kind.coefficients(0.0) == (1, *[0] * kind.last)
    assert kind.coefficients(1.0) == (*[0] * kind.last, 1)


def test_coefficients_are_those_of_the_paper():
    assert Bezier(2).coefficients(0.3) == pytest.approx((0.49, 0.42, 0.09))
    assert Chain(2).coefficients(0.3) == pytest.approx((0.4, 0.6, 0))  # 2 (t theta + (1/2 - t) w1)
    assert Chain(2).coefficients(0.75) == pytest.approx((0, 0.5, 0.5))
    assert Chain(1) == LINE


@drawn
@given(KINDS)
def test_ends_come_back_bit_for_bit(kind):
    curve = Curve(kind, tuple(places(*range(kind.last + 1))))
    assert same(curve.point(0.0), curve.points[0])
    assert same(curve.point(1.0), curve.points[-1])


@drawn
@given(KINDS, TS)
def test_a_straight_start_is_the_straight_line(kind, t):
    start, end = places(1, 2)
    found, line = on_line(kind, start, end).point(t), combine((start, end), (1 - t, t))
    assert all(torch.allclose(found[name], line[name], atol=2e-6) for name in line)


def test_lengths_are_chords_from_zero():
    start, end = places(1, 2)
    ts, whole = equispaced(7), norm(difference(start, end))
    for kind in (LINE, Bezier(3), Chain(3)):
        assert on_line(kind, start, end).lengths(ts) == pytest.approx([t * whole for t in ts], rel=1e-5)
    detour = Curve(Chain(2), (start, {name: value + 1 for name, value in start.items()}, start))
    assert detour.lengths([0, 0.5, 1])[-1] == pytest.approx(2 * math.sqrt(17))


def test_wrong_curves_are_refused_in_a_sentence():
    start, end = places(1, 2)
    with pytest.raises(MicrogliaError, match=r"got t = 1.5. Give numbers in \[0, 1\]"):
        on_line(LINE, start, end).point(1.5)
    with pytest.raises(MicrogliaError, match="got t = nan"):
        Bezier(2).coefficients(math.nan)
    with pytest.raises(MicrogliaError, match="3 control points; got 2"):
        Curve(Bezier(2), (start, end))
    with pytest.raises(MicrogliaError, match="one architecture"):
        on_line(LINE, start, {"p0": start["p0"]})
    with pytest.raises(MicrogliaError, match="at least 1"):
        Chain(0)
    with pytest.raises(MicrogliaError, match="at least 2 points"):
        equispaced(1)


# ----------------------------------------------------------------------------------------------------------- the training
@settings(drawn, max_examples=10)
@given(KINDS.filter(lambda kind: kind.last > 1), st.floats(0.01, 0.99), st.sampled_from([0.0, 0.1]))
def test_gradient_of_an_inner_point_is_the_coefficient_times_that_of_phi(kind, t, decay):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().train()
    names = list(dict(model.named_parameters()))
    generator = torch.Generator().manual_seed(kind.last)
    inputs, labels = torch.randn(8, 4, generator=generator).double(), torch.arange(8) % 3
    points = [
        [torch.randn(p.shape, generator=generator).double().requires_grad_() for p in model.parameters()]
        for _ in range(kind.last + 1)
    ]
    weights = kind.coefficients(t)
    phi = [sum(c * point[i] for c, point in zip(weights, points, strict=True)) for i in range(len(names))]
    loss = nn.functional.cross_entropy(functional_call(model, dict(zip(names, phi, strict=True)), (inputs,)), labels)
    loss = loss + decay / 2 * sum((value**2).sum() for value in phi)
    wanted = torch.autograd.grad(loss, [tensor for point in points[1:-1] for tensor in point])
    own = Places(list(model.parameters()), [[tensor.detach() for tensor in point] for point in points], decay)
    own.visit(weights)
    found = own.gradients(nn.functional.cross_entropy(model(inputs), labels), weights)
    for mine, theirs in zip((tensor for point in found for tensor in point), wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


@drawn
@given(st.floats(0, 1), st.floats(1e-3, 10))
def test_learning_rate_holds_falls_and_rests(progress, base):
    rate = learning_rate(base, progress)
    assert base / 100 * (1 - 1e-9) <= rate <= base
    assert abs(learning_rate(base, min(1.0, progress + 1e-6)) - rate) < 1e-5 * base
    assert learning_rate(base, 0.5) == base
    assert learning_rate(base, 0.7) == pytest.approx(base * 0.505)
    assert learning_rate(base, 0.9) == learning_rate(base, 1.0) == pytest.approx(base / 100)


def test_training_moves_the_bend_alone_and_leaves_the_model(ends, task, curve, bent):
    trained, rows = bent
    assert trained.points[0] is curve.points[0]
    assert trained.points[-1] is curve.points[-1]
    assert norm(difference(trained.inner[0], curve.inner[0])) > 0
    assert same(point_of(ends[0]), curve.points[0])
    assert same(trained.point(0.0), point_of(ends[0]))
    assert same(trained.point(1.0), point_of(ends[1]))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["lr"] == pytest.approx(learning_rate(0.05, 14 / 15))
    before = copy.deepcopy(ends[0].state_dict())
    train_curve(ends[0], task, curve, replace(SHORT, epochs=1))
    assert same(ends[0].state_dict(), before)  # batch-norm statistics too
    assert all(parameter.grad is None for parameter in small().parameters())


def test_a_resumed_training_ends_in_the_same_bits(ends, task, curve, bent, tmp_path):
    states = []
    train_curve(ends[0], task, curve, SHORT, seed=5, progress=Progress(None, lambda s: states.append(copy.deepcopy(s))))
    for done, state in enumerate(states, 1):
        write_state(tmp_path / "state", state)  # tensors come back in another order in memory
        resumed, rows = train_curve(
            ends[0], task, curve, SHORT, seed=5, progress=Progress(read_state(tmp_path / "state"), lambda s: None)
        )
        assert len(rows) == 3
        assert same(resumed.inner[0], bent[0].inner[0]), f"after {done} epochs"


def test_a_chain_of_many_bends_is_trained(ends, task):
    start = on_line(Chain(3), point_of(ends[0]), point_of(ends[1]))
    trained, _ = train_curve(ends[0], task, start, replace(SHORT, epochs=1, optimizer="adam", clip=1.0))
    assert [norm(difference(one, other)) > 0 for one, other in zip(trained.points, start.points, strict=True)] == [
        False,
        True,
        True,
        False,
    ]


def test_parameters_that_want_no_gradient_stay_on_the_line(task, curve):
    model = small()
    model[0].weight.requires_grad_(False)
    trained, _ = train_curve(model, task, curve, replace(SHORT, epochs=1))
    moved = {name: not torch.equal(value, curve.inner[0][name]) for name, value in trained.inner[0].items()}
    assert not moved["0.weight"]
    assert moved["3.weight"]


def test_masks_that_both_ends_have_are_kept(ends, task):
    kept = MaskSet({"3.weight": torch.rand(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3})
    models = [copy.deepcopy(model) for model in ends]
    for model in models:
        mask(model, kept)
        fold(model)
    curve = on_line(Bezier(2), *map(point_of, models))
    trained, _ = train_curve(models[0], task, curve, SHORT, masks=kept)
    free, _ = train_curve(models[0], task, curve, SHORT)
    outside = ~kept["3.weight"]
    assert trained.inner[0]["3.weight"][outside].count_nonzero() == 0
    assert trained.point(0.37)["3.weight"][outside].count_nonzero() == 0
    assert free.inner[0]["3.weight"][outside].count_nonzero() > 0
    with pytest.raises(MicrogliaError, match="outside the mask"):
        train_curve(ends[0], task, on_line(Bezier(2), *map(point_of, ends)), SHORT, masks=kept)
    with pytest.raises(MicrogliaError, match="no such parameter"):
        train_curve(models[0], task, curve, SHORT, masks={"4.weight": outside})


def test_a_training_that_cannot_go_on_says_so(ends, task, curve):
    before = copy.deepcopy(ends[0].state_dict())
    with pytest.raises(TrainingError, match=r"loss on the curve became (nan|inf) in epoch 1"):
        train_curve(ends[0], task, curve, replace(SHORT, lr=1e20))
    assert same(ends[0].state_dict(), before)
    with pytest.raises(MicrogliaError, match="at least one bend"):
        train_curve(ends[0], task, on_line(LINE, *curve.points[::2]), SHORT)
    with pytest.raises(MicrogliaError, match="differ"):
        train_curve(nn.Linear(2, 2), task, curve, SHORT)


# ------------------------------------------------------------------------------------------------------------ the profile
def test_integral_and_barrier_are_those_of_the_closed_form():
    ts = [i / 100 for i in range(101)]
    found = summary(ts, [3 * t**2 for t in ts], [t**2 for t in ts])  # v over the length l = 3 t^2 is l / 3
    assert found.integral == pytest.approx(0.5, abs=1e-12)
    assert found.mean == pytest.approx(sum(t**2 for t in ts) / 101)
    assert (found.min, found.max, found.barrier) == (0, 1, 0)
    hill = summary(ts, ts, [2 + t + 4 * t * (1 - t) for t in ts])
    assert hill.barrier == pytest.approx(1)  # of 4 t (1 - t), above the line 2 + t
    assert summary([0, 1], [0, 0], [2, 4]).integral == 3


@drawn
@given(st.integers(1, 5), TS)
def test_a_polyline_walks_from_place_to_place(segments, t):
    points = places(*range(segments + 1))
    path = polyline(points)
    for i, point in enumerate(points):
        assert all(torch.allclose(path(i / segments)[name], point[name], atol=1e-5) for name in point)
    assert same(path(0.0), points[0])
    piece = min(int(t * segments), segments - 1)
    share = t * segments - piece
    between = combine(points[piece : piece + 2], (1 - share, share))
    assert all(torch.allclose(path(t)[name], between[name], atol=1e-5) for name in between)


def test_a_polyline_needs_two_places():
    with pytest.raises(MicrogliaError, match="at least 1 segment"):
        polyline(places(1))


def test_profile_makes_batch_norm_anew_at_every_place(ends, task, bent):
    trained, _ = bent
    gauge = Gauge(task, ("test",), recalibrate=4, batch_size=128)
    model, before = ends[0], copy.deepcopy(ends[0].state_dict())
    found = profile(model, trained.point, gauge, [0.0, 0.4, 1.0])
    assert same(model.state_dict(), before)
    for i, t in enumerate(found.ts):
        alone = small(9)
        move(alone, trained.point(t))
        recalibrate(alone, task.data.batches("train", 128, seed=0, shuffle=True).epoch(0), count=4)
        assert found.values["test_loss"][i] == evaluate(alone, task)["loss"]
    assert found.values["test_error"] == tuple(1 - value for value in found.values["test_accuracy"])
    assert found.lengths == pytest.approx(trained.lengths(found.ts))
    stale = profile(model, trained.point, replace(gauge, recalibrate=0), [0.0, 0.4, 1.0])
    assert stale.values["test_loss"][2] != found.values["test_loss"][2]


def test_an_interrupted_profile_goes_on_place_by_place(ends, task, bent):
    gauge, states = Gauge(task, ("test",), recalibrate=2, limit=1), []
    path, ts = bent[0].point, equispaced(4)
    whole = profile(ends[0], path, gauge, ts, progress=Progress(None, lambda s: states.append(copy.deepcopy(s))))
    assert profile(ends[0], path, gauge, ts, progress=Progress(states[1], lambda s: None)) == whole
    assert len(states) == 4
    with pytest.raises(MicrogliaError, match="got t = -1"):
        profile(ends[0], path, gauge, [-1])


def test_networks_along_a_path_are_averaged(ends, task, bent):
    gauge, ts = Gauge(task, recalibrate=2), [0.0, 0.5, 1.0]
    found = ensemble(ends[0], bent[0].point, gauge, ts)
    accuracy = profile(ends[0], bent[0].point, replace(gauge, splits=("test",)), ts).values["test_accuracy"]
    assert found.alone == pytest.approx(accuracy)
    assert found.pair[0] == found.so_far[0] == found.alone[0]
    assert found.pair[1] == found.so_far[1]
    taken = []
    for t in ts:
        model = copy.deepcopy(ends[0])
        move(model, bent[0].point(t))
        replace(gauge, splits=())(model)
        taken.append(probabilities(model, task))
    labels = taken[0][1]
    mean = sum(p for p, _ in taken) / 3
    assert found.so_far[2] == float((mean.argmax(1) == labels).double().mean())
    assert found.pair[2] == float(((taken[0][0] + taken[2][0]).argmax(1) == labels).double().mean())


# ------------------------------------------------------------------------------------------------------- fast ensembling
@drawn
@given(st.floats(1e-4, 1), st.floats(0.01, 1), TS)
def test_the_cyclic_rate_goes_down_and_up_again(high, share, u):
    low = share * high
    assert cyclic_rate(0, high, low) == cyclic_rate(1, high, low) == high
    assert cyclic_rate(0.5, high, low) == low
    assert low * (1 - 1e-9) <= cyclic_rate(u, high, low) <= high * (1 + 1e-9)
    assert cyclic_rate(u, high, low) == pytest.approx(cyclic_rate(1 - u, high, low))
    assert abs(cyclic_rate(min(1.0, u + 1e-7), high, low) - cyclic_rate(u, high, low)) <= 2.1e-7 * high  # continuous


def test_cycles_know_their_middles_and_rates():
    cycles = Cycles(members=3, length=4, high=0.2, low=0.1)
    assert [epoch for epoch in range(12) if cycles.is_middle(epoch)] == [1, 5, 9]
    assert cycles.epochs == 10
    assert [cycles.rate(epoch, 0) for epoch in range(5)] == pytest.approx([0.2, 0.15, 0.1, 0.15, 0.2])
    assert cycles.rate(1, 1.0) == pytest.approx(0.1)
    for wrong in ({"length": 3}, {"members": 0}, {"low": 0.3}, {"low": 0.0}):
        with pytest.raises(MicrogliaError):
            replace(cycles, **wrong)


def test_ensembling_has_one_member_for_each_cycle_and_resumes(ends, task, tmp_path):
    config, cycles, states = replace(SHORT, max_batches=4), Cycles(3, 2, 0.05, 0.01), []
    model = copy.deepcopy(ends[0])
    rows, average = fast_ensemble(
        model, task, config, cycles, progress=Progress(None, lambda s: states.append(copy.deepcopy(s)))
    )
    assert [row["member"] for row in rows] == [1, 2, 3]
    assert [row["epoch"] for row in rows] == [1, 3, 5]
    assert average.members == 3
    assert rows[0]["ensemble"] == rows[0]["accuracy"]
    assert rows[-1]["accuracy"] == evaluate(model, task)["accuracy"]  # the last member, its statistics as trained
    assert rows[-1]["ensemble"] == average.accuracy
    write_state(tmp_path / "state", states[2])
    resumed = copy.deepcopy(ends[0])
    again, total = fast_ensemble(
        resumed, task, config, cycles, progress=Progress(read_state(tmp_path / "state"), lambda s: None)
    )
    assert same(resumed.state_dict(), model.state_dict())
    assert torch.equal(total.total, average.total)
    assert [row["ensemble"] for row in again] == [row["ensemble"] for row in rows]


def test_one_member_is_that_network(ends, task):
    model = copy.deepcopy(ends[0])
    rows, average = fast_ensemble(model, task, replace(SHORT, max_batches=2), Cycles(1, 2, 0.01, 0.01))
    assert len(rows) == 1
    assert average.accuracy == rows[0]["accuracy"] == evaluate(model, task)["accuracy"]
    with pytest.raises(MicrogliaError, match="at least one member"):
        _ = Averaged().accuracy


def test_ensembling_goes_on_with_the_optimizers_momentum(ends, task):
    config, cycles = replace(SHORT, max_batches=1), Cycles(1, 2, 0.01, 0.01)
    model = copy.deepcopy(ends[0])
    states = []
    fit(model, task, config, progress=Progress(None, lambda s: states.append(copy.deepcopy(s))))
    optimizer = states[-1]["optimizers"][0]
    warm, cold = copy.deepcopy(model), copy.deepcopy(model)
    fast_ensemble(warm, task, config, cycles, optimizer=optimizer)
    fast_ensemble(cold, task, config, cycles)
    # One step of rate 0.01 differs by the momentum that was there: 0.9 times the old buffer.
    moved = difference(point_of(warm), point_of(cold))
    for number, (name, _) in enumerate(model.named_parameters()):
        buffer = optimizer["state"][number]["momentum_buffer"]
        assert torch.allclose(moved[name], -0.01 * 0.9 * buffer, atol=1e-6)
    with pytest.raises(MicrogliaError, match="does not fit"):
        fast_ensemble(model, task, config, cycles, optimizer={"state": {}})
    optimizer["state"][0]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(MicrogliaError, match=r"it has \(3,\) for a parameter of shape \(4, 1, 3, 3\)"):
        fast_ensemble(model, task, config, cycles, optimizer=optimizer)


def test_probabilities_need_classes(ends, task):
    with pytest.raises(MicrogliaError, match="no classification"):
        probabilities(ends[0], replace(task, metrics={"loss": task.metrics["loss"]}))


# -------------------------------------------------------------------------------------------------------------- the plane
@drawn
@given(st.integers(0, 1000), st.floats(1e-3, 10))
def test_plane_has_an_orthonormal_basis_and_maps_back(seed, height):
    start, bend, end = places(seed, seed + 1, seed + 2, shapes=((20, 4), (7,)))
    bend = combine((start, end, bend), (0.5, 0.5, height))
    plane = plane_through(start, bend, end)
    assert inner(plane.across, plane.across) == pytest.approx(1, abs=1e-12)
    assert inner(plane.up, plane.up) == pytest.approx(1, abs=1e-12)
    assert inner(plane.across, plane.up) == pytest.approx(0, abs=1e-12)
    assert plane.coordinates(start) == (0, 0)
    assert plane.coordinates(end) == pytest.approx((1, 0), abs=1e-12)
    assert plane.coordinates(bend)[1] == pytest.approx(1, abs=1e-12)
    for point in (start, bend, end):
        back = plane.point(*plane.coordinates(point))
        assert norm(difference(back, point)) <= 1e-5 * norm(point)
        assert all(back[name].dtype == point[name].dtype for name in point)


def test_a_quadratic_curve_lies_in_the_plane_of_its_points(bent):
    curve = bent[0]
    plane = plane_through(*curve.points)
    for t in equispaced(5):
        point = curve.point(t)
        assert norm(difference(plane.point(*plane.coordinates(point)), point)) <= 1e-5 * norm(point)


def test_plane_needs_three_places_off_a_line():
    start, end = places(1, 2)
    with pytest.raises(MicrogliaError, match="straight line"):
        plane_through(start, combine((start, end), (0.25, 0.75)), end)
    with pytest.raises(MicrogliaError, match="same network"):
        plane_through(start, end, start)


def test_grid_of_a_plane_is_measured_around_its_corners(ends, task, bent):
    curve, model = bent[0], ends[0]
    plane = plane_through(*curve.points)
    a, b = grid_axes(plane, curve.points, 3)
    assert (a[0], a[-1], b[0], b[-1]) == pytest.approx((-0.2, 1.2, -0.2, 1.2))
    gauge, before = Gauge(task, ("test",), recalibrate=2, limit=1), copy.deepcopy(model.state_dict())
    found = evaluate_plane(model, plane, [0.0, 1.0], [0.0], gauge)
    assert same(model.state_dict(), before)
    at_ends = profile(model, on_line(LINE, *curve.points[::2]).point, gauge, [0.0, 1.0])
    assert found.values["test_loss"] == [pytest.approx(at_ends.values["test_loss"], rel=1e-4)]
    with pytest.raises(MicrogliaError, match="at least 2 rows"):
        grid_axes(plane, curve.points, 1)


# ----------------------------------------------------------------------------------------------------------- the requests
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"curve": "spline"}, "no curve named 'spline'.*bezier, chain, none"),
        ({"points": 1}, "at least 2 points, its ends; got 1"),
        ({"bends": 0}, "at least 1 bend; got 0"),
        ({"limit": 0}, "limit 0"),
        ({"plane": 1}, "at least 2 rows and columns, or 0 for no plane; got 1"),
        ({"plane": 3, "fit": FitConfig(epochs=0)}, "0 epochs. Use bezier or chain and at least 1 epoch"),
        ({"curve": "none", "ensemble": True}, "got the curve 'none'. Use bezier or chain"),
        ({"plane": 3}, "the same weights.*different seeds"),
        ({"device": "tpu"}, "cpu, cuda or auto; got 'tpu'"),
        ({"targets": ("lenet-300-100", "conv-2")}, "The two networks differ"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_trained(asked, said):
    with pytest.raises(MicrogliaError, match=f"(?s){said}"):
        connect(Connecting(**{"targets": ("lenet-300-100", "lenet-300-100")} | asked))


def test_gates_and_other_data_are_refused(task, monkeypatch):
    found = {"one": (small(), task), "other": (small(), replace(image_task("lenet-300-100", "digits"), build=small))}
    images = found["other"][1].data.images
    darker = replace(images, test=replace(images.test, images=images.test.images // 2))
    found["other"] = (small(), replace(task, data=ImageSource(darker)))
    monkeypatch.setattr(connect_ends, "open_target", lambda target, data: found[target])
    with pytest.raises(MicrogliaError, match="one and other are on different data"):
        connect(Connecting(("one", "other")))
    kind = Change(of=id, encode=str, decode=max, replay=max, chooses="gates")
    monkeypatch.setattr(connect_ends, "changes_of", lambda model: {"gates": Done(kind, 1)})
    with pytest.raises(MicrogliaError, match="one has gates"):
        connect(Connecting(("one", "one")))


# ---------------------------------------------------------------------------------------------------------- the real thing
def test_a_trained_curve_stays_below_the_straight_line():
    """Two networks of other seeds, both good: between them the line has a barrier and the curve hardly one (survey 2.1)."""
    points, config = [], FitConfig(epochs=12, lr=0.1, batch_size=64)
    for seed in (0, 1):
        task = image_task("lenet-300-100", "digits", seed=seed)
        model = task.build()
        fit(model, task, config, seed=seed)
        assert evaluate(model, task)["accuracy"] > 0.95
        points.append(point_of(model))
    gauge, ts = Gauge(task, ("test",)), equispaced(21)
    line = on_line(LINE, *points)
    curve, _ = train_curve(model, task, on_line(Bezier(2), *points), replace(config, epochs=20, lr=0.05))
    straight, bent = (profile(model, path.point, gauge, ts).summaries["test_loss"] for path in (line, curve))
    assert bent.max < straight.max
    assert bent.barrier < straight.barrier / 2
    assert all(here <= there for here, there in pairwise(curve.lengths(ts)))
