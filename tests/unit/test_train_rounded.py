"""Recovery for int8: straight-through rounding that leaves the model as it was, and loses less afterwards."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import microglia as mg
from microglia.cli.exporting import Exporting, export_saved, recovered
from microglia.core.errors import MicrogliaError
from microglia.export.int8 import Int8, Int8Report
from microglia.export.int8_recovery import recovered as best
from microglia.storage.run import Progress
from microglia.train.rounded import HALF_RANGE, Ranges, fit_rounded, rounded_config, rounded_weight, rounding

FACTOR = 1000


class Times(nn.Module):
    """A constant factor for each channel of a tensor."""

    def __init__(self, factor):
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x):
        return x * self.factor


class Net(nn.Module):
    """Two convolutions; one channel between them is many times as large as the others, so that int8 loses these."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12 * 16, 10)
        scale = torch.ones(12, 1, 1, 1)
        scale[0] = FACTOR
        parametrize.register_parametrization(self.a, "weight", Times(scale))
        parametrize.register_parametrization(self.a, "bias", Times(scale.flatten()))
        parametrize.register_parametrization(self.b, "weight", Times(1 / scale.view(1, 12, 1, 1)))

    def forward(self, x):
        x = torch.relu(self.norm(self.b(torch.relu(self.a(x)))))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def task():
    return mg.tasks.image_task("lenet-5", "digits")


@pytest.fixture(scope="module")
def model(task):
    torch.manual_seed(0)
    net = Net()
    mg.fit(net, task, mg.FitConfig(epochs=3, lr=0.05, batch_size=64))
    return net.eval()


def test_weights_are_rounded_for_each_output_and_the_gradient_goes_straight_through():
    weight = torch.randn(4, 3, 2, 2, requires_grad=True)
    with torch.no_grad():
        weight[1] *= 100
        weight[2] = 0
    rounded = rounded_weight(weight)
    scale = weight.detach().abs().flatten(1).amax(1) / HALF_RANGE
    steps = rounded.detach().flatten(1)[[0, 1, 3]] / scale[[0, 1, 3], None]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert float(steps.abs().max()) == pytest.approx(HALF_RANGE)
    assert not rounded[2].any()
    assert float((rounded - weight).detach()[0].abs().max()) <= 0.5001 * float(scale[0])
    (rounded * 3).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 3))


def test_ranges_follow_the_inputs_hold_zero_and_stay_in_evaluation():
    ranges = Ranges(torch.device("cpu"))
    x = torch.linspace(1, 3, 50)
    out = ranges(x)
    assert (float(ranges.low), float(ranges.high)) == (0.0, 3.0)
    assert float((out - x).abs().max()) <= 0.5001 * 3 / 255
    ranges(torch.tensor([-1.0, 13.0]))
    assert (float(ranges.low), float(ranges.high)) == (pytest.approx(-0.1), pytest.approx(4.0))
    ranges.eval()
    assert float(ranges(torch.tensor([100.0]))) == pytest.approx(4.0, abs=0.02)
    assert float(ranges.high) == pytest.approx(4.0)


def test_a_rounded_model_is_as_before_at_the_end_also_with_masks_and_after_an_error(model, task):
    net = copy.deepcopy(model)
    mg.methods.OneShot(net, pattern=mg.Unstructured(), density=0.5).finish()
    before, keys = net(task.example), list(net.state_dict())
    with rounding(net) as count:
        assert count == 3
        net.train()(task.example)
        assert len(net.state_dict()) == len(keys) + 9
        copied = copy.deepcopy(net)
    net.eval()
    assert copied.a.forward.__self__ is copied.a
    assert list(net.state_dict()) == keys
    net.norm.load_state_dict(model.norm.state_dict())
    assert torch.equal(net(task.example), before)
    with pytest.raises(ZeroDivisionError), rounding(net):
        1 / 0  # noqa: B018
    assert torch.equal(net(task.example), before)
    with (
        pytest.raises(MicrogliaError, match="ReLU has no convolution or linear layer of its own to round"),
        rounding(nn.ReLU()),
    ):
        pass


def test_an_interrupted_recovery_ends_with_the_same_bits(model, task):
    config = replace(rounded_config(task, 30, batch_size=64), max_batches=3)
    assert config.epochs == 2
    whole, resumed, saved = copy.deepcopy(model), copy.deepcopy(model), []
    fit_rounded(whole, task, config, teacher=model)

    def kill(state):
        saved.append(copy.deepcopy(state))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_rounded(resumed, task, config, teacher=model, progress=Progress(None, kill))
    fresh = copy.deepcopy(model)
    rows = fit_rounded(fresh, task, config, teacher=model, progress=Progress(saved[0], saved.append))
    assert [row["epoch"] for row in rows] == [1, 2]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


@pytest.mark.parametrize("steps", [0, -3])
def test_a_recovery_without_steps_is_refused(steps, task):
    with pytest.raises(MicrogliaError, match=f"takes 1 step or more; got {steps}"):
        rounded_config(task, steps)


