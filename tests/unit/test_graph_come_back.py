"""What comes back as a graph learns, counts and changes its precision as the model: no parameter becomes a constant."""

import functools
import importlib.util
from copy import deepcopy

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.graph.cutting.plan import plan_of

X = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Attention(nn.Module):
    """Biases by position, of which evaluation keeps what it computed first: as timm's LeViT, TinyViT and EfficientFormer do."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 48), nn.Linear(16, 12)
        self.attention_biases = nn.Parameter(torch.randn(4, 9))
        place = torch.arange(9)
        self.register_buffer("index", (place[:, None] - place[None]).abs())
        self.kept = {}

    def train(self, mode=True):
        super().train(mode)
        self.kept = {}
        return self

    def _apply(self, fn, *args, **kwargs):
        self.kept = {}
        return super()._apply(fn, *args, **kwargs)

    def biases(self, x):
        if self.training:
            return self.attention_biases[:, self.index]
        if str(x.device) not in self.kept:
            self.kept[str(x.device)] = self.attention_biases[:, self.index]
        return self.kept[str(x.device)]

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], 9, 4, 12).split([4, 4, 4], 3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attention = (q @ k.transpose(-2, -1) + self.biases(x)).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(x.shape[0], 9, 16))


class Original(Attention):
    """Keeps them in an attribute when it leaves training, as the first LeViT does."""

    @torch.no_grad()
    def train(self, mode=True):
        nn.Module.train(self, mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        else:
            self.ab = self.attention_biases[:, self.index]
        return self

    def biases(self, x):
        return self.attention_biases[:, self.index] if self.training else self.ab


class Twice(nn.Module):
    """Two of them with one and the same values, as they are built: zeros."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = kind(), kind()
        with torch.no_grad():
            self.first.attention_biases.zero_(), self.second.attention_biases.zero_()
        self.hidden, self.out = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.hidden(self.second(self.first(x)))
        return self.out(torch.cat([y[..., :4].relu(), y[..., 4:]], -1))


def cut(model, x=X):
    small = mg.prune_channels(model.eval(), x, mg.Budget(density=0.5), round_to=1)
    assert plan_of(small).kind == "graph"
    return small


@functools.cache
def _once(kind):
    torch.manual_seed(0)
    model = Twice(kind).eval()
    return model, cut(model)


def cut_once(kind):
    """Returns a model of a kind that never ran, and a copy of what its cut gave."""
    model, small = _once(kind)
    return model, deepcopy(small)


KINDS = [Attention, Original]
BIASES = {"first.attention_biases", "second.attention_biases"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ran", ["never", "without gradients", "with gradients"])
def test_what_evaluation_keeps_stays_a_parameter(kind, ran):
    if ran == "never":
        model, small = cut_once(kind)
    else:
        model = Twice(kind).eval()
        with torch.set_grad_enabled(ran == "with gradients"):
            model(X)
        small = cut(model)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in small.named_parameters()}
    assert plan_of(small).parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (model, small))
    for mode in (True, False):
        small.train(mode).zero_grad()
        small(X).square().sum().backward()
        assert all(float(small.get_parameter(name).grad.abs().max()) > 0 for name in BIASES)
    assert not [n for n in plan_of(small).notes if "does not hold" in n]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_is_what_evaluation_computes(kind):
    _, small = cut_once(kind)
    for name in sorted(BIASES):
        before = small(X)
        with torch.no_grad():
            small.get_parameter(name)[:, 0] += 3.0
        assert float((small(X) - before).detach().abs().max()) > 1e-5
    torch.testing.assert_close(small.train()(X), small.eval()(X))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_go_with_their_biases(kind):
    model = Twice(kind).eval()
    with torch.no_grad():
        for part in (model.first, model.second):
            part.attention_biases[:2].normal_()
            part.qkv.weight[24:], part.qkv.bias[24:], part.proj.weight[:, 8:] = 0, 0, 0
    small = mg.prune_channels(model, X, mg.Budget(density=0.5), round_to=1)
    assert small.get_parameter("first.qkv.weight").shape == (24, 12)
    assert torch.equal(small.get_parameter("first.attention_biases"), model.first.attention_biases[:2])
    for mode in (True, False):
        small.train(mode)(X).sum().backward()


