"""Gates, their sites and the flow of channels: what a head computes, which gradients there are, what a gated model keeps."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gated as networks
import microglia as mg
from gated import bias, gated, images, network, plan_of, same, state_of
from microglia.core.errors import FileError, MicrogliaError, SelectorError
from microglia.dynamic import Flow, GatePlan, Passage, attach_gates, detach_gates, find_sites, gate_plan, gates_of, listening
from microglia.dynamic.gate_plan import ACTIVATIONS

SOME = ["plain", "residual", "branches", "depthwise", "signals"]
SITES = {
    "plain": ["0", "3", "5", "10", "13"],
    "residual": ["stem", "one", "two", "three", "four", "five", "six"],
    "branches": ["stem", "left", "right", "after", "last"],
    "depthwise": ["0", "3", "6", "8", "10", "14"],
    "signals": ["1", "4", "6"],
    "volumes": ["1", "5"],
}


def sites(model: nn.Module, x: Tensor, **selectors: Any) -> Any:
    return find_sites(Flow(model, x), model, **selectors)


def passages(model: nn.Module, x: Tensor, fade: float | None = None) -> dict[str, Passage]:
    heard: dict[str, Passage] = {}
    with listening(model, lambda p: heard.update({p.gate.site.layer: p}), fade=fade):
        model(x)
    return heard


def losses(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the task and that of the heads."""
    parts: list[Tensor] = []

    def hear(p: Passage) -> None:
        parts.append(functional.binary_cross_entropy_with_logits(p.logits, p.target().to(p.logits.dtype)))

    with listening(model, hear):
        task = functional.cross_entropy(model(x), torch.arange(len(x)) % 5)
    return task, torch.stack(parts).sum()


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The network's parameters and the heads'."""
    heads = [p for gate in gates_of(model).values() for p in gate.parameters()]
    return [p for p in model.parameters() if all(p is not head for head in heads)], heads


# ---------------------------------------------------------------------------------------------------------------- sites
@pytest.mark.parametrize("name", SITES)
def test_where_gates_hang(name: str) -> None:
    found = sites(network(name), images(1))
    assert [site.layer for site in found.sites] == SITES[name]
    assert set(found.left_out) == {"residual": {"shortcut"}, "depthwise": {"12"}}.get(name, set())


def test_a_site_says_what_surrounds_it() -> None:
    about = {s.layer: (s.carrier, s.activation, s.inputs, s.outputs) for s in sites(network("plain"), images(1)).sites}
    assert about == {
        "0": ("1", "relu", 3, 8),
        "3": ("3", "relu6", 8, 12),
        "5": ("6", "hardswish", 12, 16),
        "10": ("10", "elu", 16, 16),
        "13": ("13", "mish", 16, 10),
    }
    about = {s.layer: (s.carrier, s.activation) for s in sites(network("residual"), images(1)).sites}
    assert about["two"] == ("two_norm", "identity")  # before the addition
    assert about["four"] == ("four", "identity")
    about = {s.layer: (s.inputs, s.activation) for s in sites(network("depthwise"), images(1)).sites}
    assert about["3"] == (8, "relu6")
    assert about["8"] == (12, "identity")


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"), (nn.ReLU6(), "relu6"), (nn.SiLU(), "silu"), (nn.GELU(), "gelu"),
        (nn.Hardswish(), "hardswish"), (nn.LeakyReLU(), "leaky_relu"), (nn.ELU(), "elu"),
        (nn.Mish(), "mish"), (nn.Tanh(), "tanh"),
        (nn.LeakyReLU(0.3), "identity"), (nn.ELU(2.0), "identity"), (nn.GELU("tanh"), "identity"), (nn.Hardtanh(), "identity"),
    ],
)  # fmt: skip
def test_activations_are_known_by_name_and_settings(activation: nn.Module, name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation, nn.Flatten(), nn.Linear(400, 5)).eval()
    (site,) = sites(model, images(1)).sites
    assert site.activation == name
    if name != "identity":
        x = torch.linspace(-8, 8, 101)
        torch.testing.assert_close(ACTIVATIONS[name](x), activation(x.clone()), rtol=0, atol=0)
        assert ACTIVATIONS[name](torch.zeros(1)) == 0


class Odd(nn.Module):
    """Layers that cannot be gated, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.group = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.squeeze, self.twice = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.good, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.group(self.first(x)))
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.last(torch.relu(self.good(x))).flatten(1)


