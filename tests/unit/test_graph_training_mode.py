"""A graph trains as the model does: its own code for training, norms frozen by hand, every norm and dropout of torch."""

import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import microglia as mg

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Sized(nn.Module):
    """Sizes are written into its forward, so that it comes back as a graph; what is told apart lies behind ``inner``."""

    def __init__(self, inner=None, norm=None):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.inner, self.head = norm or nn.Identity(), inner or nn.Identity(), nn.Linear(16, 5)

    def forward(self, x):
        y = self.norm(self.one(x))
        z = torch.cat([y[:, :8], self.inner(self.two(y[:, 8:]))], 1)
        return self.head(z.mean((2, 3)))


def pair(model, density=0.5):
    """The dense model and its graph."""
    small = mg.prune_channels(model, X[:2], mg.Budget(density=density), round_to=1)
    assert mg.graph.plan_of(small).kind == "graph"
    return model, small


def masked(model):
    """The dense model with zeros for the channels that its graph has lost, and the graph: both compute the same."""
    dense, small = pair(model)
    with torch.no_grad():
        for name in ("one", "two"):
            layer, stay = getattr(dense, name), mg.graph.plan_of(small).kept[f"{name}.weight"]["0"]
            gone = [i for i in range(len(layer.weight)) if i not in stay]
            layer.weight[gone], layer.bias[gone] = 0, 0
    return dense, small


def notes(small):
    return [n for n in mg.graph.plan_of(small).notes if "training" in n]


# ------------------------------------------------------------------------------------------------------- code of one's own
class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(x.shape[0], 1, 1, 1) >= 0.5).float() / 0.5 if self.training else x


class Inherited(DropPath):
    pass


def _noisy(x, training):
    return x + torch.rand_like(x) if training else x


class Helped(nn.Module):
    """Hands its mode to a function in which the word is another."""

    def forward(self, x):
        return _noisy(x, getattr(self, "train" + "ing"))


class Base(nn.Module):
    def drop(self, x):
        return F.dropout(x, 0.5, self.training)

    def scale(self, x):
        if self.training:
            return x * torch.rand(())
        return x


class Dropped(Base):
    def forward(self, x):
        return self.drop(x)


class Scaled(Base):
    def forward(self, x):
        return self.scale(x)


OWN = [DropPath, Inherited, Helped, Dropped, Scaled]
TORCH = [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU]


@pytest.mark.parametrize("kind", OWN + TORCH)
def test_two_passes_differ_in_training_and_are_one_in_evaluation(kind):
    for model in pair(Sized(kind())):
        model.eval()
        assert torch.equal(model(X), model(X))
        model.train()
        assert not torch.equal(model(X), model(X))
        model.eval()
        assert torch.equal(model(X), model(X))


@pytest.mark.parametrize("kind", OWN)
def test_what_code_of_ones_own_computes_is_what_the_model_does(kind):
    dense, small = masked(Sized(kind()))
    for mode in (True, False, True):
        torch.manual_seed(1)
        wanted = dense.train(mode)(X)
        torch.manual_seed(1)
        got = small.train(mode)(X)
        if mode and kind in (Helped, Dropped):  # as many random numbers as channels
            assert got.std() > 0
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*TORCH, Dropped])
def test_a_dropout_follows_the_mode_of_its_own_module(kind):
    for model in pair(Sized(kind())):
        model.train()
        model.inner.eval()
        assert torch.equal(model(X), model(X))
        model.eval()
        model.inner.train()
        assert not torch.equal(model(X), model(X))


def test_what_follows_the_whole_alone_is_named():
    _, small = pair(Sized(Inherited()))
    assert [n for n in notes(small) if "inner (Inherited)" in n and "not that of one module" in n]
    assert not notes(pair(Sized(Dropped(), nn.BatchNorm2d(16)))[1])


def test_random_numbers_of_python_and_numpy_are_named_and_left_alone():
    class Python(nn.Module):
        def forward(self, x):
            return x * random.random() if self.training else x

    class NumPy(nn.Module):
        def forward(self, x):
            return x * float(np.random.rand()) if self.training else x

    for kind in (Python, NumPy):
        random.seed(3), np.random.seed(3)
        _, small = pair(Sized(kind()))
        assert [n for n in notes(small) if f"inner ({kind.__name__})" in n and "Python or NumPy" in n]
        drawn = random.random(), np.random.rand()
        random.seed(3), np.random.seed(3)
        assert drawn == (random.random(), np.random.rand())


def test_code_for_training_that_cannot_be_traced_is_named():
    class Decides(nn.Module):
        def forward(self, x):
            if self.training and x.sum() > 0:
                return x * 2
            return x

    class Heir(Decides):
        pass

    _, small = pair(Sized(Heir(), nn.BatchNorm2d(16)))
    assert [n for n in notes(small) if "inner (Heir)" in n and "cannot be traced" in n]
    before = small.norm.running_mean.clone()
    small.train()(X)
    assert not torch.equal(small.norm.running_mean, before)


