"""Pictures of the loss around a solution, and of the way to it (survey T1.1)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import microglia as mg
from microglia.core.errors import FileError, MicrogliaError
from microglia.lab.recipe import resolve
from microglia.studies.space.gauge import Gauge
from microglia.studies.space.points import difference, inner, norm, point_of
from microglia.studies.space.trajectory import keep_place, principal_plane, project, read_trajectory
from microglia.studies.surface.grid import grid, measure_line, measure_row, place, random_direction
from microglia.tasks.classification import image_task
from microglia.train.evaluate import evaluate


@pytest.fixture(scope="module")
def task():
    return image_task("resnet8", "digits")


def gauge_of(task, split="test"):
    return Gauge(task, (split,), recalibrate=0, batch_size=64, limit=1)


@pytest.fixture(scope="module")
def plain():
    """LeNet-300-100 on digits: ReLU without batch norm."""
    return image_task("lenet-300-100", "digits")


# -------------------------------------------------------------------------------------------------------------- directions
def test_rows_get_the_norms_of_the_weights_and_vectors_nothing(task):
    point = point_of(task.build())
    found = random_direction(point, seed=1)
    for name, value in point.items():
        if value.ndim < 2:
            assert not found[name].any()
            continue
        expected = value.double().flatten(1).norm(dim=1)
        assert torch.allclose(found[name].double().flatten(1).norm(dim=1), expected, rtol=1e-6, atol=0)
    assert found.keys() == point.keys()  # parameters alone: counters and statistics of batch norm are none


def test_other_normalizations(task):
    point = point_of(task.build())
    drawn = random_direction(point, normalization="none")
    layer, weight = (random_direction(point, normalization=kind) for kind in ("layer", "weight"))
    for name, value in point.items():
        if value.ndim < 2:
            assert not any(direction[name].any() for direction in (drawn, layer, weight))
            continue
        assert float(layer[name].norm()) == pytest.approx(float(value.norm()), rel=1e-5)
        assert torch.allclose(layer[name] / layer[name].norm(), drawn[name] / drawn[name].norm(), atol=1e-6)
        assert torch.allclose(weight[name], drawn[name] * value)
    assert float(drawn["conv1.weight"].std()) == pytest.approx(1, abs=0.3)
    with pytest.raises(MicrogliaError, match="filter, layer, weight, none; got 'rows'"):
        random_direction(point, normalization="rows")


def test_directions_are_drawn_by_seed_and_nearly_orthogonal(task):
    point = point_of(task.build())
    one, again, other = (random_direction(point, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    count = sum(value.numel() for value in point.values())
    assert abs(inner(one, other) / norm(one) / norm(other)) < 5 / math.sqrt(count)


def test_pruned_weights_and_empty_filters_get_no_direction(plain):
    model = plain.build()
    keep = torch.rand(300, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    keep[5] = False
    mg.mask(model, {"fc1.weight": keep})
    masks = mg.masks_of(model)
    point = point_of(mg.fold(model))
    found = random_direction(point, masks=masks)["fc1.weight"]
    assert not found[~keep].any()
    rest = torch.arange(300) != 5
    assert torch.allclose(found[rest].norm(dim=1), point["fc1.weight"][rest].norm(dim=1), rtol=1e-5)
    assert torch.isfinite(found).all()


# ------------------------------------------------------------------------------------------------------------------- grids
@given(st.integers(1, 40), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_a_grid_is_even_and_holds_the_origin(half, reach):
    found = grid(2 * half + 1, reach)
    assert (found[0], found[half], found[-1]) == (-reach, 0.0, reach)
    assert found == [-value for value in reversed(found)]


def test_grids_that_cannot_be():
    for side, reach, text in ((4, 1.0, "odd number"), (1, 1.0, "got 1"), (5, 0.0, "above 0"), (5, math.inf, "above 0")):
        with pytest.raises(MicrogliaError, match=text):
            grid(side, reach)


def test_the_origin_is_the_model_and_everything_is_put_back(task):
    model = task.build()
    origin = point_of(model)
    directions = [random_direction(origin, seed=seed) for seed in (0, 1)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    rows = measure_row(model, origin, directions, [(0.0, 0.0), (0.5, -0.25)], gauge_of(task))
    expected = evaluate(model, task, "test", batch_size=64, limit=1)
    assert rows[0]["test_loss"] == expected["loss"]  # bitwise
    assert rows[0]["test_accuracy"] == expected["accuracy"]
    assert rows[1]["test_loss"] != rows[0]["test_loss"]
    assert (rows[1]["x"], rows[1]["y"]) == (0.5, -0.25)
    assert model.training
    for name, value in model.state_dict().items():  # num_batches_tracked, an integer, among them
        assert torch.equal(value, before[name])
    there = place(origin, directions, (0.0, 0.0))
    assert all(torch.equal(there[name], value) for name, value in origin.items())


def test_places_are_summed_in_float64():
    origin = {"w": torch.tensor([[1.0, 2.0]])}
    one, other = {"w": torch.tensor([[1e8, 1.0]])}, {"w": torch.tensor([[-1e8, 1.0]])}
    assert torch.equal(place(origin, [one, other], (1.0, 1.0))["w"], torch.tensor([[1.0, 4.0]]))


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_rescaled_relu_networks_have_one_picture_only_when_normalized(plain, factor):
    """A layer times c and its consumer over c is the same function, so its picture should be the same."""
    model = plain.build().double()
    origin = point_of(model)
    scaled = dict(origin)
    for name, by in (("fc1.weight", factor), ("fc1.bias", factor), ("fc2.weight", 1 / factor)):
        scaled[name] = origin[name] * by
    inputs, labels = next(iter(plain.data.batches("test", 64).epoch(0)))

    def picture(point, normalization):
        direction = random_direction(point, seed=3, normalization=normalization)
        return [row["loss"] for row in measure_line(model, point, direction, [-1.0, -0.5, 0.0, 1.0], loss)]

    def loss(here):
        with torch.no_grad():
            return {"loss": nn.functional.cross_entropy(here(inputs.double()), labels).item()}

    assert picture(scaled, "filter") == pytest.approx(picture(origin, "filter"), rel=1e-9)
    assert picture(scaled, "none")[2] == pytest.approx(picture(origin, "none")[2], rel=1e-9)
    assert picture(scaled, "none")[3] != pytest.approx(picture(origin, "none")[3], rel=1e-2)


# ------------------------------------------------------------------------------------------------------------ trajectories
def planted(noise=0.0, count=9, seed=0):
    """A path in a plane of a 60-dimensional space, its end at an arbitrary place, and the plane."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.linalg.qr(torch.randn(60, 2, generator=generator, dtype=torch.float64)).Q.T
    end = torch.randn(60, generator=generator, dtype=torch.float64)
    times = torch.linspace(1, 0, count, dtype=torch.float64)
    along = torch.stack([5 * times, torch.sin(3 * times)], 1)
    flat = end + along @ plane + noise * torch.randn(count, 60, generator=generator, dtype=torch.float64)
    points = [{"a": row[:48].reshape(6, 8).clone(), "b": row[48:].clone()} for row in flat]
    return points, plane, along