def test_what_has_no_gate_and_why() -> None:
    found = sites(Odd().eval(), images(1))
    assert [site.layer for site in found.sites] == ["good"]
    assert "group_norm follows it" in found.left_out["first"]
    assert "1x1 maps" in found.left_out["squeeze"]
    assert "output" in found.left_out["last"]
    assert "twice" not in found.left_out  # a convolution used twice is none of one place


def test_selectors() -> None:
    model, x = network("residual"), images(1)
    assert [s.layer for s in sites(model, x, layers=("t*", "stem")).sites] == ["stem", "two", "three"]
    found = sites(model, x, exclude=("stem", "f*"))
    assert [s.layer for s in found.sites] == ["one", "two", "three", "six"]
    assert found.left_out["stem"] == "not selected"
    for wrong in ({"layers": ("tow",)}, {"exclude": ("tow",)}):
        with pytest.raises(SelectorError, match=r"'tow' meets no layer.*stem"):
            sites(model, x, **wrong)
    with pytest.raises(SelectorError, match=r"shortcut: it is a shortcut"):
        sites(model, x, layers=("shortcut",))


def test_a_model_without_convolutions() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 5))
    with pytest.raises(SelectorError, match="no convolution"):
        sites(model, images(1))


# ------------------------------------------------------------------------------------------------------------- the head
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("name", ["residual", "signals"])
def test_the_head_is_the_formula(name: str, softmax: bool, pool: str) -> None:
    model, x = network(name), images(3)
    gated(model, x, plan=plan_of(model, x, pool=pool, softmax=softmax))
    seen: dict[str, Tensor] = {}
    for layer, gate in gates_of(model).items():
        model.get_submodule(layer).register_forward_pre_hook(lambda m, args, layer=layer: seen.update({layer: args[0].clone()}))
        assert gate.weight.shape == (gate.site.outputs, gate.site.inputs)
    for layer, p in passages(model, x).items():
        space = seen[layer].reshape(3, seen[layer].shape[1], -1)
        pooled = space.sum(2) / space.shape[2] if pool == "avg" else space.max(2).values
        e = pooled.exp() / pooled.exp().sum(1, keepdim=True) if softmax else pooled
        expected = torch.einsum("oc,bc->bo", p.gate.weight, e) + p.gate.bias
        torch.testing.assert_close(p.logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(p.mask, p.logits > 0)
        assert torch.equal(p.target(), mg.dynamic.targets(mg.dynamic.mass(p.response), 0.8))


def test_a_logit_of_zero_is_off() -> None:
    model = gated(network("plain"), images(2))
    bias(model, 0.0)
    assert not any(p.mask.any() for p in passages(model, images(2)).values())


def test_initial_weights_are_those_of_a_convolution_and_drawn_from_the_generator() -> None:
    first, again, other = (network("plain") for _ in range(3))
    plan = plan_of(first, images(1))
    before = torch.get_rng_state()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        attach_gates(model, plan, torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state_of(first), state_of(again))
    assert not same(state_of(first), state_of(other))
    for gate in gates_of(first).values():
        bound = gate.site.inputs**-0.5
        assert bound / 2 < max(float(gate.weight.detach().abs().max()), float(gate.bias.detach().abs().max())) <= bound


@pytest.mark.parametrize("name", SOME)
def test_the_mask_comes_behind_the_norm_and_before_the_activation(name: str) -> None:
    model, plain, x = gated(network(name), images(1)), network(name), images(3)
    first = next(iter(gates_of(model)))
    site = gates_of(model)[first].site
    heard = passages(model, x)
    inner: dict[str, Tensor] = {}
    plain.get_submodule(site.carrier).register_forward_hook(lambda m, args, out: inner.update(out=out.clone()))
    plain(x)
    torch.testing.assert_close(heard[first].response, ACTIVATIONS[site.activation](inner["out"]), rtol=0, atol=0)
    model.get_submodule(site.carrier).register_forward_hook(lambda m, args, out: inner.update(masked=out.clone()))
    model(x)
    factor = heard[first].mask.float().reshape(*heard[first].mask.shape, *[1] * (inner["out"].ndim - 2))
    assert torch.equal(inner["masked"], inner["out"] * factor)


# ------------------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_which_loss_trains_what(name: str, detached: bool, training: bool) -> None:
    model, x = gated(network(name), images(1)), images(6)
    model.train(training)
    for gate in gates_of(model).values():
        gate.detached = detached
    backbone, heads = split(model)
    task, predictions = losses(model, x)
    to_heads = torch.autograd.grad(task, heads, retain_graph=True, allow_unused=True)
    assert all(g is None or not g.any() for g in to_heads)  # exactly 0 in both modes
    to_backbone = torch.autograd.grad(task, backbone, retain_graph=True, allow_unused=True)
    assert any(g is not None and g.any() for g in to_backbone)
    assert all(g is not None and g.any() for g in torch.autograd.grad(predictions, heads, retain_graph=True))
    from_heads = torch.autograd.grad(predictions, backbone, allow_unused=True)
    moved = [g is not None and bool(g.any()) for g in from_heads]
    assert any(moved) is not detached


def test_masks_targets_and_responses_carry_no_graph() -> None:
    model = gated(network("residual"), images(1)).train()
    for p in passages(model, images(4).requires_grad_()).values():
        assert p.logits.requires_grad
        for value in (p.mask, p.response, p.share(), p.target()):
            assert not value.requires_grad
        assert (p.mask.dtype, p.target().dtype) == (torch.bool, torch.bool)


@pytest.mark.parametrize("name", SOME)
def test_numbers_are_the_same_with_and_without_gradients(name: str) -> None:
    model, x = gated(network(name), images(1)), images(4)
    with torch.no_grad():
        without = model(x)
    with torch.inference_mode():
        inference = model(x)
    assert torch.equal(model(x), without)
    assert torch.equal(model(x), inference)


# ------------------------------------------------------------------------------------------------------- all on, all off
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*SOME, "resnet8", "mobilenet-v1"])
def test_open_gates_are_the_model_bit_for_bit(name: str, training: bool) -> None:
    plain, model, x = network(name), network(name), images(6)
    attach_gates(model, plan_of(model, images(1)))
    bias(model, 100.0)
    results = []
    for each in (plain, model):
        torch.manual_seed(5)  # dropout
        out = each.train(training)(x)
        out.square().sum().backward()
        results.append(out)
    assert torch.equal(*results)
    mine, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert all(torch.equal(mine[n].grad, p.grad) for n, p in theirs.items())  # type: ignore[arg-type]
    assert all(torch.equal(model.state_dict()[n], value) for n, value in plain.state_dict().items())


