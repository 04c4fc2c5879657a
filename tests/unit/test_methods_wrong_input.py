"""What a caller gets wrong in Python ends in one sentence that says what to do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import microglia as mg
from microglia.core.errors import BudgetError, FileError, MicrogliaError, ScoreError, TrainingError, UnknownNameError
from microglia.lab.recipe import resolve


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def smart(model: nn.Module, **settings: object) -> mg.methods.Smart:
    return mg.methods.Smart(model, pattern="block:4x4", density=0.5, total_steps=4, search=0.5, **settings)


@pytest.mark.parametrize("word", ["sparsity", "amount", "pruning_ratio"])
def test_the_fraction_removed_is_answered_with_the_fraction_kept(word):
    with pytest.raises(BudgetError, match=r"say density=..., the fraction kept, here density=0\.2"):
        mg.methods.OneShot(net(), **{word: 0.8})


def test_an_unknown_keyword_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'density'"):
        mg.methods.OneShot(net(), densty=0.5)
    with pytest.raises(UnknownNameError, match="Did you mean 'epochs'"):
        mg.FitConfig(epoch=3)


@pytest.mark.parametrize(
    ("settings", "text"), [({"scope": "everywhere"}, "erk, global, layer, row"), ({"reduction": "avg"}, "l2, max, mean, sum")]
)
def test_an_unknown_choice_names_the_choices(settings, text):
    with pytest.raises(UnknownNameError, match=text):
        mg.methods.OneShot(net(), density=0.5, **settings)
    with pytest.raises(UnknownNameError, match=text):
        resolve({"prune": {"density": 0.5, **settings}})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_model_that_can_be_masked_is_named():
    quantized = torch.ao.quantization.quantize_dynamic(net())
    for model, text in [
        (None, "got None"),
        (nn.Linear, "the class Linear itself"),
        (torch.jit.script(net()), "scripted"),
        (quantized, "0 is quantized"),
        (nn.Sequential(nn.LazyLinear(3)), "0.weight is lazy"),
    ]:
        with pytest.raises(MicrogliaError, match=text):
            mg.methods.OneShot(model, density=0.5)


def test_a_float_for_a_config_is_refused():
    with pytest.raises(BudgetError, match="say density="):
        mg.methods.OneShot(net(), 0.5)


@pytest.mark.parametrize("field", ["layers", "exclude", "protect"])
def test_a_lone_selector_is_a_list_of_one(field):
    lone, listed = (mg.methods.OneShot(net(), density=0.9, **{field: s}).masks for s in ("0", ["0"]))
    assert lone.same(listed)
    assert list(mg.methods.OneShot(net(), density=0.5, layers="type:Linear").layers) == ["0.weight", "2.weight"]


def test_numbers_of_numpy_are_numbers():
    assert mg.methods.OneShot(net(), density=np.float64(0.5)).masks.same(mg.methods.OneShot(net(), density=0.5).masks)
    assert mg.methods.OneShot(net(), density=np.float32(0.5)).masks.kept == 96
    assert mg.methods.Gradual(net(), density=0.5, total_steps=np.int64(4)).finish().kept == 96


@pytest.mark.parametrize("steps", [0, -1, 2.5, None, True])
@pytest.mark.parametrize("method", [mg.methods.Gradual, mg.methods.Smart, mg.methods.Pas])
def test_a_training_without_steps_is_refused(method, steps):
    with pytest.raises(BudgetError, match=r"total_steps of \w+ is .*, at least 1"):
        method(net(), density=0.5, total_steps=steps)


@pytest.mark.parametrize(
    ("evidence", "text"),
    [
        (torch.ones(2, 8), r"got a tensor of shape \(2, 8\)"),
        (mg.scores.Evidence(batches=torch.ones(2, 8)), r"are a list of \(inputs, targets\)"),
        (mg.scores.Evidence(batches=[torch.ones(2, 8)]), "is a pair"),
        (mg.scores.Evidence(batches=iter([])), "used up"),
    ],
)
def test_evidence_that_is_none_is_refused(evidence, text):
    with pytest.raises(ScoreError, match=text):
        mg.methods.OneShot(net(), density=0.5, score="gradient", evidence=evidence)


def test_a_generator_of_batches_can_be_read_twice():
    batch = (torch.ones(2, 8), torch.zeros(2, dtype=torch.long))
    evidence = mg.scores.Evidence(batches=(b for b in [batch]), loss=nn.functional.cross_entropy)
    for _ in range(2):
        assert mg.methods.OneShot(net(), density=0.5, score="gradient", evidence=evidence).masks.kept == 96


def test_a_dense_model_has_a_readable_empty_mask_set():
    masks = mg.masks_of(nn.Linear(2, 2))
    assert repr(masks) == "MaskSet(no layers)"
    assert masks.density == 1.0


def test_a_model_that_is_not_there_is_refused_before_its_data_is_read():
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet20'"):
        mg.tasks.image_task("resnt20", "no such data either")


def test_fit_without_a_task_or_a_config_says_so():
    with pytest.raises(TrainingError, match="The task of fit is a Task"):
        mg.fit(net(), None, None)


def test_an_unfinished_search_is_not_saved(tmp_path):
    model = net()
    pruner = smart(model)
    with pytest.raises(FileError, match=r"call pruner\.finish\(\) before save"):
        mg.save(model, tmp_path / "early")
    assert not (tmp_path / "early").exists()
    for _ in range(3):  # past the freeze, and not finished yet
        pruner.step()
    with pytest.raises(FileError, match="finish"):
        mg.save(model, tmp_path / "early")
    with pytest.warns(UserWarning, match="No optimizer moved the scores"):
        masks = pruner.finish()
    mg.save(model, tmp_path / "late")
    assert mg.masks_of(mg.load(tmp_path / "late", net())).same(masks)


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("method", [mg.methods.Smart, mg.methods.Pas])
def test_scores_that_no_optimizer_moved_are_told_of(method, with_scores):
    model = net()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]  # made before the pruner, so without its scores
    pruner = method(model, pattern="block:4x4", density=0.5, total_steps=4, search=0.5)
    if with_scores:
        optimizers += [torch.optim.SGD([{"params": g["params"], "lr": g["lr"]}]) for g in pruner.param_groups()]
    for _ in range(4):
        (model(torch.randn(4, 8)).square().mean() + pruner.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        pruner.step()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pruner.finish()
    assert any("No optimizer moved" in str(w.message) for w in told) is not with_scores


@pytest.fixture
def gloo(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("inner", [False, True])
def test_masks_attached_after_ddp_train_as_those_before(inner):
    weights = []
    for wrapped_first in (False, True):
        model = net()
        if not wrapped_first:
            mg.methods.OneShot(model, density=0.3)
        ddp = DistributedDataParallel(model)
        if wrapped_first:
            mg.methods.OneShot(model if inner else ddp, density=0.3)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            ddp(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
        weights.append({n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not torch.equal(weights[0]["0"], net()[0].weight)


@pytest.mark.usefixtures("gloo")
def test_a_method_with_scores_is_refused_on_a_wrapped_model():
    with pytest.raises(MicrogliaError, match="attach it to the model first, then wrap"):
        smart(DistributedDataParallel(net()))


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("part", ["the model", "a part of it", "around it"])
def test_a_method_with_scores_is_refused_on_what_a_wrapper_holds(part):
    model = net()
    ddp = DistributedDataParallel(model[0] if part == "around it" else model)
    if part == "around it":
        model[0] = ddp
    with pytest.raises(MicrogliaError, match="attach it to the model first, then wrap"):
        smart(model[0] if part == "a part of it" else model)


@pytest.mark.usefixtures("gloo")
@pytest.mark.filterwarnings("ignore:No optimizer moved")
def test_a_method_with_scores_takes_a_model_beside_a_wrapped_one_and_one_that_was_unwrapped():
    kept = DistributedDataParallel(net())
    model = DistributedDataParallel(net()).module
    assert smart(model).finish().kept == smart(net()).finish().kept
    assert isinstance(kept, DistributedDataParallel)
