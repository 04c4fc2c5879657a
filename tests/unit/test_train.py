"""Training: schedules of the learning rate, the loop, resumption to the bit, recovery, evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import MicrogliaError, TrainingError
from microglia.methods.pruner import Pruner
from microglia.storage.run import Progress
from microglia.tasks.task import CLASSIFICATION, CrossEntropy, mean_metric
from microglia.train.engine import accelerator
from microglia.train.optim import learning_rate, make_optimizers
from microglia.train.recover import distillation
from microglia.train.step import Step

SHORT = mg.FitConfig(epochs=3, batch_size=256, lr=0.05)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task() -> mg.Task:
    return mg.tasks.image_task("lenet-300-100", "digits")


class Dropped(nn.Module):
    """A network whose training draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def fresh() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Dropped()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_learning_rates() -> None:
    cosine = mg.FitConfig(epochs=10, lr=0.4)
    assert learning_rate(cosine, 0, 5) == pytest.approx(0.4)
    assert learning_rate(cosine, 25, 5) == pytest.approx(0.2)
    assert learning_rate(cosine, 49, 5) == pytest.approx(0.2 * (1 + torch.cos(torch.tensor(torch.pi * 0.98)).item()))
    step = mg.FitConfig(epochs=160, lr=0.1, schedule="step")
    assert [round(learning_rate(step, e * 3, 3), 6) for e in (0, 79, 80, 119, 120, 159)] == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    warm = mg.FitConfig(epochs=4, lr=1.0, warmup_epochs=1, schedule="constant")
    rates = [learning_rate(warm, s, 4) for s in range(8)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


@pytest.mark.parametrize(
    "wrong", [{"epochs": -1}, {"batch_size": 0}, {"distill": 1.0}, {"lr": float("nan")}, {"max_batches": 0}]
)
def test_a_config_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        mg.FitConfig(**wrong)


def test_fit_learns_and_the_same_seed_gives_the_same_bits(task: mg.Task) -> None:
    one, again, other = fresh(), fresh(), fresh()
    before = torch.get_rng_state()
    rows = mg.fit(one, task, SHORT, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    mg.fit(again, task, SHORT, seed=5)
    mg.fit(other, task, SHORT, seed=6)
    assert same(state(one), state(again))
    assert not same(state(one), state(other))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["validation_accuracy"] > 0.7
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("after", [1, 2])
def test_fit_goes_on_to_the_same_bits(task: mg.Task, after: int) -> None:
    saved: list[Any] = []
    whole = fresh()
    mg.methods.OneShot(whole, density=0.3)
    mg.fit(whole, task, SHORT, seed=1, progress=Progress(None, lambda s: saved.append(_copy(s))))
    resumed = fresh()
    mg.methods.OneShot(resumed, density=0.3)
    rows = mg.fit(resumed, task, SHORT, seed=1, progress=Progress(saved[after - 1], lambda s: None))
    assert same(state(whole), state(resumed))
    assert len(rows) == 3


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_masked_weights_stay_exactly_zero(task: mg.Task, optimizer: Any) -> None:
    model = fresh()
    masks = mg.methods.OneShot(model, density=0.2).masks
    mg.fit(model, task, mg.FitConfig(epochs=1, batch_size=256, lr=0.01, optimizer=optimizer, weight_decay=1e-2))
    for name, layer in mg.core.layers.prunable_layers(model).items():
        assert not layer.raw[~masks[name]].any()
        assert layer.raw[masks[name]].all()
    assert mg.masks_of(model).same(masks)


def test_an_epoch_may_end_early(task: mg.Task) -> None:
    rows = mg.fit(fresh(), task, mg.FitConfig(epochs=2, batch_size=64, lr=1.0, max_batches=4, schedule="step"))
    assert [row["lr"] for row in rows] == pytest.approx([1.0, 0.01])  # the schedule knows the shorter epochs


def test_the_loss_of_a_short_epoch_is_the_mean_over_its_batches(task: mg.Task) -> None:
    plain = replace(task, loss=lambda outputs, targets: outputs.sum() * 0 + 3.0)
    rows = mg.fit(fresh(), plain, mg.FitConfig(epochs=1, batch_size=64, max_batches=2))
    assert rows[0]["loss"] == 3.0


def test_a_loss_that_is_not_finite_stops_before_the_step(task: mg.Task) -> None:
    model = fresh()
    with torch.no_grad():
        model.layers[1].weight[0, 0] = torch.inf
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingError, match=r"became nan in epoch 1, step 1 \(learning rate 0.05\)"):
        mg.fit(model, task, SHORT)
    assert all(torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))


def test_the_loop_serves_a_pruner(task: mg.Task) -> None:
    class Counting(Pruner):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model, density=0.5)
            self.own, self.steps = nn.Parameter(torch.ones(())), 0

        def penalty(self) -> Tensor:
            return self.own**2

        def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
            assert optimizer is not None
            self.steps += 1

        def param_groups(self) -> list[dict[str, Any]]:
            return [{"params": [self.own], "constant_lr": 0.1, "weight_decay": 0.0}]

    model = fresh()
    pruner = Counting(model)
    mg.fit(model, task, mg.FitConfig(epochs=1, batch_size=512, momentum=0.0, lr=1e-3), pruner=pruner)
    assert pruner.steps == 3
    assert float(pruner.own) == pytest.approx(0.8**3)  # own constant rate: x <- x - 0.1 * 2x