def test_running_statistics_do_not_feel_the_mask_of_their_own_layer() -> None:
    """Last gate forced on, off, or as it says: the norm below it sees all filters of all inputs."""
    results = []
    for value in (100.0, -100.0, None):
        model = gated(network("depthwise"), images(1))
        if value is not None:
            bias(model, value, "14")
        model.train()
        for seed in range(3):
            model(images(5, seed=seed))
        results.append({n: b.clone() for n, b in model.named_buffers()})
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    fresh = dict(network("depthwise").named_buffers())
    assert not torch.equal(results[0]["15.running_mean"], fresh["15.running_mean"])


def test_fading() -> None:
    """0 is the plain model, 1 the masked one, between them the factor of what is off is 1 - fade."""
    plain, model, x = network("plain"), gated(network("plain"), images(1)), images(3)
    masked = model(x)
    with listening(model, lambda p: None, fade=0.0):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), masked)
    carrier, out = model.get_submodule("1"), torch.ones(3, 8, 2, 2)
    gate = gates_of(model)["0"]
    gate.fade, mask = 0.25, passages(model, x)["0"].mask
    gate._arrive(carrier, (x,))
    assert torch.equal(gate._leave(carrier, (), out)[:, :, 0, 0], torch.where(mask, 1.0, 0.75))


