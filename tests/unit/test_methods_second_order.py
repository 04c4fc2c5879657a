"""OBD, OBS, WoodFisher, oBERT and WoodTaylor against closed forms, and as procedures."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError, MicrogliaError, PatternError, ScoreError, UnknownNameError
from microglia.core.layers import prunable_layers
from microglia.core.patterns import NM, Block, Unstructured
from microglia.data import ImageData
from microglia.methods import Obd, Obs, WoodFisher, methods
from microglia.methods.procedure import train
from microglia.methods.quadratic import Quadratic, blocks_of, diagonal_blocks, group_losses, groups_of, run_values, taken
from microglia.scores import Evidence, curvature_rows, curvatures, estimators, scores
from microglia.storage.run import Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy
from microglia.train.optim import FitConfig

ALPHA = 1e-3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def curvature(size=8, rows=20, blocks=1, alpha=ALPHA):
    """Returns random blocks of curvature, and F of the first one."""
    x = torch.randn(blocks, rows, size, generator=generator(), dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=generator(1), dtype=torch.float64)
    return Quadratic(x, rows, alpha), x[0].T @ x[0] / rows + alpha * torch.eye(size, dtype=torch.float64)


def constrained(hessian, weight, gone, gradient=None):
    """Returns (delta, change) that minimize g^T delta + delta^T H delta / 2 with delta = -w at ``gone``, by the KKT system."""
    size, count = len(weight), len(gone)
    system = torch.zeros(size + count, size + count, dtype=torch.float64)
    system[:size, :size] = hessian
    for row, q in enumerate(gone):
        system[size + row, q] = system[q, size + row] = 1
    gradient = torch.zeros(size, dtype=torch.float64) if gradient is None else gradient
    delta = torch.linalg.solve(system, torch.cat([-gradient, -weight[list(gone)]]))[:size]
    return delta, gradient @ delta + delta @ hessian @ delta / 2


def weights(size=8, seed=3):
    return torch.randn(size, generator=generator(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ the quadratic model
@pytest.mark.parametrize("rows", [4, 20])  # fewer and more than weights: both ways to the inverse
def test_the_inverse_is_the_one_of_the_recursion(rows):
    model, matrix = curvature(rows=rows)
    recursion = torch.eye(8, dtype=torch.float64) / ALPHA
    for x in model.rows[0]:
        step = recursion @ x
        recursion = recursion - torch.outer(step, step) / (rows + x @ step)
    torch.testing.assert_close(model.inverse()[0], recursion)
    torch.testing.assert_close(model.inverse()[0] @ matrix, torch.eye(8, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("gradient", [False, True])
def test_losses_and_compensation_are_the_constrained_minimum(rows, gradient):
    model, matrix = curvature(rows=rows)
    weight, gone = weights(), [1, 4, 5]
    g = model.rows[0].mean(0) if gradient else torch.zeros(8, dtype=torch.float64)
    delta, change = constrained(matrix, weight, gone, g)
    kept = torch.ones(1, 8, dtype=torch.bool)
    kept[0, gone] = False
    found = model.compensated(weight[None], kept, gradient=gradient)[0]
    torch.testing.assert_close(found, weight + delta, atol=1e-9, rtol=1e-7)
    assert not found[gone].any()
    seen = model.unconstrained(weight[None])[0] if gradient else weight
    least = -g @ torch.linalg.solve(matrix, g) / 2
    loss = group_losses(seen[gone], model.inverse()[0][gone][:, gone])
    torch.testing.assert_close(loss + least, change)


def test_one_removal_is_never_dearer_than_deletion_alone_and_equal_for_a_diagonal():
    model, matrix = curvature()
    weight = weights()
    inverse = model.inverse()[0]
    losses = group_losses(weight[:, None], inverse.diagonal()[:, None, None])
    assert bool((losses <= weight.square() * matrix.diagonal() / 2 + 1e-12).all())
    plain = Quadratic(torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))[None], 1, ALPHA)
    losses = group_losses(weight[:, None], plain.inverse()[0].diagonal()[:, None, None])
    torch.testing.assert_close(losses, weight.square() * (torch.arange(1.0, 9.0, dtype=torch.float64) ** 2 + ALPHA) / 2)
    kept = torch.ones(1, 8, dtype=torch.bool)
    kept[0, 2] = False
    torch.testing.assert_close(plain.compensated(weight[None], kept), (weight * kept[0])[None])


def test_the_joint_solution_beats_the_sum_of_single_ones():
    model, matrix = curvature()
    weight, gone = weights(), [0, 3, 6]
    inverse = model.inverse()[0]
    single = -sum(weight[q] / inverse[q, q] * inverse[:, q] for q in gone)
    single[gone] = -weight[gone]
    joint, _ = constrained(matrix, weight, gone)
    assert joint @ matrix @ joint < single @ matrix @ single - 1e-6


def test_blocks_of_one_weight_are_the_diagonal_fisher_and_one_block_is_the_whole():
    rows = torch.randn(30, 12, generator=generator(), dtype=torch.float64)
    small = blocks_of(groups_of(Unstructured(), (3, 4)), 1)
    found = Quadratic(taken(rows, small.flatten(1)).movedim(0, 1), 30, ALPHA).inverse()
    torch.testing.assert_close(found[:, 0, 0], 1 / (rows.square().mean(0) + ALPHA))
    whole = blocks_of(groups_of(Unstructured(), (3, 4)), 500)
    assert whole.shape == (1, 12, 1)
    found = Quadratic(taken(rows, whole.flatten(1)).movedim(0, 1), 30, ALPHA).inverse()[0]
    torch.testing.assert_close(found, torch.linalg.inv(rows.T @ rows / 30 + ALPHA * torch.eye(12, dtype=torch.float64)))


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 2), Block(3, 5), NM(2, 4)])
@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (4, 6, 3, 3)])
def test_groups_hold_every_weight_once_with_its_unit(pattern, shape):
    groups = groups_of(pattern, shape)
    real = groups[groups >= 0]
    assert sorted(real.tolist()) == list(range(torch.Size(shape).numel()))
    values = torch.rand(pattern.sizes(shape).shape, generator=generator())
    values = values[:, :1].expand_as(values).contiguous() if isinstance(pattern, NM) else values
    flat = pattern.expand(values, shape).flatten()
    for group in groups:
        assert flat[group[group >= 0]].unique().numel() == 1
    assert blocks_of(groups, 10).flatten(0, 1)[: len(groups)].equal(groups)


def test_runs_lose_the_pair_that_costs_least_together():
    model, matrix = curvature(size=4)
    weight, inverse = weights(4), model.inverse()
    costs = {gone: float(constrained(matrix, weight, gone)[1]) for gone in itertools.combinations(range(4), 2)}
    best = min(costs, key=costs.get)
    values = run_values(weight[None, None], diagonal_blocks(inverse, 4), 2)[0, 0]
    assert set(values.argsort()[:2].tolist()) == set(best)
    assert bool((run_values(weight[None, None], diagonal_blocks(inverse, 4), 4) >= 1).all())


# ------------------------------------------------------------------------------------------------------------------- curvature
def regression(outputs=1):
    torch.manual_seed(0)
    x = torch.randn(30, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    model = nn.Linear(6, outputs, bias=False).double()
    return model, Evidence([(x[:10], x[:10, :outputs] * 2), (x[10:], x[10:, :outputs] * 2)], functional.mse_loss), x


def hidden():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()


def labelled(count=7):
    return torch.randn(count, 5, generator=generator(), dtype=torch.float64), torch.randint(3, (count,), generator=generator())


def test_gauss_newton_of_any_loss_is_the_hessian_of_a_linear_model():
    model, evidence, x = regression(2)
    rows = curvature_rows("gauss-newton", model, prunable_layers(model), evidence)
    flat = rows.values["weight"].flatten(1)
    loss = torch.func.hessian(lambda w: functional.mse_loss(functional.linear(x, w), x[:, :2] * 2))(model.weight.detach())
    torch.testing.assert_close(flat.T @ flat / rows.count, loss.reshape(12, 12))


@pytest.mark.parametrize("name", ["gauss-newton", "hutchinson"])
def test_obd_is_the_diagonal_of_the_hessian_of_a_net_with_a_hidden_linear_layer(name, monkeypatch):
    monkeypatch.setattr("microglia.scores.second_order.DRAWS", 3000)
    model, (x, y) = hidden(), labelled()
    layers = prunable_layers(model)
    found = estimators[name](model, layers, Evidence([(x, y)], functional.cross_entropy))
    for key, layer in layers.items():

        def loss(weight, key=key):
            return functional.cross_entropy(torch.func.functional_call(model, {key: weight}, x), y)

        diagonal = torch.func.hessian(loss)(layer.weight.detach()).flatten(2).flatten(0, 1).diagonal().view(layer.shape)
        exact = (layer.weight.square() * diagonal / 2).detach()
        tolerance = 1e-12 if name == "gauss-newton" else 0.05 * float(exact.abs().max())
        torch.testing.assert_close(found[key], exact, atol=tolerance, rtol=1e-7 if name == "gauss-newton" else 0.2)
        if name == "gauss-newton":
            assert bool((found[key] >= 0).all())


def test_hutchinson_is_the_diagonal_of_each_batch_by_its_examples():
    """Where the Hessian is diagonal one draw is exact: batches of unequal size then give the whole set's mean."""
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]
    evidence = Evidence([(x[:3], x[:3, :1]), (x[3:], x[3:, :1])], functional.mse_loss)
    found = scores["hutchinson"](model, prunable_layers(model), evidence)["weight"]
    torch.testing.assert_close(found, (model.weight.square() * 2 * x.square().mean(0) / 2).detach())


