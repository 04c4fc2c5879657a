"""Sparse training from scratch (SET, RigL): exact counts at every step, who goes, who comes and with what (survey T9.1)."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import microglia as mg
from microglia.core.allocation import layer_counts
from microglia.core.errors import BudgetError, MicrogliaError, PatternError, ScoreError, TrainingError, UnknownNameError
from microglia.core.masks import Masked
from microglia.methods import SparseTraining, SparseTrainingConfig, methods
from microglia.methods.sparse_training import DenseGradients, exchange
from microglia.storage.run import Progress, Run

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=1e-2),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 24), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(24, 10)).to(dtype)


def batch(number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(16, 1, 6, 6, generator=generator).to(dtype)
    return inputs, torch.randint(10, (16,), generator=generator)


def pruner_of(model: nn.Module, seed: int = 0, **config: Any) -> SparseTraining:
    usual = {"density": 0.2, "total_steps": 24, "every": 3}
    return SparseTraining(
        model, evidence=mg.scores.Evidence(generator=torch.Generator().manual_seed(seed)), **{**usual, **config}
    )


def advance(model: nn.Module, pruner: SparseTraining, optimizer: torch.optim.Optimizer, number: int) -> bool:
    """One step as the example in the docstring has it; tells whether the masks took it."""
    inputs, targets = batch(number)
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs), targets).backward()
    if not (replaced := pruner.replaces_step()):
        optimizer.step()
    pruner.step(optimizer)
    return replaced


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.raw.detach().clone() for name, layer in mg.core.layers.prunable_layers(model).items()}


def momenta(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """The optimizer's tensors of each weight."""
    found = {}
    for name, layer in mg.core.layers.prunable_layers(model).items():
        state = optimizer.state.get(layer.raw, {}).values()
        found[name] = [v.clone() for v in state if isinstance(v, Tensor) and v.shape == layer.shape]
    return found