def flat(point):
    return torch.cat([value.flatten() for value in point.values()])


def test_a_planted_plane_is_recovered():
    points, plane, along = planted()
    found = principal_plane(points)
    one, other = (flat(direction) for direction in found.directions)
    assert float(one @ other) == pytest.approx(0, abs=1e-9)
    assert float(one @ one) == pytest.approx(1)
    assert torch.allclose(plane.T @ plane @ one, one, atol=1e-9)
    assert torch.allclose(plane.T @ plane @ other, other, atol=1e-7)
    assert sum(found.explained) == pytest.approx(1)
    for point, where in zip(points, along, strict=True):
        for how in ("inner", "least_squares"):
            coordinates = project(point, points[-1], found.directions, how)
            back = coordinates[0] * one + coordinates[1] * other
            assert torch.allclose(back, where @ plane, atol=1e-7)


def test_explained_variance_is_that_of_the_singular_values():
    points, _, _ = planted(noise=0.3)
    found = principal_plane(points)
    steps = torch.stack([flat(difference(point, points[-1])) for point in points])
    values = torch.linalg.svdvals(steps - steps.mean(0)).square()
    assert found.explained == pytest.approx((values[:2] / values.sum()).tolist())
    assert sum(found.explained) < 1


def test_least_squares_finds_the_nearest_point_for_slanted_directions():
    points, plane, along = planted()
    slanted = [{"a": row[:48].reshape(6, 8), "b": row[48:]} for row in (plane[0], plane[0] + 0.5 * plane[1])]
    x, y = project(points[0], points[-1], slanted, "least_squares")
    assert (x + y, 0.5 * y) == pytest.approx(tuple((along[0] - along[-1]).tolist()))
    assert project(points[0], points[-1], slanted)[0] == pytest.approx(float(along[0, 0]))