def test_fixed_numbers_keep_exact_counts() -> None:
    model, x = network("residual"), images(5)
    plan = plan_of(model, x)
    keep = {site.layer: 1 + i for i, site in enumerate(plan.sites)}
    gated(model, x, plan=GatePlan(plan.sites, r=plan.r, keep=keep))
    heard = passages(model, x)
    for layer, p in heard.items():
        assert p.mask.sum(1).tolist() == [keep[layer]] * 5
        assert p.logits[p.mask].reshape(5, -1).min() >= p.logits.masked_fill(p.mask, -1e9).max(1).values.min()
    bias(model, 0.0)  # ties: still as many
    assert all(p.mask.sum(1).tolist() == [keep[layer]] * 5 for layer, p in passages(model, x).items())


# --------------------------------------------------------------------------------------------------- the model they are in
@pytest.mark.parametrize("name", SOME)
def test_detached_gates_give_back_the_plain_model(name: str) -> None:
    plain, model, x = network(name), network(name), images(3)
    gated(model, x)
    assert len(model.state_dict()) > len(plain.state_dict())
    assert detach_gates(model) is model
    assert same(state_of(model), state_of(plain))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert torch.equal(model(x), plain(x))
    assert gate_plan(model) is None
    assert not gates_of(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    gated(model, x)  # and they may come again


def test_a_copy_lives_on_its_own() -> None:
    model, x = gated(network("residual"), images(1)), images(3)
    heard: list[str] = []
    with listening(model, lambda p: heard.append("original")):
        twin = copy.deepcopy(model)
        expected = model(x)
        count = len(heard)
        assert torch.equal(twin(x), expected)
        assert len(heard) == count  # nobody listens to the copy
    assert gate_plan(twin) == gate_plan(model)
    bias(twin, -100.0)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    detach_gates(model)
    assert gates_of(twin)
    assert all(not p.mask.any() for p in passages(twin, x).values())


def test_gates_take_type_and_mode_of_their_layer() -> None:
    model, x = network("plain").double(), images(2).double()
    plan = plan_of(model, x)
    attach_gates(model, plan)
    assert model(x).dtype == torch.float64
    assert all(not gate.training and gate.weight.dtype == torch.float64 for gate in gates_of(model).values())
    training = attach_gates(network("plain").train(), plan)
    assert all(gate.training for gate in gates_of(training).values())


def test_bfloat16_autocast() -> None:
    model, x = gated(network("residual"), images(1)), images(3)
    with torch.autocast("cpu", torch.bfloat16):
        task, predictions = losses(model.train(), x)
    (task + predictions).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_listener_is_gone_after_an_error_too() -> None:
    model = gated(network("plain"), images(1))

    def fail(p: Passage) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), listening(model, fail, fade=0.0):
        model(images(1))
    assert all(gate._wire.listener is None and gate.fade == 1 for gate in gates_of(model).values())
    model(images(1))


def test_gates_hang_once_and_only_where_they_belong() -> None:
    model = gated(network("plain"), images(1))
    with pytest.raises(MicrogliaError, match="detach_gates"):
        attach_gates(model, plan_of(network("plain"), images(1)))
    other = network("residual")
    with pytest.raises(MicrogliaError, match="another model"):
        attach_gates(other, gate_plan(model))  # type: ignore[arg-type]
    assert not gates_of(other)


def test_a_skipped_convolution_is_noticed() -> None:
    model = gated(network("plain"), images(1))
    with pytest.raises(MicrogliaError, match="another order"):
        model.get_submodule("1")(torch.zeros(1, 8, 4, 4))


# ---------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", ["residual", "signals"])
def test_saved_and_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, x = network(name), images(3)
    plan = plan_of(model, x, pool="max", softmax=False, rule="cover_ge").with_r(
        {s: 0.3 + i / 10 for i, s in enumerate(SITES[name])}
    )
    gated(model, x, plan=plan)
    mg.save(model, tmp_path)
    again = mg.load(tmp_path, network(name, seed=9)).eval()
    assert same(state_of(again), state_of(model))
    assert gate_plan(again) == plan
    assert torch.equal(again(x), model(x))
    assert all((g.r, g.rule, g.pool, g.softmax) == (plan.r[n], "cover_ge", "max", False) for n, g in gates_of(again).items())
    assert all(torch.equal(p.target(), passages(model, x)[n].target()) for n, p in passages(again, x).items())


