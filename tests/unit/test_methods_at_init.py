"""Pruning before training, and tickets found by it: what is kept, rewound, nested, shuffled, and never done twice."""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from microglia.core.errors import BudgetError, MicrogliaError
from microglia.core.masks import fold, mask, masks_of
from microglia.lab.execute import execute
from microglia.lab.recipe import resolve
from microglia.methods import LotteryConfig, Tickets, methods
from microglia.methods.at_init import other_weights
from microglia.methods.lottery import levels_to
from microglia.methods.procedure import evidence
from microglia.storage.run import Run
from microglia.tasks.classification import image_task
from microglia.train.fit import fit
from microglia.train.optim import FitConfig
from microglia.train.rewind import advance, fresh_optimizers, start_of, with_masks

TRAIN = FitConfig(epochs=3, max_batches=2, batch_size=16, lr=0.05)
AT_INIT = ("snip", "snip-iterative", "grasp", "synflow", "magnitude-at-init", "random-at-init")


@pytest.fixture(scope="module")
def task():
    return image_task("lenet-300-100", "digits")


@pytest.fixture(scope="module")
def normed():
    return image_task("conv-2", "digits")


def recipe(**prune):
    method = prune.pop("method", "snip")
    return resolve(
        {
            "model": "lenet-300-100",
            "method": method,
            "prune": {"density": 0.1, **prune},
            "train": {"epochs": 1, "max_batches": 4, "batch_size": 32, "lr": 0.05},
            "dense": {"epochs": 0},
            "measure": {"latency": False},
        }
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------- methods
@pytest.mark.parametrize("name", AT_INIT)
def test_every_method_keeps_exactly_the_count_and_trains_it(name):
    result = execute(recipe(method=name))
    assert result["masks"] == {"kept": 5020, "total": 50200}
    told = result["initialization"]
    assert told["kept"] == 5020
    if name != "magnitude-at-init":  # which keeps the first layer alone here: its initial weights are the largest
        assert 0 < told["effective"] <= told["kept"]
    assert sum(row["kept"] for row in told["layers"].values()) == 5020
    assert result["before"]["metrics"]["loss"] != result["pruned"]["metrics"]["loss"]


@pytest.mark.parametrize(("ablation", "same_counts"), [("shuffle", True), ("reinit", True), ("invert", False)])
def test_ablations_change_what_they_say_and_nothing_else(ablation, same_counts):
    plain, other = (execute(recipe(ablation=name))["initialization"] for name in ("none", ablation))
    counts = [{name: row["kept"] for name, row in told["layers"].items()} for told in (plain, other)]
    assert (counts[0] == counts[1]) is same_counts
    assert plain["kept"] == other["kept"]


def initial(task, **settings):
    """Returns the network of a recipe right after pruning: nothing is trained."""
    config = replace(methods["at-init"].config(density=0.1, dense=FitConfig(epochs=0), **settings), train=FitConfig(epochs=0))
    return methods["at-init"].procedure(task, Run(), config)


def test_what_is_kept_has_its_initial_weights(task):
    start = weights(task.build())
    for ablation in ("none", "shuffle", "invert"):
        model = initial(task, ablation=ablation)
        kept = masks_of(model)
        for name, value in weights(fold(model)).items():
            expected = start[name] * kept[name] if name in kept else start[name]
            assert torch.equal(value, expected)


def test_reinit_keeps_the_mask_and_shares_no_weight(task):
    plain, other = initial(task), initial(task, ablation="reinit")
    assert masks_of(plain).same(masks_of(other))
    for name, one in weights(fold(plain)).items():
        alive = one != 0
        assert not (one[alive] == weights(fold(other))[name][alive]).any()


def test_rounds_never_bring_a_weight_back_and_end_at_the_count(task):
    found = [
        masks_of(initial(task, score="snip", rounds=rounds, schedule=s)) for rounds, s in ((4, "geometric"), (4, "linear"))
    ]
    assert all(masks.kept == 5020 for masks in found)
    assert not found[0].same(found[1])


def test_batches_of_grasp_hold_as_many_of_every_class(task):
    config = methods["grasp"].config(density=0.1, score_batch_size=16)
    batches = list(evidence(task, Run(), config, per_class=5).batches)
    targets = torch.cat([y for _, y in batches])
    assert targets.bincount().tolist() == [5] * 10
    assert [len(y) for _, y in batches] == [16, 16, 16, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "at least 1"),
        ({"schedule": "sideways"}, "sideways"),
        ({"ablation": "freeze"}, "ablation"),
        ({"scope": {"*": 0.1}, "density": None, "rounds": 3}, "one budget"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(change, message):
    with pytest.raises(MicrogliaError, match=message):
        recipe(method="at-init", **change)


def test_a_checkpoint_and_a_missing_teacher_are_refused(task):
    with pytest.raises(MicrogliaError, match="leave the checkpoint out"):
        methods["snip"].check(replace(task, pretrained=True), methods["snip"].config(density=0.1))
    lost = methods["snip"].config(density=0.1, dense=FitConfig(epochs=0), train=replace(TRAIN, distill=0.5))
    with pytest.raises(MicrogliaError, match="distil"):
        methods["snip"].check(task, lost)
    with pytest.raises(MicrogliaError, match="fresh"):
        other_weights(replace(task, fresh=None), 0)


# --------------------------------------------------------------------------------------------------------------- rewinding
def test_two_stages_end_in_the_bits_of_one(normed):
    """T5.1: every tensor and buffer, momenta included; and the dense run is what `fit` alone makes."""
    model = normed.build()
    mask(model, {name: torch.ones(layer.shape) for name, layer in _layers(model).items()})
    first = start_of(model)
    whole = advance(normed, Run(), "a", model, TRAIN, start=first)
    part = advance(normed, Run(), "b", model, TRAIN, start=first, stop=1)
    again = advance(normed, Run(), "c", model, TRAIN, start=part)
    assert len(part["rows"]) == 1
    assert _same(whole, again)
    assert all(torch.equal(value, first["model"][name]) for name, value in start_of(normed_masked(normed))["model"].items())
    plain = normed.build()
    fit(plain, normed, TRAIN)
    assert all(torch.equal(value, weights(fold(model))[name]) for name, value in weights(plain).items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_state_is_left_as_it_was_by_what_starts_from_it(normed, optimizer):
    config = replace(TRAIN, optimizer=optimizer, lr=0.01)
    model = normed_masked(normed)
    state = advance(normed, Run(), "a", model, config, start=start_of(model), stop=1)
    before = deepcopy(state)
    once = advance(normed, Run(), "b", model, config, start=state)
    masks = {name: torch.ones(layer.shape) for name, layer in _layers(model).items()}
    assert _same(state, before)
    assert _same(advance(normed, Run(), "c", model, config, start=with_masks(model, state, masks)), once)
    assert _same(state, before)


def normed_masked(task):
    model = task.build()
    mask(model, {name: torch.ones(layer.shape) for name, layer in _layers(model).items()})
    return model


def _layers(model):
    from microglia.core.layers import prunable_layers

    return prunable_layers(model)


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one if k != "seconds")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def test_masks_on_a_state_clear_weights_and_momenta(normed):
    model = normed_masked(normed)
    state = advance(normed, Run(), "a", model, TRAIN, start=start_of(model), stop=2)
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(layer.shape, generator=generator) > 0.7 for name, layer in _layers(model).items()}
    made = with_masks(model, state, masks)
    momenta = made["optimizers"][0]["state"]
    for number, (name, p) in enumerate(model.named_parameters()):
        layer = name.replace("parametrizations.", "").replace(".original", "")
        if layer in masks:
            assert not p[~masks[layer]].any()
            assert torch.equal(p[masks[layer]], state["model"][name][masks[layer]])
            assert not momenta[number]["momentum_buffer"][~masks[layer]].any()
            assert momenta[number]["momentum_buffer"].any()
    assert fresh_optimizers(made)["optimizers"][0]["state"] == {}


# ----------------------------------------------------------------------------------------------------------------- tickets
def config(**settings):
    return LotteryConfig(density=0.3, train=TRAIN, dense=FitConfig(epochs=0), **settings)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_levels_are_nested_and_counted(task, scope):
    search = Tickets(task, Run(), config(scope=scope))
    levels = [search.dense()]
    for number in range(1, 4):
        levels.append(search.below(levels[-1], number))
        assert levels[-1].masks.kept == round(50200 * 0.8**number)
    assert all(below.masks.nested_in(above.masks) for above, below in pairwise(levels))
    assert levels_to(50200, 15060, 0.2) == 6


def test_half_the_rate_goes_from_the_output_layer_and_the_others_make_up(task):
    search = Tickets(task, Run(), config(scope="layer", half=("fc3",)))
    level = search.below(search.dense(), 3)
    assert level.masks.kept == round(50200 * 0.8**3)
    assert int(level.masks["fc3.weight"].sum()) == round(1000 * 0.9**3)
    densities = [float(level.masks[f"fc{n}.weight"].float().mean()) for n in (1, 2)]
    assert densities[0] == pytest.approx(densities[1], abs=1e-3)


def test_rewinding_restores_every_kept_weight_bitwise(normed):
    search = Tickets(normed, Run(), config(rewind=1))
    dense = search.dense()
    masks = search.masks_below(dense, 2)
    rewound = search._rewound(dense, masks)
    for name, value in rewound["model"].items():
        layer = name.replace("parametrizations.", "").removesuffix(".original")
        if name.endswith(".original"):
            assert torch.equal(value, search.start["model"][name] * masks[layer])
        elif not name.endswith(".mask"):
            assert torch.equal(value, search.start["model"][name])  # batch norm and its statistics too
    assert len(rewound["rows"]) == 1
    assert search.start["optimizers"][0]["state"]


def test_learning_rate_rewinding_and_fine_tuning_keep_the_trained_weights(task):
    for to in ("learning-rate", "fine-tune"):
        search = Tickets(task, Run(), config(rewind=1, to=to))
        dense = search.dense()
        masks = search.masks_below(dense, 1)
        rewound = search._rewound(dense, masks)
        name = "fc1.parametrizations.weight.original"
        assert torch.equal(rewound["model"][name], dense.state["model"][name] * masks["fc1.weight"])
        assert rewound["optimizers"][0]["state"] == {}
        rates = [row["lr"] for row in search.below(dense, 1).rows[1:]]
        if to == "fine-tune":
            assert rates == [pytest.approx(TRAIN.lr * 0.01)] * 2
        else:
            assert rates == [row["lr"] for row in dense.rows[1:]]


def test_controls_keep_the_counts_and_change_the_rest(task):
    search = Tickets(task, Run(), config())
    ticket = search.below(search.dense(), 2)
    again, other = search.control(ticket, "reinit"), search.control(ticket, "shuffle")
    assert again.masks.same(ticket.masks)
    assert not other.masks.same(ticket.masks)
    assert all(other.masks[name].sum() == ticket.masks[name].sum() for name in ticket.masks)


def test_noise_gives_every_level_its_own_order(task):
    """A level that keeps everything repeats the dense training, loss by loss, unless it has its own noise."""
    losses = []
    for noise in (False, True):
        search = Tickets(task, Run(), config(noise=noise))
        dense = search.dense()
        losses.append(search.below(dense, 1, keep=50200).rows[0]["loss"] == dense.rows[0]["loss"])
    assert losses == [True, False]


def test_finished_levels_are_not_done_twice(task, tmp_path, monkeypatch):
    def all_of(directory):
        run = Run(directory)
        try:
            search = Tickets(task, run, config())
            return [search.told(search.below(search.dense(), number)) for number in (1, 2)]
        finally:
            run.close()

    once = all_of(tmp_path / "a")
    monkeypatch.setattr("microglia.train.rewind.fit", lambda *a, **k: pytest.fail("trained again"))
    assert all_of(tmp_path / "a") == once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.0}, "rate"),
        ({"rewind": 3}, "rewind"),
        ({"half": ("fc3",)}, "half"),
        ({"scope": "row"}, "globally or by layer"),
        ({"control": "reinit", "to": "fine-tune"}, "needs to='weights'"),
    ],
)
def test_wrong_tickets_are_refused(settings, message):
    with pytest.raises(BudgetError, match=message):
        config(**settings)