def test_steps_are_spread_over_the_epochs_that_the_data_have(task):
    batches = len(task.data.batches("train", 128))
    for steps in (1, 7, batches, batches + 1, 61):
        config = rounded_config(task, steps)
        assert config.max_batches <= batches
        assert steps <= config.epochs * config.max_batches < steps + config.epochs


def test_recover_without_int8_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(MicrogliaError, match="--recover 5 trains for int8: give it together with --int8"):
        export_saved(Exporting(tmp_path, recover=5))


def simulated(task):
    """Returns what `recovered` asks for: scores in float32 and on rounded layers, whose ranges are those of training images."""

    def rounded(model, wish):
        model = copy.deepcopy(model).eval()
        plain = score(model, wish)
        with rounding(model):
            for module in model.modules():
                module.train(isinstance(module, Ranges))
            for inputs, _ in wish.calibration:
                model(inputs)
            model.eval()
            return Int8Report(1, (plain, score(model, wish)))

    def score(model, wish):
        with torch.no_grad():
            return wish.score((model(inputs), targets) for inputs, targets in wish.evaluation)

    return rounded


def test_where_rounding_costs_too_much_the_model_is_trained_for_it(model, task, tmp_path):
    asked, before = [], [parameter.clone() for parameter in model.parameters()]

    def recover(given):
        asked.append(given)
        return recovered(given, task, steps=90, place=tmp_path)

    train, validation = (list(task.data.batches(split, 128).epoch(0)) for split in ("train", "validation"))
    wish = Int8(train, evaluation=validation, max_drop=0.1, recover=recover)
    trained, rounding = best(model, wish, simulated(task))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert trained is asked[0]
    first = rounding.before
    second = simulated(task)(trained, wish).scores
    assert first[0] - first[1] > 0.1
    assert second[1] > first[1]
    assert rounding.wish.max_drop == pytest.approx(max(0.1 - (first[0] - second[0]), second[0] - second[1]))
    report = rounding.told(Int8Report(1, second, max_drop=rounding.wish.max_drop))
    assert (report.max_drop, report.recovered_from) == (0.1, first)
    assert report.drop == pytest.approx(first[0] - second[1])
    # Asked for again, the finished state is read.
    again = recovered(copy.deepcopy(model), task, steps=90, place=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.parameters(), strict=True))
    # Where the limit holds, nothing is trained.
    assert best(model, replace(wish, max_drop=1.0), simulated(task))[0] is model
    assert len(asked) == 1


SCORES = {
    "a recovery that lowers the score in float32 by more than the limit": [(0.9, 0.5), (0.6, 0.6)],
    "a recovery that does not help": [(0.9, 0.5), (0.9, 0.5)],
}


@pytest.mark.parametrize("why", SCORES)
def test_the_given_model_stays_after(why, model):
    scores, trained = iter(SCORES[why]), copy.deepcopy(model)
    wish = Int8([], evaluation=[], max_drop=0.05, recover=lambda given: trained)
    found, rounding = best(model, wish, lambda one, wish: Int8Report(1, next(scores)))
    assert found is model
    assert (rounding.before, rounding.wish.max_drop, rounding.limit) == (None, 0.05, 0.05)
    with pytest.raises(MicrogliaError, match="recovery for int8 needs evaluation data"):
        best(model, replace(wish, evaluation=None), simulated(None))


def test_a_recovery_that_is_better_in_int8_than_in_float32_is_taken(model):
    scores, trained = iter([(0.9, 0.5), (0.8, 0.88)]), copy.deepcopy(model)
    wish = Int8([], evaluation=[], max_drop=0.05, recover=lambda given: trained)
    found, rounding = best(model, wish, lambda one, wish: Int8Report(1, next(scores)))
    assert found is trained
    report = rounding.told(Int8Report(1, (0.8, 0.88)))
    assert report.drop == pytest.approx(0.02)
    assert Int8Report(1, (0.8, 0.88)).drop <= rounding.wish.max_drop


def test_an_exported_file_is_that_of_the_recovered_model(task, tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained[1].bias += 5.0
    scores = iter([0.9, 0.5, 0.9, 0.8, 0.9, 0.85])  # of the given model, of the trained one, and of the file

    def score(pairs):
        list(pairs)
        return next(scores)

    example, images = task.example, next(iter(task.data.batches("train", 8).epoch(0)))
    wish = Int8([images], 4, evaluation=[images], score=score, max_drop=0.2, recover=lambda given: trained, correct=False)
    written = mg.export(model, tmp_path / "model.xml", example, int8=wish)
    assert (written.int8.recovered_from, written.int8.scores) == ((0.9, 0.5), (0.9, 0.85))
    assert written.int8.drop == pytest.approx(0.05)
    with torch.no_grad():
        wanted, out = trained(example), written.open()(example)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0.1 * float(wanted.abs().max()))
    assert float((out - model(example).detach()).min()) > 3