def test_a_model_of_the_zoo_loads_by_its_directory_alone(tmp_path: Path) -> None:
    model = mg.tasks.build("resnet8", classes=5, shape=networks.SHAPE).eval()
    gated(model, images(1))
    mg.save(model, tmp_path)
    assert torch.equal(mg.load(tmp_path).eval()(images(2)), model(images(2)))


def test_a_shrunk_model_with_gates(tmp_path: Path) -> None:
    dense, x = network("plain"), images(2)
    small = mg.prune_channels(dense, x, mg.Budget(density=0.5)).eval()
    del small.kind
    gated(small, x)
    mg.save(small, tmp_path)
    again = mg.load(tmp_path, network("plain")).eval()
    assert torch.equal(again(x), small(x))
    assert len(gates_of(again)) == 5


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    mg.save(gated(network("residual"), images(1)), tmp_path)
    with pytest.raises(FileError, match="another model"):
        mg.load(tmp_path, network("plain"))
    with pytest.raises(FileError, match="detach_gates"):
        mg.load(tmp_path, gated(network("residual"), images(1)))
    path = tmp_path / "plan.json"
    whole = json.loads(path.read_text())
    for change in (
        {"gates": None},
        {"gates": {**whole["gates"], "r": dict.fromkeys(SITES["residual"], 0.5)}},
        {"gates": {**whole["gates"], "sites": whole["gates"]["sites"][:-1]}},
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(FileError, match="do not belong together"):
            mg.load(tmp_path, network("residual"))
    mg.save(network("residual"), tmp_path)
    with pytest.raises(FileError):
        mg.load(tmp_path, gated(network("residual"), images(1)))


def test_a_plan_as_json() -> None:
    plan = plan_of(network("plain"), images(1), rule="uniform")
    assert GatePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"sites": None}, {"sites": []}, {"sites": [{"layer": "0"}]}, {"sites": [3]}, {"pool": "median"}, {"rule": "all"},
        {"r": 0.5}, {"r": {"0": "much"}}, {"r": {"0": 1.5}}, {"r": {"0": 0}}, {"keep": {"0": 0}}, {"keep": [1]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_damaged_plan_is_refused(change: dict[str, Any]) -> None:
    values = json.loads(json.dumps(plan_of(network("plain"), images(1)).to_dict()))
    with pytest.raises(FileError, match="damaged"):
        GatePlan.from_dict(values | change)
    for wrong in (None, [], "gates", {}):
        with pytest.raises(FileError, match="damaged"):
            GatePlan.from_dict(wrong)
    strange = values | {"sites": [{**values["sites"][0], "activation": "sigmoid"}]}
    with pytest.raises(FileError, match="damaged"):
        GatePlan.from_dict(strange)


# ----------------------------------------------------------------------------------------------------------------- flow
@pytest.mark.parametrize("name", [*SOME, "volumes", "resnet8", "resnet8-projection", "mobilenet-v1"])
def test_no_channel_outside_a_support_is_ever_other_than_zero(name: str) -> None:
    """Runs the masked network node by node: what the flow calls zero is zero, for each input."""
    plain, model, x = network(name), gated(network(name), images(1)), images(4)
    flow = Flow(plain, x)
    masks = {layer: p.mask for layer, p in passages(model, x).items()}
    carriers = {gate.site.carrier: layer for layer, gate in gates_of(model).items()}
    supports = flow.supports(masks)
    last = {step.convolution.layer: step.node for step in flow.steps if step.convolution is not None}
    assert set(carriers.values()) <= set(last)
    values: dict[Any, Any] = {}
    pending = iter(zip(flow.trace.inputs, [x], strict=True))
    inputs = dict(pending)
    of_node = {step.node: step for step in flow.steps}
    checked = 0
    for node in flow.trace.graph.nodes:
        if node.op == "placeholder":
            name_of = flow.trace.name_of.get(node.name)
            values[node] = inputs[node.name].clone() if name_of is None else flow.trace.tensors[name_of].detach()
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values.get(n, len(x)))
            values[node] = node.target(*args, **kwargs)
            step = of_node.get(node)
            if step is None:
                continue
            if step.convolution is not None and step.convolution.layer in masks:
                mask = masks[step.convolution.layer]
                values[node] = values[node] * mask.reshape(*mask.shape, *[1] * (values[node].ndim - 2))
            if (support := supports[node]) is not None:
                assert support.shape == values[node].shape[:2]
                assert not values[node][~support].any()
                checked += 1
    assert checked >= len(masks)
    (result,) = next(n for n in flow.trace.graph.nodes if n.op == "output").args[0]
    torch.testing.assert_close(values[result], model(x))