def test_the_curvature_of_a_shared_weight_is_that_of_its_uses_together():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    images, labels = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found = scores["obd"](conv, prunable_layers(conv), Evidence([(images, labels)], functional.cross_entropy))["0.weight"]
    rows = curvature_rows("gauss-newton", conv, prunable_layers(conv), Evidence([(images, labels)], functional.cross_entropy))
    by_rows = rows.values["0.weight"].square().sum(0) / rows.count
    torch.testing.assert_close(found, (conv[0].weight.square() * by_rows / 2).detach())


def test_masked_weights_have_no_rows_and_the_model_stays_as_it_is():
    model, evidence, _ = regression()
    mg.mask(model, {"weight": torch.tensor([[True, False, True, True, True, False]])})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = curvature_rows("fisher", model, prunable_layers(model), evidence, examples=7).values["weight"]
    assert rows.shape == (2 + 3, 1, 6)
    assert not rows[..., [1, 5]].any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------------------- OBS
def test_removals_one_by_one_with_down_dates_are_the_joint_solution():
    model, evidence, x = regression()
    start, hessian = model.weight.detach()[0].clone(), 2 * x.T @ x / len(x) + 1e-6 * torch.eye(6, dtype=torch.float64)
    pruner = Obs(model, density=0.5, evidence=evidence)
    gone = (~pruner.masks["weight"][0]).nonzero().flatten().tolist()
    assert len(gone) == 3
    torch.testing.assert_close(model.weight.detach()[0], start + constrained(hessian, start, gone)[0], atol=1e-9, rtol=1e-7)
    assert not model.weight[0, gone].any()
    first = min(range(6), key=lambda q: float(constrained(hessian, start, [q])[1]))
    assert first in gone
    again, evidence, _ = regression()
    rows = Obs(again, density=0.5, evidence=evidence, start=False).remove(3)
    assert [row["kept"] for row in rows] == [5, 4, 3]
    total = constrained(hessian, start, gone)[1]
    torch.testing.assert_close(torch.tensor(sum(row["loss"] for row in rows), dtype=torch.float64), total, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("pattern", "together"), [("unstructured", 4), ("block:2x2", 1), ("block:2x2", 3)])
