"""Masks: what the forward pass sees, what training may not touch, what is saved, and the way back."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import MicrogliaError
from microglia.core.layers import effective_state, prunable_layers
from microglia.core.masks import MaskSet, enforce, fold, mask, masks_of
from microglia.core.restore import restore


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 4))


def random_masks(model: nn.Module, seed: int = 1) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    return MaskSet({n: torch.rand(la.shape, generator=generator) < 0.5 for n, la in prunable_layers(model).items()})


def batch(seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 4, 4, generator=generator), torch.randint(4, (8,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x, y = batch(seed)
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embedding(tokens))))


# forward, backward, training


def test_multiplying_in_forward_and_zeroing_after_each_step_train_alike() -> None:  # T0.1
    masked, zeroed = network(), network()
    masks = random_masks(masked)
    mask(masked, masks)
    layers = prunable_layers(zeroed)
    for name, layer in layers.items():
        layer.raw.data.mul_(masks[name])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (masked, zeroed)]
    for seed in range(5):
        for model, optimizer in zip((masked, zeroed), optimizers, strict=True):
            step(model, optimizer, seed)
        for name, layer in layers.items():
            layer.raw.data.mul_(masks[name])
    expected = zeroed.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in effective_state(masked).items())
    assert not torch.equal(expected["0.weight"], network()[0].weight)


def test_the_gradient_of_masked_weights_is_exactly_zero() -> None:
    model = network()
    masks = mask(model, random_masks(model))
    x, y = batch()
    functional.cross_entropy(model(x), y).backward()
    for name, layer in prunable_layers(model).items():
        assert layer.raw.grad is not None
        assert not layer.raw.grad[~masks[name]].any()
        assert layer.raw.grad[masks[name]].count_nonzero() > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_stands_in_masked_weights_does_not_leak(value: float) -> None:
    clean, dirty = network().eval(), network().eval()
    masks = random_masks(clean)
    x, y = batch()
    for model in (clean, dirty):
        mask(model, masks)
    for name, layer in prunable_layers(dirty).items():
        layer.raw.data[~masks[name]] = value
    assert torch.equal(clean(x), dirty(x))
    functional.cross_entropy(dirty(x), y).backward()
    assert all(bool(p.grad.isfinite().all()) for p in dirty.parameters() if p.grad is not None)
    assert torch.equal(fold(dirty)(x), clean(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_masked_weight_keeps_its_type(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    mask(model, random_masks(model))
    assert model[4].weight.dtype == dtype


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_enforce_clears_weights_and_optimizer_state_at_masked_places_alone(optimizer_of: object) -> None:
    model = network()
    optimizer = optimizer_of(model.parameters())  # type: ignore[operator]
    step(model, optimizer, 0)  # dense: every place has state
    masks = mask(model, random_masks(model))
    step(model, optimizer, 1)  # the parameters are still the optimizer's
    layers = prunable_layers(model)
    before = {n: [la.raw.detach().clone(), *(v.clone() for v in optimizer.state[la.raw].values())] for n, la in layers.items()}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    enforce(model, optimizer)
    for name, layer in layers.items():
        after = [layer.raw.detach(), *optimizer.state[layer.raw].values()]
        kept = masks[name]
        cleared = 0
        for old, new in zip(before[name], after, strict=True):
            if new.shape == kept.shape:
                assert torch.equal(new[kept], old[kept])
                assert old[~kept].any()
                assert not new[~kept].any()
                cleared += 1
            else:
                assert torch.equal(new, old)
        assert cleared >= 2
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if n in others)


def test_enforce_without_masks_or_optimizer_changes_nothing() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    enforce(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    masks = mask(model, random_masks(model))
    enforce(model)
    assert not prunable_layers(model)["0.weight"].raw[~masks["0.weight"]].any()


def test_a_masked_model_compiles_as_one_graph() -> None:
    model = network().eval()
    mask(model, random_masks(model))
    x, _ = batch()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


# where masks live


def test_masks_are_buffers_that_are_saved_and_no_parameters() -> None:
    model = network()
    parameters = {id(p) for p in model.parameters()}
    mask(model, random_masks(model))
    assert {id(p) for p in model.parameters()} == parameters
    buffers = {n: b for n, b in model.named_buffers() if n.endswith("mask")}
    assert len(buffers) == 3
    assert all(b.dtype == torch.bool for b in buffers.values())
    assert buffers.keys() <= model.state_dict().keys()


def test_the_attached_masks_are_copies() -> None:
    model = network()
    given_masks = {"5.weight": torch.ones(4, 5, dtype=torch.bool)}
    mask(model, given_masks)
    given_masks["5.weight"].zero_()
    masks_of(model)["5.weight"].zero_()
    assert masks_of(model)["5.weight"].all()


def test_a_deep_copy_is_its_own_model() -> None:
    model = network().eval()
    masks = mask(model, random_masks(model))
    twin = copy.deepcopy(model)
    x, _ = batch()
    assert torch.equal(twin(x), model(x))
    mask(twin, {n: torch.ones_like(m) for n, m in masks.items()})
    assert masks_of(model).same(masks)
    expected = model(x)
    fold(twin)
    assert torch.equal(model(x), expected)


def test_saving_and_loading_a_masked_model() -> None:
    model = network().eval()
    masks = mask(model, random_masks(model))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = network().eval()
    mask(twin, random_masks(twin, seed=9))
    twin.load_state_dict(torch.load(file, weights_only=True))
    x, _ = batch()
    assert masks_of(twin).same(masks)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("into", ["bare", "masked", "partly"])
@pytest.mark.parametrize("saved", ["bare", "masked", "partly"])
def test_restore_takes_a_state_of_either_kind(saved: str, into: str) -> None:
    models = []
    for kind, seed in ((saved, 3), (into, 4)):
        model = network().eval()
        model[4].bias.data.fill_(seed)
        masks = random_masks(model, seed)
        mask(model, {n: m for n, m in masks.items() if kind == "masked" or (kind == "partly" and n == "4.weight")})
        models.append(model)
    source, target = models
    x, _ = batch()
    assert restore(target, copy.deepcopy(source.state_dict())) is target
    assert target.state_dict().keys() == source.state_dict().keys()
    assert torch.equal(target(x), source(x))


# folding, replacing, ties


def test_fold_keeps_outputs_and_gives_the_state_its_names_and_order_back() -> None:
    model = network().eval()
    before = [(name, value.shape) for name, value in model.state_dict().items()]
    parameters = [id(p) for p in model.parameters()]
    masks = mask(model, random_masks(model))
    x, _ = batch()
    expected = model(x)
    assert fold(model) is model
    assert torch.equal(model(x), expected)
    assert [(name, value.shape) for name, value in model.state_dict().items()] == before
    assert [id(p) for p in model.parameters()] == parameters
    assert all(not model.state_dict()[n][~m].any() for n, m in masks.items())
    assert not masks_of(model)
    network().load_state_dict(model.state_dict())
    assert type(model[4]) is nn.Linear
    assert fold(model) is model


def test_masks_are_replaced_in_place() -> None:
    model = network()
    mask(model, random_masks(model, 1))
    buffers = {n: b for n, b in model.named_buffers() if n.endswith("mask")}
    second = random_masks(model, 2)
    mask(model, {"0.weight": second["0.weight"]})
    assert torch.equal(masks_of(model)["0.weight"], second["0.weight"])
    assert torch.equal(masks_of(model)["4.weight"], random_masks(model, 1)["4.weight"])
    assert all(b is buffers[n] for n, b in model.named_buffers() if n in buffers)


def test_tied_weights_share_one_mask_and_stay_tied() -> None:
    model = Tied()
    tokens = torch.tensor([0, 3, 5])
    masks = mask(model, random_masks(model))
    assert set(masks) == {"first.weight", "head.weight"}
    assert torch.equal(model.first.weight, model.second.weight)
    assert torch.equal(model.embedding.weight, model.head.weight)
    assert not model.embedding.weight[~masks["head.weight"]].any()
    enforce(model)
    expected = model(tokens)
    fold(model)
    assert torch.equal(model(tokens), expected)
    assert model.first.weight is model.second.weight
    assert model.embedding.weight is model.head.weight


@pytest.mark.parametrize("separate", [False, True])
def test_attention_is_masked(separate: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, kdim=4 if separate else None, vdim=4 if separate else None, batch_first=True).eval()
    x, other = torch.randn(2, 3, 8), torch.randn(2, 3, 4 if separate else 8)
    masks = mask(model, random_masks(model))
    assert len(masks) == (4 if separate else 2)
    plain = copy.deepcopy(model)
    fold(plain)
    fresh = nn.MultiheadAttention(8, 2, kdim=4 if separate else None, vdim=4 if separate else None)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    assert torch.equal(model(x, other, other)[0], plain(x, other, other)[0])


def test_wrong_masks_are_refused_before_anything_changes() -> None:
    model = network()
    good = {"0.weight": torch.ones(3, 2, 3, 3)}
    with pytest.raises(MicrogliaError, match=r"no prunable layer '1\.weight' in Sequential"):
        mask(model, good | {"1.weight": torch.ones(3)})
    with pytest.raises(MicrogliaError, match=r"shape \(5, 4\), its weight \(4, 5\)"):
        mask(model, good | {"5.weight": torch.ones(5, 4)})
    assert not masks_of(model)


# the set itself


def test_the_set_counts_and_compares() -> None:
    few = MaskSet({"a": torch.tensor([1, 0, 0]), "b": torch.tensor([[0.0, 1.0]])})
    many = MaskSet({"a": torch.tensor([True, True, False]), "b": torch.tensor([[False, True]])})
    assert (few.kept, few.total, few.density) == (2, 5, 0.4)
    assert list(few) == ["a", "b"]
    assert all(m.dtype == torch.bool for m in few.values())
    assert few.nested_in(many)
    assert few.nested_in(few)
    assert not many.nested_in(few)
    assert few.same(MaskSet(few))
    assert few.same({"b": torch.tensor([[0, 1]]), "a": torch.tensor([1, 0, 0])})
    assert not few.same(many)
    assert not few.same({"a": few["a"]})
    assert MaskSet({"a": few["a"]}).nested_in(many)
    assert repr(few) == "MaskSet(2 layers, 2 of 5 kept, density 0.4)"


def test_masked_weights_keep_the_memory_format():
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    mask(model, {"weight": torch.rand(8, 3, 3, 3) > 0.5})
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    fold(model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