def counts(masks: mg.core.masks.MaskSet) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------------------------- one exchange
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_an_exchange_drops_the_smallest_and_grows_the_largest(seed: int, density: float, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, growth = torch.randn(2, 6, 7, generator=generator).unbind()
    kept = torch.rand(6, 7, generator=generator) < density
    count = int(share * int(kept.sum()))
    renewed = exchange(kept, weight, growth, count=count, generator=generator)
    active = [int(i) for i in kept.flatten().nonzero()]
    staying = sorted(active, key=lambda i: -abs(float(weight.flatten()[i])))[: len(active) - count]
    free = [i for i in range(42) if i not in staying]
    growing = sorted(free, key=lambda i: -float(growth.flatten()[i]))[:count]
    assert sorted(staying + growing) == [int(i) for i in renewed.flatten().nonzero()]
    assert not set(staying) & set(growing)
    assert renewed.sum() == kept.sum()


def test_equals_are_exchanged_at_random_and_by_the_seed_alone() -> None:
    kept = torch.arange(40).view(5, 8) < 20
    zeros = torch.zeros(5, 8)

    def renewed(seed: int) -> Tensor:
        return exchange(kept, zeros, zeros, count=6, generator=torch.Generator().manual_seed(seed))

    several = [renewed(seed) for seed in range(200)]
    assert torch.equal(renewed(3), several[3])
    assert all(int(mask.sum()) == 20 for mask in several)
    share = torch.stack(several).float().mean(0).flatten()
    # 14 of 20 stay, then 6 of the 26 others come: a former weight with 0.7 + 0.3 * 6 / 26, another with 6 / 26.
    assert abs(float(share[:20].mean()) - (0.7 + 0.3 * 6 / 26)) < 0.02
    assert abs(float(share[20:].mean()) - 6 / 26) < 0.02
    assert share[:20].std() < 0.08
    assert share[20:].std() < 0.08


def test_a_gradient_or_weight_that_is_no_number_is_an_error() -> None:
    kept, good = torch.eye(4).bool(), torch.ones(4, 4)
    bad = good.clone()
    bad[0] = torch.nan
    for weight, growth in ((bad, good), (good, bad)):
        with pytest.raises(ScoreError, match=r"The score of 'fc' has .* NaN"):
            exchange(kept, weight, growth, count=2, generator=torch.Generator(), name="fc")


def test_the_dropped_fraction_is_a_half_cosine_to_zero() -> None:
    rigl = SparseTrainingConfig(density=0.1)
    assert (rigl.drop, rigl.every, rigl.until, rigl.scope, rigl.score) == (0.3, 100, 0.75, "erk", "random")
    total, end = 32_000, 24_000
    assert rigl.dropped(0, total) == pytest.approx(0.3)
    assert rigl.dropped(end // 3, total) == pytest.approx(0.3 * 0.75)
    assert rigl.dropped(end // 2, total) == pytest.approx(0.15)
    assert 0 < rigl.dropped(end - 1, total) < 1e-8
    assert rigl.dropped(end, total) == rigl.dropped(total, total) == 0
    assert [s for s in range(1, 1000) if rigl.due(s, 1000)] == [100, 200, 300, 400, 500, 600, 700]
    both = [SparseTrainingConfig(**{**methods[name].defaults, "density": 0.1}) for name in ("set", "static")]
    assert [both[0].dropped(step, 1000) for step in (1, 500, 999, 1000)] == [0.3, 0.3, 0.3, 0]
    assert [s for s in range(1, 1001) if both[0].due(s, 1000)] == list(range(100, 1000, 100))
    assert both[0].grow == "random"
    assert not any(both[1].due(s, 1000) for s in range(1, 1001))


# ---------------------------------------------------------------------------------------------------- the training
@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_counts_hold_and_what_grows_starts_from_nothing(method: str, optimizer_name: str) -> None:
    model = network()
    pruner = pruner_of(model, **methods[method].defaults)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    expected, grown, updates = counts(pruner.masks), 0, []
    assert sum(expected.values()) == round(0.2 * pruner.weights)
    for number in range(1, 25):
        before, old, biases = weights(model), pruner.masks, model[0].bias.detach().clone()
        history = momenta(model, optimizer)
        replaced = advance(model, pruner, optimizer, number)
        masks, after, state = pruner.masks, weights(model), momenta(model, optimizer)
        assert counts(masks) == expected
        assert masks.same(old) or replaced
        for name, mask in masks.items():
            assert not after[name][~mask].any()
            assert not any(v[~mask].any() for v in state[name])
            new = mask & ~old[name]
            assert not after[name][new].any()
            assert not any(v[new].any() for v in state[name])
            if replaced:  # nothing but the masks changed
                staying = mask & old[name]
                assert torch.equal(after[name][staying], before[name][staying])
                assert all(torch.equal(v[staying], h[staying]) for v, h in zip(state[name], history[name], strict=True))
                share = pruner.own.dropped(number, 24)
                assert int(new.sum()) <= int(share * expected[name] + 1e-9)
                grown += int(new.sum())
        assert torch.equal(model[0].bias, biases) == replaced
        updates += [number] if replaced else []
    assert updates == ([3, 6, 9, 12, 15] if method == "rigl" else [3, 6, 9, 12, 15, 18, 21])
    assert pruner.report() == {"updates": len(updates), "grown": grown}
    assert grown > 20
    assert pruner.finish().same(pruner.masks)


def dense_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Autograd of the loss with respect to the dense tensors m * w, in an unmasked twin."""
    twin = mg.fold(deepcopy(model))
    state = {name: p.detach().clone().requires_grad_() for name, p in twin.named_parameters()}
    functional.cross_entropy(functional_call(twin, state, (inputs,)), targets).backward()
    return {name: state[name].grad for name in mg.core.layers.prunable_layers(twin)}


def test_the_dense_gradient_is_that_of_the_unmasked_tensor() -> None:
    model = network(torch.float64)
    mg.methods.OneShot(model, density=0.3, score="random", scope="erk")
    inputs, targets = batch(1, torch.float64)
    expected = dense_gradients(model, inputs, targets)
    layers, gradients = mg.core.layers.prunable_layers(model), DenseGradients()
    masked = [module for module in model.modules() if isinstance(module, Masked)]
    gradients.listen(masked)
    with torch.no_grad():
        model(inputs)  # an evaluation in between leaves nothing
    for part in (slice(0, 4), slice(4, 16)):  # micro-batches add up, as in .grad
        (functional.cross_entropy(model(inputs[part]), targets[part], reduction="sum") / 16).backward()
    found = gradients.of(layers)
    for name, layer in layers.items():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)
        assert found[name][~mg.masks_of(model)[name]].any()
        assert not layer.raw.grad[~mg.masks_of(model)[name]].any()
    gradients.rest()
    assert not any(module._forward_hooks for module in masked)
    with pytest.raises(TrainingError, match=r"call loss\.backward"):
        gradients.of(layers)


def test_uses_of_a_tied_weight_add_up() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model[2].weight = model[0].weight
    mg.methods.OneShot(model, density=0.5, score="random")
    inputs, targets = torch.randn(5, 6).double(), torch.randint(6, (5,))
    gradients = DenseGradients()
    gradients.listen(module for module in model.modules() if isinstance(module, Masked))
    functional.cross_entropy(model(inputs), targets).backward()
    found = gradients.of(mg.core.layers.prunable_layers(model))["0.weight"]
    twin = mg.fold(deepcopy(model))
    twin.zero_grad()
    functional.cross_entropy(twin(inputs), targets).backward()
    torch.testing.assert_close(found, twin[0].weight.grad)


def test_rigl_drops_and_grows_what_brute_force_says() -> None:
    model = network()
    pruner = pruner_of(model, every=5)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for number in range(1, 5):
        assert not advance(model, pruner, optimizer, number)
    before, old = weights(model), pruner.masks
    gradients = dense_gradients(model, *batch(5))
    assert advance(model, pruner, optimizer, 5)
    share = 0.15 * (1 + torch.cos(torch.tensor(torch.pi * 5 / 18)).item())
    for name, mask in pruner.masks.items():
        sizes, wanted = before[name].flatten().abs().tolist(), gradients[name].flatten().abs().tolist()
        active = [i for i, on in enumerate(old[name].flatten().tolist()) if on]
        count = int(share * len(active))
        staying = sorted(active, key=lambda i: -sizes[i])[: len(active) - count]
        free = set(range(len(sizes))) - set(staying)
        expected = {*staying, *sorted(free, key=lambda i: -wanted[i])[:count]}
        assert expected == set(mask.flatten().nonzero().squeeze(1).tolist()) or bool(old[name].all()), name


def test_a_weight_just_dropped_that_returns_keeps_its_value_and_momentum() -> None:
    model = nn.Linear(8, 8, bias=False)
    pruner = pruner_of(model, density=0.5, total_steps=8, every=2)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    pruner.step(optimizer)
    before, old, history = weights(model)["weight"], pruner.masks, momenta(model, optimizer)["weight"][0]
    slopes = old["weight"] / (1e-3 + before.abs())  # the smallest weights have the largest gradients
    optimizer.zero_grad()
    (model.weight * slopes).sum().backward()
    assert pruner.replaces_step()
    pruner.step(optimizer)
    assert pruner.updates == 1
    assert pruner.grown == 0
    assert pruner.masks.same(old)
    assert torch.equal(weights(model)["weight"], before)
    assert torch.equal(momenta(model, optimizer)["weight"][0], history)
    assert before.count_nonzero() == history.count_nonzero() == 32


def test_without_drop_it_is_static_sparse_training_to_the_bit() -> None:
    def trained(make: Any) -> nn.Module:
        model = network()
        pruner = make(model)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        for number in range(1, 13):
            inputs, targets = batch(number)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            assert not pruner.replaces_step()
            optimizer.step()
            pruner.step(optimizer)
        return model

    moving = trained(lambda model: pruner_of(model, **methods["static"].defaults))
    still = trained(lambda model: mg.methods.OneShot(model, density=0.2, scope="erk", score="random"))
    assert same(moving.state_dict(), still.state_dict())


def test_other_steps_pay_nothing() -> None:
    model = network()
    pruner = pruner_of(model, every=4)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masked = [module for module in model.modules() if isinstance(module, Masked)]
    for number in range(1, 25):
        listening = [bool(module._forward_hooks) for module in masked]
        assert listening == [pruner.replaces_step()] * 4
        assert pruner.replaces_step() == (number % 4 == 0 and number < 18)
        if all(listening):
            deepcopy(model)(batch(0)[0]).sum().backward()  # a copy's passes are not the model's
            assert not pruner._gradients._sums
        advance(model, pruner, optimizer, number)
    growing = pruner_of(network(), every=1, grow="random")
    assert growing.replaces_step()
    assert not any(module._forward_hooks for module in growing.model.modules())
    pruner = pruner_of(network(), every=1)
    pruner.finish()
    assert not any(module._forward_hooks for module in pruner.model.modules())


def test_without_a_backward_pass_there_is_nothing_to_grow_by() -> None:
    pruner = pruner_of(network(), every=1)
    with pytest.raises(TrainingError, match="this step had none: call loss"):
        pruner.step()


def run_loop(steps: range, seed: int = 0, state: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """Everything at the end of some steps, from what stood at the end of those before."""
    model = network()
    pruner = pruner_of(model, seed, **config)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    if state is not None:
        pruner.load_state_dict(state["pruner"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for number in steps:
        advance(model, pruner, optimizer, number)
    parts = {"pruner": pruner.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return deepcopy({**parts, "masks": dict(pruner.masks)})


def test_growth_at_random_depends_on_the_seed_alone() -> None:
    one, again, other = (run_loop(range(1, 13), seed, grow="random") for seed in (1, 1, 2))
    assert same(one["model"], again["model"])
    assert not same(one["masks"], other["masks"])


@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize("after", [2, 3, 4])
def test_it_goes_on_from_its_state(grow: str, after: int) -> None:
    whole = run_loop(range(1, 19), grow=grow)
    part = run_loop(range(1, after + 1), grow=grow)
    resumed = run_loop(range(after + 1, 19), seed=9, state=part, grow=grow)
    assert same(whole["model"], resumed["model"])
    assert same(whole["masks"], resumed["masks"])
    again = pruner_of(network(), seed=5, grow=grow)
    again.load_state_dict(whole["pruner"])
    assert {k: v for k, v in again.state_dict().items() if k != "generator"} == {"steps": 18} | again.report()
    assert torch.equal(again.state_dict()["generator"], whole["pruner"]["generator"])


# --------------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.33, 0.5, 0.9, 1.0])
def test_erdos_renyi_counts_are_exact(density: float) -> None:
    model = mg.tasks.build("lenet-5", classes=10, shape=(1, 28, 28))
    pruner = pruner_of(model, density=density)
    sizes = {name: layer.raw.numel() for name, layer in pruner.layers.items()}
    shapes = {name: layer.shape for name, layer in pruner.layers.items()}
    keep = round(density * sum(sizes.values()))
    assert counts(pruner.masks) == layer_counts(shapes, keep, "erk", low=dict.fromkeys(sizes, 1), high=sizes)
    assert pruner.masks.kept == keep


def test_uniform_densities_leave_the_first_layer_dense() -> None:
    total = 54 + 432 + 768 + 240
    dense = counts(pruner_of(network(), scope="layer", density=0.3).masks)
    assert dense["0.weight"] == 54
    assert sum(dense.values()) == round(0.3 * total)
    for name, size in {"2.weight": 432, "5.weight": 768, "7.weight": 240}.items():
        assert abs(dense[name] - (round(0.3 * total) - 54) / (total - 54) * size) <= 1
    uniform = counts(pruner_of(network(), scope="layer", density=0.3, first_dense=False).masks)
    assert uniform == {"0.weight": 16, "2.weight": 130, "5.weight": 230, "7.weight": 72}
    given_ = pruner_of(network(), density=None, scope={"0.weight": 1.0, "2.weight": 0.5, "5.weight": 0.1, "7.weight": 0.5})
    assert list(counts(given_.masks).values()) == [54, 216, 77, 120]
    with pytest.raises(BudgetError, match=r"'0.weight' alone has 54 weights of the 45 to keep\. Take scope=erk"):
        pruner_of(network(), scope="layer", density=0.03)


def test_excluded_and_protected_layers_stay_dense() -> None:
    model = network()
    pruner = pruner_of(model, exclude=["0"], protect=["7"], every=1)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for number in range(1, 6):
        advance(model, pruner, optimizer, number)
    assert set(pruner.masks) == {"2.weight", "5.weight", "7.weight"}
    assert pruner.masks["7.weight"].all()
    assert pruner.masks.kept == round(0.2 * (432 + 768 + 240))
    assert pruner.grown > 0


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"pattern": "block:4x2"}, PatternError, "its pattern is unstructured, not block:4x2"),
        ({"scope": "row"}, BudgetError, "not of each row: take scope erk or layer"),
        ({"drop": 1.0}, BudgetError, r"drop is a fraction in \[0, 1\)"),
        ({"drop": float("nan")}, BudgetError, r"drop is a fraction in \[0, 1\)"),
        ({"until": 0.0}, BudgetError, r"until one in \(0, 1\]; got 0\.3 and 0\.0"),
        ({"every": 0}, BudgetError, "at least 1; got 0"),
        ({"decay": "cosin"}, UnknownNameError, "no decay named 'cosin'. Did you mean 'cosine'"),
        ({"grow": "gradients"}, UnknownNameError, "Did you mean 'gradient'"),
        ({"every": 18}, BudgetError, "every 18 steps, before step 18 of 24. Give a smaller every"),
        ({"total_steps": 0}, BudgetError, "No update of the masks"),
        ({"density": None}, BudgetError, "at least one of density, params"),
    ],
)
def test_wrong_settings_end_in_one_sentence(config: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pruner_of(network(), **config)


# --------------------------------------------------------------------------------------------------- through the loop
@pytest.fixture(scope="module")
def task() -> mg.Task:
    return mg.tasks.image_task("lenet-300-100", "digits")


SHORT = mg.FitConfig(epochs=3, batch_size=256, lr=0.1)
LENGTH = 6
"""Steps of an epoch."""


class Witness(SparseTraining):
    """Compares each update's gradient with that of the one minibatch at hand."""

    seen: list[int]

    def _update(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        task = mg.tasks.image_task("lenet-300-100", "digits")
        batches = task.data.batches("train", SHORT.batch_size, seed=4, shuffle=True, augment=True)
        inputs, targets = list(batches.epoch((step - 1) // LENGTH))[(step - 1) % LENGTH]
        found = self._gradients.of(self.layers)
        for name, expected in dense_gradients(self.model, inputs, targets).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)
        self.seen.append(step)
        super()._update(step, optimizer)


def test_the_gradient_in_the_loop_is_that_of_one_minibatch(task: mg.Task) -> None:
    assert len(task.data.batches("train", SHORT.batch_size)) == LENGTH
    pruner = Witness(task.build(), density=0.1, total_steps=3 * LENGTH, every=3, until=1.0)
    pruner.seen = []
    mg.fit(pruner.model, task, SHORT, seed=4, pruner=pruner)
    assert pruner.seen == [3, 6, 9, 12, 15]
    assert pruner.grown > 100


def test_the_optimizers_of_the_loop_rest_while_masks_move(task: mg.Task) -> None:
    """With the updates at every step, nothing else ever happens: each weight is one of the initial ones."""
    model = task.build()
    initial = weights(model)
    pruner = SparseTraining(model, density=0.1, total_steps=LENGTH + 1, every=1, until=1.0)
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    mg.fit(model, task, replace(SHORT, epochs=1), pruner=pruner)
    assert pruner.updates == LENGTH
    assert all(torch.equal(dict(model.named_parameters())[n], b) for n, b in biases.items())
    for name, weight in weights(model).items():
        assert weight[pruner.masks[name]].count_nonzero() < pruner.masks[name].sum() or bool(pruner.masks[name].all())
        assert torch.equal(weight[weight != 0], initial[name][weight != 0])


@pytest.mark.parametrize("every", [2, LENGTH + 1])
def test_fit_goes_on_to_the_same_bits(task: mg.Task, every: int) -> None:
    def start() -> SparseTraining:
        return SparseTraining(task.build(), density=0.1, total_steps=3 * LENGTH, every=every, until=1.0)

    saved: list[Any] = []
    whole, resumed = start(), start()
    mg.fit(whole.model, task, SHORT, seed=1, pruner=whole, progress=Progress(None, lambda s: saved.append(deepcopy(s))))
    assert whole.updates >= 2
    mg.fit(resumed.model, task, SHORT, seed=1, pruner=resumed, progress=Progress(saved[0], lambda s: None))
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert whole.report() == resumed.report()


# ------------------------------------------------------------------------------------------------------- procedures
def config_of(name: str, **fields: Any) -> SparseTrainingConfig:
    usual = {"density": 0.05, "every": 4, "dense": mg.FitConfig(epochs=0), "train": SHORT}
    return SparseTrainingConfig(**{**methods[name].defaults, **usual, **fields})


def test_a_task_that_cannot_be_trained_from_scratch_is_refused(task: mg.Task) -> None:
    rigl = methods["rigl"]
    rigl.check(task, config_of("rigl"))
    assert (rigl.training, methods["set"].training) == (mg.FitConfig(), mg.FitConfig())
    wrong: list[tuple[mg.Task, SparseTrainingConfig, str]] = [
        (replace(task, pretrained=True), config_of("rigl"), "leave the checkpoint out"),
        (task, config_of("rigl", train=replace(SHORT, distill=0.5)), "set train.distill to 0, or dense.epochs above 0"),
    ]
    for there, config, text in wrong:
        for call in (rigl.check, lambda t, c: rigl.procedure(t, Run(), c)):
            with pytest.raises(MicrogliaError, match=text):
                call(there, config)
    with pytest.raises(BudgetError, match="No update of the masks"):
        rigl.check(task, config_of("rigl", every=100))
    with pytest.raises(UnknownNameError, match="Did you mean 'magnitude'"):
        rigl.check(task, config_of("rigl", score="magnitud"))


def test_the_dense_network_is_only_beside(task: mg.Task) -> None:
    """The sparse one begins from the initial weights whether or not a dense one was trained; distillation needs that."""
    models, runs = [], []
    for dense, distill in ((0, 0.0), (1, 0.0), (1, 0.5)):
        runs.append(Run(seed=2))
        config = config_of("rigl", dense=replace(SHORT, epochs=dense), train=replace(SHORT, epochs=2, distill=distill))
        models.append(methods["rigl"].procedure(task, runs[-1], config))
    accuracies = [run.observations["dense"]["metrics"]["accuracy"] for run in runs]
    assert accuracies[0] < 0.3 < accuracies[1] == accuracies[2]
    assert same(models[0].state_dict(), models[1].state_dict())
    assert not same(models[0].state_dict(), models[2].state_dict())
    assert runs[0].observations["exchanged"]["updates"] == 2


def test_first_masks_may_come_from_another_score(task: mg.Task) -> None:
    config = config_of("static", score="gradient", scope="layer", first_dense=False, train=replace(SHORT, epochs=1))
    methods["static"].check(task, config)
    model = methods["static"].procedure(task, Run(), config)
    expected = task.build()
    evidence = mg.scores.Evidence(list(task.data.batches("train", 128, shuffle=True).epoch(0))[:1], task.loss)
    mg.methods.OneShot(expected, density=0.05, score="gradient", scope="layer", evidence=evidence)
    assert mg.masks_of(model).same(mg.masks_of(expected))


def test_rigl_beats_static_masks_on_digits(task: mg.Task) -> None:
    """95 % sparse, mean of three seeds (survey 12, statement f); measured: 0.94 and 0.84, in a training this short."""
    train = mg.FitConfig(epochs=10, batch_size=64, lr=0.1)
    means = {}
    for name in ("rigl", "static"):
        found = []
        for seed in range(3):
            there = mg.tasks.image_task("lenet-300-100", "digits", seed=seed)
            model = methods[name].procedure(there, Run(seed=seed), config_of(name, every=20, train=train))
            assert mg.masks_of(model).kept == 2510
            found.append(mg.evaluate(model, there)["accuracy"])
        means[name] = sum(found) / 3
    assert means["rigl"] > means["static"]