def test_tickets_by_name_end_at_the_density_and_tell_their_levels():
    result = execute(recipe(method="tickets", density=0.6, scope="layer", half=["fc3"]))
    assert result["masks"]["kept"] == 30120
    rows = result["levels"]["rows"]
    assert [row["level"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["test"]["accuracy"] == result["pruned"]["metrics"]["accuracy"]
    assert rows[0]["test"]["accuracy"] == result["dense"]["metrics"]["accuracy"]
    assert all(row["early_stop"]["step"] == 4 for row in rows)


def test_a_kept_network_is_an_ordinary_module():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(MicrogliaError, match="density"):
        methods["synflow"].check(
            replace(image_task("lenet-300-100", "digits"), build=lambda: model), methods["synflow"].config()
        )


def test_what_cannot_be_is_refused_before_anything_is_trained(task):
    base = methods["tickets"].config(density=0.3, dense=FitConfig(epochs=0), train=TRAIN)
    with pytest.raises(BudgetError, match=r"train.epochs=0"):
        methods["tickets"].check(task, replace(base, train=replace(TRAIN, epochs=0)))
    with pytest.raises(BudgetError, match="fewer such layers"):
        methods["tickets"].check(task, replace(base, density=0.05, scope="layer", half=("fc1", "fc2")))


def test_tickets_may_be_chosen_by_a_score_of_data(task):
    search = Tickets(task, Run(), config(score="snip", score_batch_size=16))
    assert search.below(search.dense(), 1).masks.kept == 40160