def test_groups_are_removed_whole_with_exact_counts(pattern, together):
    model, (x, y) = hidden(), labelled(40)
    evidence = Evidence([(x, y)], functional.cross_entropy)
    pruner = Obs(model, density=0.5, pattern=pattern, together=together, evidence=evidence)
    assert abs(pruner.masks.kept - 16) <= (0 if pattern == "unstructured" else 3)
    for name, layer in pruner.layers.items():
        assert not layer.weight[~pruner.masks[name]].any()
        assert pruner.masks[name].any()


def test_what_is_too_dear_waits_for_retraining():
    model, evidence, _ = regression()
    pruner = Obs(model, density=0.2, evidence=evidence, start=False)
    assert pruner.remove(1, limit=-1.0) == []
    assert pruner.masks.kept == 6
    assert len(pruner.remove(1, limit=-1.0, least=2)) == 2


def test_removed_weights_stay_removed_in_the_next_round():
    model, evidence, _ = regression()
    pruner = Obs(model, density=0.2, evidence=evidence, start=False)
    pruner.remove(4)
    first = pruner.masks["weight"].clone()
    pruner.remove(2)
    assert pruner.masks.kept == 2
    assert not (pruner.masks["weight"] & ~first).any()
    assert not model.weight[~pruner.masks["weight"]].any()


# ------------------------------------------------------------------------------------------------------- OBD, WoodFisher: use
def digits_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