def test_what_training_does_not_show_is_named_and_not_counted():
    class Hidden(Attention):
        def biases(self, x):
            if not self.kept:
                self.kept["all"] = self.attention_biases.detach()[:, self.index]
            return self.kept["all"]

        def train(self, mode=True):
            return nn.Module.train(self, mode)

    model = Twice(Hidden)
    small = cut(model)
    lost = model.first.attention_biases.numel() + model.second.attention_biases.numel()
    assert [n for n in plan_of(small).notes if all(name in n for name in BIASES) and "no optimizer reaches" in n]
    assert plan_of(small).parameters[1] == sum(p.numel() for p in small.parameters())
    assert plan_of(small).parameters[0] == sum(p.numel() for p in model.parameters())
    assert lost == 72


def test_a_parameter_that_nothing_reads_is_named_and_not_counted():
    model = Twice(Attention)
    model.unused = nn.Parameter(torch.zeros(7))
    small = cut(model)
    assert [n for n in plan_of(small).notes if "does not hold unused" in n]
    assert plan_of(small).parameters[1] == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded(kind, tmp_path):
    _, small = cut_once(kind)
    again = mg.load(mg.save(small, tmp_path / "s"), Twice(kind)).eval()
    torch.testing.assert_close(again(X), small(X), rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------- precision
class Encoding(nn.Module):
    """Computes positions in float32 and hands them to a layer in its own type, as timm's XCiT does."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x):
        place = torch.arange(9, dtype=torch.float32)[:, None] / torch.arange(1, 5).to(torch.float32)
        return x + self.project(place.sin().to(self.project.weight.dtype))


class Encoded(Twice):
    def __init__(self, encoding):
        super().__init__(Attention)
        self.encoding = encoding

    def forward(self, x):
        return super().forward(self.encoding(x))


class Constant(nn.Module):
    """Adds a constant of the input's own type."""

    def forward(self, x):
        return x + torch.tensor([0.1] * 12, dtype=x.dtype)


class Stated(nn.Module):
    """Adds a constant in float32 and goes back to the type of the input; the sum is more exact than the input."""

    def forward(self, x):
        return (x + torch.tensor([0.1] * 12)).to(x.dtype)


class Cast(nn.Module):
    """Computes in float32 whatever it is given."""

    def forward(self, x):
        return x.to(torch.float32).softmax(-1).to(x.dtype)


@pytest.mark.parametrize("encoding", [Encoding, Constant, Stated, Cast])
def test_a_graph_follows_the_precision(encoding):
    dense = Encoded(encoding()).eval()
    small = mg.prune_channels(dense, X, mg.Budget(density=0.5), round_to=1, exclude=("first.*", "second.*"))
    stay = plan_of(small).kept["hidden.weight"]["0"]
    with torch.no_grad():  # the channels that are gone are zero
        gone = [i for i in range(8) if i not in stay]
        dense.hidden.weight[gone], dense.hidden.bias[gone] = 0, 0
    for dtype, exact in ((torch.float64, 1e-11), (torch.bfloat16, 0.05)):
        for mode in (True, False):
            wanted = deepcopy(dense).to(dtype).train(mode)(X.to(dtype))
            got = deepcopy(small).to(dtype).train(mode)(X.to(dtype))
            assert got.dtype == wanted.dtype == dtype
            torch.testing.assert_close(got, wanted, rtol=exact, atol=exact)


def test_a_constant_that_keeps_its_type_keeps_its_value():
    small = cut(Encoded(Stated()))
    (name,) = small.microglia_fixed
    before = small.get_buffer(name).clone()
    small.bfloat16().double()
    assert torch.equal(small.get_buffer(name), before)
    assert small.get_buffer(name).dtype == torch.float32


# -------------------------------------------------------------------------------------------------------------------- timm
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_levit_of_timm():
    from timm.models.levit import Levit

    images = torch.randn(2, 3, 32, 32)
    levit = Levit(img_size=32, num_classes=5, embed_dim=(32,), key_dim=8, depth=(1,), num_heads=(4,))
    small = cut(levit, images)
    assert {n for n, _ in small.named_parameters()} == {n for n, _ in levit.named_parameters()}
    assert plan_of(small).parameters[1] == sum(p.numel() for p in small.parameters())