def test_supports_of_sums_pads_and_concatenations() -> None:
    x = images(2)
    flow = Flow(network("residual"), x)
    masks = {s: torch.rand(2, flow.convolutions[s].convolution.outputs) < 0.5 for s in SITES["residual"]}  # type: ignore[union-attr]
    honest, published = flow.supports(masks), flow.supports(masks, published=True)
    step = flow.convolutions
    assert honest[step["one"].sources[0]] is masks["stem"]
    assert honest[step["three"].sources[0]] is None  # the identity fills the sum
    assert torch.equal(published[step["three"].sources[0]], masks["two"])  # type: ignore[arg-type]
    assert torch.equal(published[step["five"].sources[0]], masks["four"])  # type: ignore[arg-type]
    pads = [s for s in flow.steps if s.kind == "pad"]
    assert [p.amount for p in pads] == [(3, 5)]
    padded = published[pads[0].node]
    assert padded is not None
    assert torch.equal(padded[:, 3:15], masks["four"])
    assert not padded[:, :3].any()
    assert not padded[:, 15:].any()

    flow = Flow(network("branches"), x)
    masks = {s: torch.rand(2, flow.convolutions[s].convolution.outputs) < 0.5 for s in ("left", "right")}  # type: ignore[union-attr]
    arriving = flow.supports(masks)[flow.convolutions["after"].sources[0]]
    assert torch.equal(arriving, torch.cat([masks["left"], masks["right"], torch.ones(2, 8, dtype=torch.bool)], 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 7), (3, 5, 4, 6), (3, 5, 2, 3, 4)])
def test_a_share_is_that_of_the_response(activation: str, shape: tuple[int, ...]) -> None:
    """Also where the peaks are taken before the activation; a filter that never fires has none."""
    output = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    output[:, 0] = -output[:, 0].abs()
    site = networks.Site("layer", "layer", activation, 2, 5)
    passage = Passage(
        mg.dynamic.Gate(site, GatePlan((site,))), torch.zeros(3, 2), torch.zeros(3, 5), torch.ones(3, 5).bool(), output
    )
    response = ACTIVATIONS[activation](output).flatten(1).reshape(3, 5, -1).abs().amax(2).double()
    torch.testing.assert_close(passage.share(), (response / response.sum(1, keepdim=True)).float(), rtol=0, atol=0)
    assert activation not in ("relu", "relu6") or not passage.share()[:, 0].any()


class NormWithActivation(nn.BatchNorm2d):
    """As in timm: the activation is part of the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(super().forward(x))


def test_an_activation_inside_the_norm_is_applied_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), NormWithActivation(6), nn.Conv2d(6, 4, 3), nn.ReLU()).eval()
    x = images(2)
    dense, response = model(x), model[:2](x)
    (inner,) = sites(model, x, exclude=["2"]).sites
    assert (inner.carrier, inner.activation) == ("1", "identity")
    attach_gates(model, GatePlan((inner,)).with_r(0.9))
    heard = passages(model, x, fade=0.0)
    torch.testing.assert_close(heard["0"].response, response, rtol=0, atol=0)
    bias(model, 100.0)
    torch.testing.assert_close(model(x), dense, rtol=0, atol=0)


def test_convolutions_that_pad_with_other_values_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten()
    )
    found = sites(model.append(nn.Linear(400, 2)).eval(), images(1))
    assert [site.layer for site in found.sites] == ["2"]
    assert "pads with other values" in found.left_out["0"]