@pytest.fixture(scope="module")
def trained():
    data = mg.data.load_data("digits")
    images, labels = data.train.images[:600].float() / 255, data.train.labels[:600]
    model = digits_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(150):
        some = torch.arange(step * 64, step * 64 + 64) % 600
        loss = functional.cross_entropy(model(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, images, labels


def copy_of(model):
    twin = digits_net()
    twin.load_state_dict(model.state_dict())
    return twin


def test_obd_predicts_the_rise_of_the_loss_of_single_deletions():
    """At a minimum of the loss, which labels with noise keep away from 0, as the quadratic model assumes."""
    data = mg.data.load_data("digits")
    images, labels = functional.avg_pool2d(data.train.images[:300].double() / 255, 2), data.train.labels[:300].clone()
    labels[:30] = torch.randint(10, (30,), generator=generator())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 10)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = functional.cross_entropy(model(images), labels)
        value.backward()
        return value

    optimizer.step(loss)
    layers = prunable_layers(model)
    found = estimators["gauss-newton"](model, layers, Evidence([(images, labels)], functional.cross_entropy))
    predicted, measured = torch.cat([value.flatten() for value in found.values()]), []
    with torch.no_grad():
        base = functional.cross_entropy(model(images), labels)
        for layer in layers.values():
            flat = layer.weight.view(-1)
            for at, value in enumerate(flat.tolist()):
                flat[at] = 0
                measured.append(float(functional.cross_entropy(model(images), labels) - base))
                flat[at] = value
    ranks = [torch.as_tensor(v).double().argsort().argsort().double() for v in (predicted, measured)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.9


def loss_after(model, images, labels):
    with torch.no_grad():
        return float(functional.cross_entropy(model(images), labels))


def test_curvature_and_compensation_cost_less_than_magnitude(trained):
    """At a density of 0.4, no retraining; OBS with all removals on one inverse, 32 at a time."""
    model, images, labels = trained
    evidence = Evidence([(images[:150], labels[:150])], functional.cross_entropy)
    losses = {}
    for name, make in {
        "magnitude": lambda m: mg.methods.OneShot(m, density=0.4),
        "obd": lambda m: Obd(m, density=0.4, evidence=evidence),
        "obs": lambda m: Obs(m, density=0.4, together=32, evidence=evidence, alpha=1e-4),
        "woodfisher": lambda m: WoodFisher(m, density=0.4, total_steps=1, evidence=evidence, examples=1, updates=1, alpha=1e-4),
    }.items():
        twin = copy_of(model)
        pruner = make(twin)
        pruner.finish()
        assert pruner.masks.kept == round(0.4 * (64 * 12 + 120))
        losses[name] = loss_after(twin, images, labels)
    assert losses["obs"] < losses["obd"] < losses["magnitude"]
    assert losses["woodfisher"] < losses["magnitude"]


@pytest.mark.parametrize(("pattern", "kept"), [("nm:2:4", 444), ("block:4x1", 266)])
def test_units_of_woodfisher_are_whole_and_counted(trained, pattern, kept):
    model, images, labels = trained
    twin = copy_of(model)
    density = {} if pattern == "nm:2:4" else {"density": 0.3}
    evidence = Evidence([(images[:64], labels[:64])], functional.cross_entropy)
    more = {"updates": 2, "block": 48, "recomputations": 2, **density}
    pruner = WoodFisher(twin, total_steps=3, pattern=pattern, evidence=evidence, **more)
    for _ in range(3):
        pruner.step()
    pruner.finish()
    assert abs(pruner.masks.kept - kept) <= (0 if pattern == "nm:2:4" else 4)
    if pattern == "nm:2:4":
        assert bool((NM(2, 4).reduce(pruner.masks["1.weight"].float()).sum(1) == 2).all())


def test_protected_layers_keep_their_weights_and_their_values(trained):
    model, images, labels = trained
    twin = copy_of(model)
    evidence = Evidence([(images[:64], labels[:64])], functional.cross_entropy)
    WoodFisher(twin, density=0.5, total_steps=1, protect=["3"], evidence=evidence).finish()
    assert torch.equal(twin[3].weight, model[3].weight)
    assert not torch.equal(twin[1].weight, model[1].weight)


# ----------------------------------------------------------------------------------------------------- seams, wrong input
def test_a_curvature_and_an_estimator_from_outside_are_known_by_name(trained):
    model, images, labels = trained
    evidence = Evidence([(images[:8], labels[:8])], functional.cross_entropy)

    @curvatures.add("toy")
    def ones(model, layers, evidence, examples):
        yield [torch.ones(1, *layer.shape) for layer in layers.values()]

    estimators.add("toy")(scores["magnitude"])
    try:
        assert Obs(copy_of(model), density=0.9, curvature="toy", together=50, evidence=evidence).masks.kept == round(0.9 * 888)
        kept = Obd(copy_of(model), density=0.5, estimator="toy").masks
        assert kept.same(mg.methods.OneShot(copy_of(model), density=0.5).masks)
    finally:
        curvatures._items.pop("toy")
        estimators._items.pop("toy")


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda m, e: Obs(m, density=0.5), ScoreError, "give batches="),
        (lambda m, e: Obs(nn.Linear(200, 200), density=0.5, evidence=e), BudgetError, "take the method woodfisher"),
        (lambda m, e: Obs(m, density=0.5, curvature="newton", evidence=e), UnknownNameError, "curvature"),
        (lambda m, e: Obs(m, density=0.5, together=0, evidence=e), BudgetError, "together >= 1"),
        (lambda m, e: Obs(m, density=0.5, pattern="channel", evidence=e), PatternError, "too many for one group"),
        (lambda m, e: Obd(m, density=0.5, estimator="exact", evidence=e), UnknownNameError, "estimator"),
        (lambda m, e: Obd(m, density=0.5, fraction=1.0, evidence=e), BudgetError, "fraction is that of the remaining"),
        (lambda m, e: WoodFisher(m, density=0.5, total_steps=1, alpha=0.0, evidence=e), BudgetError, "alpha is a positive"),
        (lambda m, e: WoodFisher(m, density=0.5, total_steps=1, score="obd", evidence=e), ScoreError, "ranks the units"),
        (lambda m, e: WoodFisher(m, density=0.5, total_steps=1).finish(), ScoreError, "give batches="),
    ],
)
def test_wrong_input_ends_in_one_sentence(make, error, text):
    evidence = Evidence([labelled()], functional.cross_entropy)
    with pytest.raises(error, match=text) as raised:
        make(hidden(), evidence)
    assert isinstance(raised.value, MicrogliaError)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------------- durable