def test_paths_that_span_no_plane_are_refused():
    points, _, _ = planted()
    with pytest.raises(MicrogliaError, match="3 places or more; got 2"):
        principal_plane(points[:2])
    with pytest.raises(MicrogliaError, match="one line"):
        principal_plane([{"w": torch.tensor([float(t)])} for t in range(4)])
    with pytest.raises(MicrogliaError, match="one line"):
        principal_plane([points[0]] * 4)
    with pytest.raises(MicrogliaError, match="The two networks differ"):
        principal_plane([*points[:3], {"a": torch.zeros(1)}])


def test_places_are_kept_and_read_in_order(tmp_path, plain):
    model = plain.build()
    for number in (0, 2, 10):
        model.fc1.bias.data.fill_(number)
        keep_place(tmp_path / "trajectory", number, model)
    read = read_trajectory(tmp_path / "trajectory")
    assert [float(point["fc1.bias"][0]) for point in read] == [0, 2, 10]
    assert all(torch.equal(read[-1][name], value) for name, value in point_of(model).items())
    assert read_trajectory(tmp_path / "nothing") == []
    (tmp_path / "trajectory" / "000002.safetensors").write_bytes(b"damaged")
    with pytest.raises(FileError, match="damaged"):
        read_trajectory(tmp_path / "trajectory")


def test_a_run_keeps_its_trajectory_when_asked(tmp_path):
    recipe = {
        "model": "lenet-300-100",
        "method": "random-at-init",
        "prune": {"density": 0.5},
        "dense": {"epochs": 1, "max_batches": 1},
        "train": {"epochs": 3, "max_batches": 2, "batch_size": 16},
        "measure": {"latency": False, "trajectory": True},
    }
    mg.execute(resolve(recipe), tmp_path / "run")
    path = read_trajectory(tmp_path / "run" / "trajectory")
    assert len(path) == 3
    model = mg.fold(mg.load(tmp_path / "run" / "model"))
    assert all(torch.equal(value, path[-1][name]) for name, value in point_of(model).items())
    assert any(not torch.equal(value, path[0][name]) for name, value in path[-1].items())
    mg.execute(resolve({**recipe, "measure": {"latency": False}}), tmp_path / "other")
    assert not (tmp_path / "other" / "trajectory").exists()


def test_three_places_span_a_plane():
    path = [
        {"w": torch.tensor([[0.0, 0.0, 0.0]])},
        {"w": torch.tensor([[1.0, 0.0, 0.0]])},
        {"w": torch.tensor([[0.0, 1.0, 0.0]])},
    ]
    plane = principal_plane(path)
    assert sum(plane.explained) == pytest.approx(1)


def test_a_mask_of_no_parameter_is_refused():
    with pytest.raises(MicrogliaError, match="no parameter of that name"):
        random_direction({"e.weight": torch.ones(2, 2)}, masks={"h.weight": torch.ones(2, 2)})