def test_bfloat16_autocast_trains(task: mg.Task) -> None:
    model = fresh()
    rows = mg.fit(model, task, mg.FitConfig(epochs=2, batch_size=256, lr=0.05, precision="bfloat16"))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bfloat16_keeps_attention_to_its_formula_on_a_cpu_and_gives_losses_float32(task: mg.Task) -> None:
    """The backward pass of the fused form is several times slower there."""
    fused: list[bool] = []
    seen: list[torch.dtype] = []

    def loss(outputs: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return functional.cross_entropy(outputs, targets)

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.register_forward_pre_hook(lambda module, inputs: fused.append(torch.backends.cuda.flash_sdp_enabled()))
    for precision in ("float32", "bfloat16"):
        step = Step(task, model, make_optimizers(SHORT, [{"params": [*model.parameters()]}]), loss, CPU, precision)
        step((torch.randn(4, 1, 8, 8), torch.arange(4)), diverged="{loss}")
    assert fused == [True, False]
    assert seen == [torch.float32, torch.float32]


def test_distillation_closed_forms() -> None:
    inputs, targets = torch.randn(5, 8), torch.randint(4, (5,))
    teacher = nn.Linear(8, 4)
    mixed = distillation(CrossEntropy(), teacher, weight=0.3, temperature=2.0)
    own = teacher(inputs)
    assert float(mixed(own, targets, inputs)) == pytest.approx(0.7 * float(CrossEntropy()(own, targets)), rel=1e-5)
    outputs = torch.randn(5, 4)
    p, q = (own / 2).softmax(1), (outputs / 2).softmax(1)
    divergence = float((p * (p.log() - q.log())).sum(1).mean())
    expected = 0.7 * float(CrossEntropy()(outputs, targets)) + 0.3 * 4 * divergence
    assert float(mixed(outputs, targets, inputs)) == pytest.approx(expected, rel=1e-5)


def test_recalibration_is_the_average_over_all_examples() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), nn.BatchNorm1d(3, track_running_stats=False)).train()
    model[1].eval()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 3, generator=generator) * 3 + 1, None) for n in (4, 10, 7)]
    mg.train.recover.recalibrate(model, batches)
    mean = sum(x.mean(0) * len(x) for x, _ in batches) / 21
    variance = sum(x.var(0) * len(x) for x, _ in batches) / 21
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, variance)
    assert model[0].momentum == 0.1
    assert [m.training for m in model] == [True, False, True]
    mg.train.recover.recalibrate(model, batches, count=1)
    torch.testing.assert_close(model[0].running_mean, batches[0][0].mean(0))


def test_recalibration_rescues_a_network_with_stale_statistics(task: mg.Task) -> None:
    model = fresh()
    mg.fit(model, task, SHORT)
    accuracy = mg.evaluate(model, task)["accuracy"]
    with torch.no_grad():
        model.layers[1].weight.mul_(30)
    assert mg.evaluate(model, task)["accuracy"] < accuracy
    mg.train.recover.recalibrate(model, task.data.batches("train", 128, shuffle=True).epoch(0))
    assert mg.evaluate(model, task)["accuracy"] > accuracy - 0.03


def test_evaluate_is_the_mean_over_examples_whatever_the_batches(task: mg.Task) -> None:
    model = fresh().train()
    small, large = mg.evaluate(model, task, batch_size=50), mg.evaluate(model, task, batch_size=1000)
    assert model.training
    assert small == pytest.approx(large)
    inputs, targets = next(iter(task.data.batches("test", 1000).epoch(0)))
    outputs = model.eval()(inputs)
    assert large["accuracy"] == pytest.approx(float((outputs.argmax(1) == targets).float().mean()))
    assert large["loss"] == pytest.approx(float(functional.cross_entropy(outputs, targets)))
    assert large["accuracy"] <= large["top5"]


def test_metrics_by_hand() -> None:
    outputs = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    targets = torch.tensor([4, 5])
    value = {name: m.value(m.statistics(outputs, targets)) for name, m in CLASSIFICATION.items()}
    assert (value["accuracy"], value["top5"]) == (0.5, 1.0)
    assert mean_metric(lambda o, t: o[:, 0]).value(torch.tensor([3.0, 2.0])) == 1.5


def test_a_task_builds_the_same_weights_every_time(task: mg.Task) -> None:
    assert same(state(task.build()), state(task.build()))
    other = mg.tasks.image_task("lenet-300-100", "digits", seed=1)
    assert not same(state(task.build()), state(other.build()))


def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(MicrogliaError, match=r"cpu, cuda or auto; got 'tpu'"):
        accelerator("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(MicrogliaError, match="torch sees no GPU"):
            accelerator("cuda")


def test_evaluation_leaves_every_module_in_its_mode(task: mg.Task) -> None:
    model = fresh().train()
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.eval()
    mg.evaluate(model, task)
    assert model.training
    assert not frozen.training