class Killed(BaseException):
    """Stands for kill -9."""


def digits_task():
    data = mg.data.load_data("digits")
    few = torch.arange(96)
    cut = {split: getattr(data, split).subset(few) for split in ("train", "validation", "test")}
    kinds = {"classes": data.classes, "normalization": data.normalization, "augmentation": data.augmentation}
    source = ImageSource(ImageData(name="digits", **cut, **kinds))
    return mg.Task("digits", digits_net, source, CrossEntropy(), CLASSIFICATION, data.train.images[:1] / 255)


@pytest.mark.parametrize(
    ("name", "settings", "step"),
    [
        ("woodfisher", {"updates": 3, "score_batches": 1, "score_batch_size": 16, "end": 0.9}, 4),  # between two updates
        ("obd", {"fraction": 0.3, "score_batches": 1, "score_batch_size": 16}, None),
        ("obs", {"least": 0.4, "cheap": 0.0, "together": 50, "score_batches": 1, "score_batch_size": 16}, None),
    ],
)
def test_interrupted_it_resumes_to_the_same_bits(name, settings, step, tmp_path, monkeypatch):
    task, kind = digits_task(), methods[name]
    short = FitConfig(epochs=2, batch_size=32, lr=0.05)
    config = kind.config(density=0.3, dense=short, train=short, **settings)
    whole = Run(tmp_path / "whole", {})
    expected = kind.procedure(task, whole, config).state_dict()
    with monkeypatch.context() as patched:
        if step is None:  # in the second round
            patched.setattr("microglia.methods.rounds.train", _killing(1))
        else:
            patched.setattr(WoodFisher, "step", _killing(step, WoodFisher.step))
        run = Run(tmp_path / "run", {})
        with pytest.raises(Killed):
            kind.procedure(task, run, config)
        run.close()
    again = Run(tmp_path / "run", {})
    found = kind.procedure(task, again, config).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert again.observations == whole.observations
    if step is None:
        assert [row["kept"] for row in again.observations["rounds"]["rows"]][-1] == round(0.3 * 888)


def _killing(calls, function=train):
    left = [calls]

    def called(*args, **settings):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return function(*args, **settings)

    return called


def test_gauss_newton_refuses_an_output_for_each_pixel():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))
    x, y = torch.randn(1, 1, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64)
    evidence = Evidence([(x, y)], nn.CrossEntropyLoss())
    with pytest.raises(ScoreError, match="8,192: take fisher"):
        mg.methods.Obs(model, density=0.5, curvature="gauss-newton", evidence=evidence)


def test_lists_of_boxes_are_not_cut_into_examples():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x, boxes = torch.randn(2, 4), {"boxes": torch.randn(5, 2)}
    loss = lambda outputs, targets: (outputs.mean() - targets["boxes"].mean()).square()  # noqa: E731
    evidence = Evidence([(x, boxes)], loss, count=lambda targets: 2)
    with pytest.raises(ScoreError, match="such as score_batch_size=1"):
        mg.methods.Obs(model, density=0.5, curvature="fisher", evidence=evidence)