def test_outputs_that_are_there_in_training_alone():
    class Auxiliary(Sized):
        def forward(self, x):
            out = super().forward(x)
            return (out, out * 2) if self.training else out

    dense, small = masked(Auxiliary())
    wanted, got = dense.train()(X), small.train()(X)
    assert len(got) == 2
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small.eval()(X), dense.eval()(X), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ norms
NORMS = {
    "as it comes": {},
    "another momentum": {"momentum": 0.4},
    "averaging": {"momentum": None},
    "without statistics": {"track_running_stats": False},
    "without scales": {"affine": False},
    "averaging, without scales": {"momentum": None, "affine": False},
}


def same_statistics(dense, small):
    """Those of the channels that stay, and how many batches were seen, where that is counted."""
    wanted, got = ({n: b for n, b in model.named_buffers() if "norm." in n} for model in (dense, small))
    assert wanted.keys() - got.keys() <= {"norm.num_batches_tracked"}
    for name, value in got.items():
        kept = mg.graph.plan_of(small).kept.get(name, {}).get("0")
        torch.testing.assert_close(value, wanted[name] if kept is None else wanted[name][kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", NORMS.values(), ids=list(NORMS))
@pytest.mark.parametrize("inner", [None, DropPath], ids=["one graph", "two graphs"])
def test_batch_norms(options, inner):
    dense, small = pair(Sized(inner and inner(), nn.BatchNorm2d(16, **options)))
    for model in (dense, small):
        model.train()
        model(X), model(X * 2), model.eval()(X)
    if options.get("track_running_stats", True):
        assert int(small.norm.num_batches_tracked) == 2
        assert float(small.norm.running_mean.abs().max()) > 0.1
    same_statistics(dense, small)


def test_a_training_pass_is_the_models():
    dense, small = masked(Sized(norm=nn.BatchNorm2d(16)))
    torch.testing.assert_close(small.train()(X), dense.train()(X), rtol=1e-4, atol=1e-5)
    dense.norm.eval(), small.norm.eval()
    torch.testing.assert_close(small(X), dense(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(16), nn.InstanceNorm2d(16, affine=True, track_running_stats=True)])
@pytest.mark.parametrize("inner", [None, DropPath], ids=["one graph", "two graphs"])
def test_a_norm_frozen_by_hand_stays_so(norm, inner):
    dense, small = pair(Sized(inner and inner(), norm))
    for model in (dense, small):
        model.train()
        model.norm.eval()
        before = [b.clone() for b in model.norm.buffers()]
        model(X)
        assert all(torch.equal(a, b) for a, b in zip(before, model.norm.buffers(), strict=True))
        model.norm.train()
        model(X)
        assert not torch.equal(model.norm.running_mean, before[0])
    same_statistics(dense, small)


class Frozen(Sized):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("start", [True, False])
def test_a_train_of_ones_own_holds_for_the_graph(start):
    dense, small = pair(Frozen(nn.Dropout(0.5), nn.BatchNorm2d(16)).train(start))
    for model in (dense, small, torch.nn.Sequential(small)):
        model.train()
        assert not torch.equal(model(X), model(X))
    assert not small.norm.training
    assert int(small.norm.num_batches_tracked) == 0
    same_statistics(dense, small)


def test_a_norm_that_was_given_frozen_comes_back_so():
    model = Sized(DropPath(), nn.BatchNorm2d(16)).train()
    model.norm.eval()
    _, small = pair(model)
    assert (small.training, small.norm.training, model.norm.training) == (True, False, False)
    small(X)
    assert int(small.norm.num_batches_tracked) == 0


def test_a_norm_whose_code_never_trains_does_not():
    class Fixed(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)

    dense, small = pair(Sized(norm=Fixed(16)))
    dense.train()(X), small.train()(X)
    same_statistics(dense, small)
    assert float(small.norm.running_mean.abs().max()) == 0


def test_a_norm_that_is_used_twice_counts_twice():
    class Twice(Sized):
        def forward(self, x):
            y = self.norm(self.norm(self.one(x)))
            return self.head(torch.cat([y[:, :8], self.two(y[:, 8:])], 1).mean((2, 3)))

    dense, small = pair(Twice(norm=nn.BatchNorm2d(16)))
    dense.train()(X), small.train()(X)
    assert int(small.norm.num_batches_tracked) == 2
    same_statistics(dense, small)


def test_a_loaded_and_a_copied_graph_train_as_the_first(tmp_path):
    _, small = pair(Frozen(Inherited(), nn.BatchNorm2d(16, momentum=None)).eval())
    loaded = mg.load(mg.save(small, tmp_path / "s"), Frozen(Inherited(), nn.BatchNorm2d(16, momentum=None)))
    for model in (deepcopy(small), loaded):
        model.train()
        assert not model.norm.training
        assert not torch.equal(model(X), model(X))
        model.norm.train()
        model(X)
        assert int(model.norm.num_batches_tracked) == 1
