"""What cannot be traced or cut is said in one sentence, with the place, and nothing of torch's own reaches the terminal."""

import inspect
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import microglia as mg
from microglia.graph.dims.trace import TraceError

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), nn.Linear(8, 4)

    def between(self, x):
        return x

    def forward(self, x):
        return self.h(self.b(self.between(torch.relu(self.a(x)))).mean((2, 3)))


class Decides(Plain):
    def between(self, x):
        if x.sum() > 0:
            return x * 2
        return x


class Choice(nn.Module):
    def forward(self, x):
        return x * 2 if x.max().item() > 0 else x


class Nested(Plain):
    def __init__(self):
        super().__init__()
        self.choice = Choice()

    def between(self, x):
        return self.choice(x)


def _helper(x):
    return x[x > 0].sum() + x if float(x.mean()) > 0 else x


class Helped(Plain):
    def between(self, x):
        return _helper(x)


class Numpy(Plain):
    def between(self, x):
        return torch.from_numpy(x.detach().numpy() * 2)


PATHS = [
    lambda model, x: mg.prune_channels(model, x, mg.Budget(density=0.5), round_to=1),
    mg.shrink,
]


def refused(model, x, *words):
    """What both paths say of a model: one line without torch's own words, and nothing else."""
    for path in PATHS:
        with pytest.raises(TraceError) as caught:
            path(model, x)
        text = str(caught.value)
        assert "\n" not in text
        assert len(text) < 600
        for word in words:
            assert word in text
    return text


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return f"line {first + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize(
    ("kind", "place", "function", "code"),
    [
        (Decides, "Decides.between", Decides.between, "if x.sum() > 0"),
        (Nested, "Choice.forward", Choice.forward, "x.max().item()"),
        (Helped, "_helper in Helped", _helper, "float(x.mean())"),
        (Numpy, "Numpy.between", Numpy.between, "numpy()"),
    ],
)
def test_a_forward_that_depends_on_values_is_named_with_its_line(capfd, kind, place, function, code):
    refused(kind(), X, f"torch.export cannot trace {kind.__name__} ({place}", __file__, line_of(function, code), code)
    assert capfd.readouterr() == ("", "")


def test_a_model_with_parts_is_pruned_in_silence(capfd):
    class Parted(Decides):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = PATHS[0](Parted(), X)
    assert small.a[0].out_channels == 8
    assert [n for n in mg.graph.plan_of(small).notes if "cannot be traced whole" in n]
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------- random forwards
DRAWS = {
    "randn": lambda x: x + torch.randn(x.shape),
    "rand": lambda x: x * torch.rand(()),
    "randn_like": lambda x: x + torch.randn_like(x),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "normal": lambda x: x + torch.empty_like(x).normal_(),
    "dropout": F.dropout,
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
}


class Drawing(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return self.draw(x)


@pytest.mark.parametrize("name", DRAWS)
def test_a_random_forward_is_refused_as_such(name):
    model = Nested()
    model.choice = Drawing(DRAWS[name])
    refused(model, X, f"The forward of Nested is random in evaluation mode, by {name} in choice")


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_numbers_of_python_and_numpy_are_random_too(draw):
    class Random(Plain):
        def between(self, x):
            return x * float(draw())

    refused(Random(), X, "The forward of Random is random in evaluation mode, by numbers of Python or NumPy")


def test_what_draws_and_returns_nothing_of_it_is_taken():
    class Unused(Plain):
        def between(self, x):
            torch.randn_like(x)
            return F.dropout(x, 0.0)

    assert PATHS[0](Unused(), X).a.out_channels == 8


# ----------------------------------------------------------------------------------------------------------- kinds of models
def quantized():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore")
def test_kinds_that_cannot_be_cut():
    refused(torch.jit.script(Plain()), X, "RecursiveScriptModule is a module of TorchScript", "give the model from which")
    refused(torch.jit.trace(Plain(), X), X, "TopLevelTracedModule is a module of TorchScript")
    whole = Plain()
    whole.b = torch.jit.script(whole.b)
    refused(whole, X, "b of Plain is a module of TorchScript")
    whole.b = nn.LazyConv2d(8, 3)
    refused(whole, X, "b of Plain is a LazyConv2d whose sizes are not known yet: run the model once first")
    refused(quantized(), torch.randn(2, 8), "0 of Sequential is quantized (Linear): prune the model first")


def test_a_lazy_model_that_has_run_is_taken():
    model = Plain()
    model.b = nn.LazyConv2d(8, 3)
    model(X)
    assert PATHS[0](model, X).a.out_channels == 8


def test_inputs_that_do_not_fit_are_named_as_they_were_given():
    wrong = torch.randint(0, 9, X.shape)
    refused(Plain(), wrong, "Plain does not run on the example inputs ((2, 3, 12, 12) torch.int64 on cpu)", "Give inputs of")
    refused(Plain(), X[:, :2], "Plain does not run on the example inputs ((2, 2, 12, 12) torch.float32 on cpu)")


class Extra(Plain):
    """Has a state that is no tensor."""

    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        assert state == {"seen": 3}


class ExtraSized(Extra):
    def between(self, x):
        return x.reshape(x.shape[0], 16, 10, 10)


@pytest.mark.parametrize(("kind", "made"), [(Extra, "module"), (ExtraSized, "graph")])
def test_a_state_that_is_no_tensor_is_no_hindrance(kind, made):
    model = kind().eval()
    small = PATHS[0](model, X)
    assert mg.graph.plan_of(small).kind == made
    assert small(X).shape == model(X).shape
    if made == "module":
        assert small.state_dict()["_extra_state"] == {"seen": 3}
