"""Additions to the loop: schedules and warm-ups by their formulas, accumulation, averages, groups, rare evaluation."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import TrainingError, UnknownNameError
from microglia.lab.recipe import as_dict, resolve
from microglia.storage.run import Progress, Run
from microglia.studies.space.ensembling import Cycles, fast_ensemble
from microglia.train.average import MovingAverage
from microglia.train.groups import parameter_groups, plain_name, undecayed
from microglia.train.optim import ADDED, FitConfig, epoch_length, learning_rate, make_optimizers, refuse_additions, set_rates
from microglia.train.rewind import advance, start_of, with_masks


class Numbers:
    """Twelve examples of a regression, in the order of their numbers."""

    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3

    def __init__(self, size: int = 4) -> None:
        self.size = size

    def batches(self, split: str, batch_size: int, **rest: Any) -> Numbers:
        return Numbers(batch_size)

    def __len__(self) -> int:
        return math.ceil(12 / self.size)

    def epoch(self, number: int) -> Any:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(number))
        return ((self.x[part], self.y[part]) for part in order.split(self.size))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu()).flatten()


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net()


def task(**changed: Any) -> mg.Task:
    metrics = {"loss": mg.tasks.mean_metric(lambda o, t: (o - t) ** 2, better="lower", unit="")}
    return mg.Task("numbers", build, Numbers(), functional.mse_loss, metrics, torch.zeros(1, 3), **changed)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------------------------------------------ rates
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("final", [0.0, 0.01, 1.0])
def test_falling_schedules_follow_their_formulas(t: float, final: float) -> None:
    shapes = {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "poly": (1 - t) ** 0.7}
    for schedule, left in shapes.items():
        config = FitConfig(epochs=10, lr=0.2, schedule=schedule, final_lr=final, power=0.7)  # type: ignore[arg-type]
        assert learning_rate(config, round(t * 100), 10) == pytest.approx(0.2 * (left * (1 - final) + final), rel=1e-12)


def test_cosine_without_a_final_rate_has_the_bits_it_always_had() -> None:
    config = FitConfig(epochs=7, lr=0.137)
    for step in range(7 * 11):
        assert learning_rate(config, step, 11) == 0.137 * (1 + math.cos(math.pi * (step / 77))) / 2


def test_warm_ups() -> None:
    linear, exponential = (FitConfig(epochs=5, lr=0.4, warmup_epochs=2, warmup=w) for w in ("linear", "exponential"))
    assert [learning_rate(linear, s, 3) for s in range(6)] == pytest.approx([0.4 * (s + 1) / 7 for s in range(6)])
    assert [learning_rate(exponential, s, 3) for s in range(6)] == pytest.approx([0.4 * 0.1 ** (1 - s / 6) for s in range(6)])
    assert learning_rate(exponential, 0, 3) == pytest.approx(0.04)  # t = 0
    assert learning_rate(exponential, 6, 3) == learning_rate(linear, 6, 3) == 0.4  # the end of the warm-up


def test_groups_have_their_factor_their_start_and_their_own_rate() -> None:
    p = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    asked = [{}, {"lr_scale": 10.0}, {"warmup_from": 0.1, "lr_scale": 1.0}, {"constant_lr": 0.7}]
    config = FitConfig(epochs=4, lr=0.02, warmup_epochs=1, schedule="constant")
    (optimizer,) = make_optimizers(config, [{"params": [q], **group} for q, group in zip(p, asked, strict=True)])
    assert set_rates([optimizer], config, 1, 3) == pytest.approx(0.01)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01, 0.1, 0.1 - 0.08 * 2 / 4, 0.7])
    set_rates([optimizer], config, 3, 3)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.02, 0.2, 0.02, 0.7])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"final_lr": 1.5}, "final_lr"),
        ({"final_lr": 0.1, "schedule": "step"}, "final_lr"),
        ({"warmup_start": 0.0}, "warmup_start"),
        ({"power": 0.0}, "power"),
        ({"ema": 1.0}, "ema is a decay"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
    ],
)
def test_wrong_additions_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FitConfig(**wrong)


# ----------------------------------------------------------------------------------------------------------- accumulation
def test_accumulated_batches_are_one_larger_batch() -> None:
    small, large = build(), build()
    common = {"epochs": 3, "lr": 0.05, "clip": 1.0, "momentum": 0.9}
    with pytest.warns(UserWarning, match="2 optimizer steps"):
        rows = mg.fit(small, task(), FitConfig(batch_size=3, accumulate=2, **common))  # type: ignore[arg-type]
    expected = mg.fit(large, task(), FitConfig(batch_size=6, **common))  # type: ignore[arg-type]
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, large.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    assert [row["lr"] for row in rows] == [row["lr"] for row in expected]
    assert epoch_length(FitConfig(accumulate=2, max_batches=3), 5) == 2


def test_a_nominal_batch_accumulates_and_scales_the_decay() -> None:
    by_hand, nominal = build(), build()
    with pytest.warns(UserWarning, match="2 batches per optimizer step"):
        mg.fit(by_hand, task(), FitConfig(epochs=2, batch_size=3, accumulate=2, weight_decay=0.3))
    with pytest.warns(UserWarning, match="2 batches per optimizer step"):
        mg.fit(nominal, task(), FitConfig(epochs=2, batch_size=3, nominal_batch=5, weight_decay=0.25))  # 2 x 3 / 5
    for name, value in nominal.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("batch_size", "nominal", "batches", "scale"), [(16, 64, 4, 1.0), (48, 64, 1, 0.75), (200, 64, 1, 3.125)]
)
def test_batches_and_decay_of_a_nominal_batch(batch_size: int, nominal: int, batches: int, scale: float) -> None:
    config = FitConfig(batch_size=batch_size, nominal_batch=nominal, weight_decay=2.0)
    assert (config.batches_per_step, config.step_decay) == (batches, 2 * scale)


@pytest.mark.parametrize("wrong", [{"nominal_batch": 0}, {"nominal_batch": 64, "accumulate": 2}])
def test_a_wrong_nominal_batch_is_one_sentence(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="nominal_batch is at least 1 and chooses the batches of a step itself"):
        FitConfig(**wrong)


class Counting:
    """A pruner that counts, with a penalty on one weight of its own."""

    def __init__(self) -> None:
        self.own, self.steps, self.gradients = nn.Parameter(torch.tensor(2.0)), 0, []

    def penalty(self) -> Tensor:
        return 3 * self.own

    def step(self, optimizer: object = None) -> None:
        self.steps += 1
        self.gradients.append(float(self.own.grad))

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.own], "constant_lr": 0.0, "weight_decay": 0.0}]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_pruner_steps_and_its_penalty_counts_once_an_optimizer_step() -> None:
    pruner = Counting()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mg.fit(build(), task(), FitConfig(epochs=2, batch_size=4, accumulate=2), pruner=pruner)
    assert pruner.steps == 4  # 3 batches an epoch: a step of two, and one of what is left
    assert pruner.gradients == pytest.approx([3.0] * 4)


# ---------------------------------------------------------------------------------------------------------------- average
def test_the_average_is_what_the_formula_says() -> None:
    model = nn.Linear(1, 1, bias=False)
    average, expected = MovingAverage(model, 0.9, 5.0), float(model.weight.detach())
    for update, weight in enumerate([1.0, -2.0, 4.0], 1):
        with torch.no_grad():
            model.weight.fill_(weight)
        average.update()
        decay = 0.9 * (1 - math.exp(-update / 5.0))
        expected = decay * expected + (1 - decay) * weight
        assert float(average.values["weight"]) == pytest.approx(expected, rel=1e-6)
    with average.in_place():
        assert float(model.weight.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(model.weight.detach()) == 4.0
    average.put()
    assert float(model.weight.detach()) == pytest.approx(expected, rel=1e-6)


def test_raw_weights_are_averaged_and_the_mask_in_force_acts_on_them() -> None:
    model = nn.Sequential(layer := nn.Linear(2, 1, bias=False))
    average = MovingAverage(model, 0.5, 1e-9)  # a decay of a half from the first update on
    start = layer.weight.detach().clone()
    mg.mask(model, {"0.weight": torch.tensor([[1.0, 0.0]])})
    average.update()
    with average.in_place():
        assert float(layer.weight[0, 1]) == 0.0
        assert float(layer.weight[0, 0]) == pytest.approx(float(start[0, 0]))
    average.put()
    assert float(layer.parametrizations.weight.original[0, 1]) == 0.0  # type: ignore[union-attr,index]


def test_the_average_is_validated_and_kept_and_weights_train_as_without_it() -> None:
    plain, averaged = build(), build()
    config = FitConfig(epochs=3, batch_size=4, lr=0.05)
    states: list[Any] = []
    mg.fit(plain, task(), config)
    averaging = replace(config, ema=0.9, ema_ramp=2.0)
    rows = mg.fit(averaged, task(), averaging, progress=Progress(None, lambda s: states.append(clone(s))))
    assert same(states[-1]["model"], plain.state_dict())
    assert not same(averaged.state_dict(), plain.state_dict())
    assert rows[-1]["validation_loss"] == mg.evaluate(averaged, task(), "validation")["loss"]
    assert states[-1]["average"]["updates"] == 9


def clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clone(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value


ALL = {"epochs": 4, "batch_size": 3, "lr": 0.05, "schedule": "poly", "final_lr": 0.1, "warmup_epochs": 1}
ALL |= {"warmup": "exponential", "accumulate": 2, "ema": 0.9, "ema_ramp": 3.0, "no_decay": ("norm", "bias")}
ALL |= {"weight_decay": 0.1, "evaluate_every": 3}


@pytest.mark.filterwarnings("ignore:With accumulate")
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_training_with_all_of_them_goes_on_to_the_bit(stop: int, tmp_path: Any) -> None:
    whole, config = build(), FitConfig(**ALL)  # type: ignore[arg-type]
    rows = mg.fit(whole, task(), config)
    first = Run(tmp_path / "run", {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        first.stage("train", lambda progress: halted(progress, config, stop))
    first.close()
    model = build()

    def work(progress: Progress) -> dict[str, Any]:
        assert progress.state is not None
        return {"rows": mg.fit(model, task(), config, progress=progress)}

    second = Run(tmp_path / "run", {"a": 1})
    resumed = second.stage("train", work)["rows"]
    assert same(model.state_dict(), whole.state_dict())
    plain = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in resumed] == plain


def halted(progress: Progress, config: FitConfig, stop: int) -> dict[str, Any]:
    def log(rows: list[Any]) -> None:
        if len(rows) > stop:
            raise KeyboardInterrupt

    mg.fit(build(), task(), config, progress=progress, log=log)
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:With accumulate")
def test_two_stages_end_as_one_and_the_last_is_the_average() -> None:
    config, run = FitConfig(**ALL), Run(None)  # type: ignore[arg-type]
    whole, parts = build(), build()
    one = advance(task(), run, "a", whole, config, start=start_of(whole))
    middle = advance(task(), run, "b", parts, config, start=start_of(parts), stop=2)
    two = advance(task(), run, "c", parts, config, start=middle)
    assert same(one["model"], two["model"])
    assert same(whole.state_dict(), parts.state_dict())
    assert not same(one["model"], middle["model"])


# ----------------------------------------------------------------------------------------------------------------- groups
def test_what_has_no_decay() -> None:
    model = build()
    names = {id(p): n for n, p in model.named_parameters()}

    def meant(*selectors: str) -> set[str]:
        return {names[i] for i in undecayed(model, selectors)}

    assert meant("norm") == {"norm.weight", "norm.bias"}
    assert meant("bias") == {"body.bias", "norm.bias", "head.bias"}
    assert meant("head.*", "norm") == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    with pytest.raises(TrainingError, match=r"'haed\.\*', which is no parameter"):
        meant("haed.*")
    mg.mask(model, {"body.weight": torch.ones(6, 3)})
    assert meant("body.weight") == {names[id(p)] for n, p in model.named_parameters() if plain_name(n) == "body.weight"}


def test_weight_decay_leaves_out_norms_and_biases() -> None:
    config = FitConfig(epochs=1, batch_size=12, lr=0.1, momentum=0.0, weight_decay=0.5, no_decay=("norm", "bias"))
    model, plain = build(), build()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    mg.fit(model, task(), config)
    mg.fit(plain, task(), replace(config, weight_decay=0.0))
    free = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        decay = 0.0 if "bias" in name or "norm" in name else 0.1 * 0.5
        torch.testing.assert_close(p, free[name] - decay * start[name], rtol=1e-5, atol=1e-6)


def test_groups_of_a_task_train_at_their_own_rate_and_each_parameter_once() -> None:
    groups = lambda model: [{"params": list(model.head.parameters()), "lr_scale": 0.0, "weight_decay": 0.0}]  # noqa: E731
    model = build()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    mg.fit(model, task(groups=groups), FitConfig(epochs=1, batch_size=4))
    still = {n for n, p in model.named_parameters() if torch.equal(p, start[n])}
    assert still == {"head.weight", "head.bias"}
    head = model.head.weight
    with pytest.raises(TrainingError, match="same parameter"):
        parameter_groups(model, [{"params": [head]}, {"params": [head]}], (), ())
    (whole,) = parameter_groups(model, [], (), ())
    assert [id(p) for p in whole["params"]] == [id(p) for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:With accumulate")
def test_momenta_of_removed_weights_are_cleared_in_groups_too() -> None:
    config = FitConfig(epochs=2, batch_size=4, lr=0.05, no_decay=("body.*",), weight_decay=0.1)
    model, run = build(), Run(None)
    mg.mask(model, {"head.weight": torch.ones(1, 6), "body.weight": torch.ones(6, 3)})
    done = advance(task(), run, "a", model, config, start=start_of(model))
    kept = torch.zeros(6, 3)
    kept[0] = 1.0
    cleared = with_masks(model, done, {"head.weight": torch.ones(1, 6), "body.weight": kept})
    (optimizer,) = cleared["optimizers"]
    momenta = {name: optimizer["state"][i]["momentum_buffer"] for i, name in enumerate(cleared["parameters"])}
    assert int(momenta["body.weight"].count_nonzero()) <= 3
    assert int(momenta["head.weight"].count_nonzero()) == 6


# ------------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize(("every", "epochs", "seen"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 3, [3])])
def test_validation_every_so_many_epochs_and_at_the_last(every: int, epochs: int, seen: list[int]) -> None:
    rows = mg.fit(build(), task(), FitConfig(epochs=epochs, batch_size=4, evaluate_every=every))
    assert [row["epoch"] for row in rows if "validation_loss" in row] == seen


def test_defaults_change_nothing_and_every_addition_is_listed() -> None:
    before = {"epochs", "batch_size", "max_batches", "optimizer", "lr", "momentum", "nesterov", "weight_decay", "schedule"}
    before |= {"milestones", "gamma", "warmup_epochs", "clip", "precision", "distill", "temperature"}
    assert before | set(ADDED) == set(FitConfig.__dataclass_fields__)


def test_additions_at_their_defaults_are_no_part_of_a_recipes_identity() -> None:
    plain = as_dict(resolve({"method": "magnitude"}))
    assert not set(ADDED) & (set(plain["dense"]) | set(plain["train"]))
    changed = as_dict(resolve({"method": "magnitude", "train": {"ema": 0.99, "no_decay": ["norm"], "accumulate": 1}}))
    assert (changed["train"]["ema"], changed["train"]["no_decay"]) == (0.99, ["norm"])
    assert "accumulate" not in changed["train"]
    assert resolve(changed) == resolve({"method": "magnitude", "train": {"ema": 0.99, "no_decay": ["norm"]}})


@pytest.mark.parametrize("field", [{"accumulate": 2}, {"ema": 0.9}, {"no_decay": ("bias",)}])
def test_loops_with_steps_of_their_own_refuse_what_they_do_not_do(field: dict[str, Any]) -> None:
    refuse_additions(FitConfig(schedule="poly"), "A curve")
    (name,) = field
    with pytest.raises(TrainingError, match=f"A fast ensemble is trained without {name}"):
        fast_ensemble(build(), task(), FitConfig(**field), Cycles())


@pytest.mark.parametrize(
    ("field", "word"),
    [("schedule", "cubic"), ("warmup", "odd"), ("optimizer", "sdg"), ("precision", "float8"), ("schedule", None)],
)
def test_a_word_that_is_none_is_refused_where_the_config_is_made(field: str, word: Any) -> None:
    with pytest.raises(UnknownNameError, match=f"There is no {field} named {word!r}"):
        FitConfig(**{field: word})
