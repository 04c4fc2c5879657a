"""Executions: equal outputs, traps of fusing, what is left out, and a model that stays as it was."""

import copy
import os
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError, UnknownNameError
from microglia.core.running import folded_twin
from microglia.measure import executions
from microglia.runtime.dense.packing import Packed, pack


class Residual(nn.Module):
    """Every way a residual network adds: before, after, in place, with a projection computed later."""

    def __init__(self, inplace):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.conv3, self.norm3 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.project, self.project_norm = nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        self.inplace = inplace

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)), inplace=self.inplace)
        y = F.relu(self.norm1(self.conv1(x)), inplace=self.inplace)
        y = self.norm2(self.conv2(y))
        y = y.add_(x) if self.inplace else x + y
        y = F.relu(y, inplace=self.inplace)
        z = self.norm3(self.conv3(y))
        shortcut = self.project_norm(self.project(y))
        z = z.add_(shortcut) if self.inplace else z + shortcut
        return self.head(F.relu(z, inplace=self.inplace).mean((2, 3)))


class Traps(nn.Module):
    """What a careless fusion gets wrong: shared readers, values overwritten in between, broadcasts, reused modules."""

    def __init__(self, trap):
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.trap = trap

    def forward(self, x):
        y = self.conv(x)
        match self.trap:
            case "two readers":
                return self.norm(y) + y
            case "relu and raw":
                return F.relu(y) - y
            case "add to itself":
                return F.relu(y + y)
            case "broadcast":
                return F.relu(y + y.new_ones(1, 4, 1, 1))
            case "scaled addition":
                return torch.add(y, x, alpha=3)
            case "number":
                return F.relu(y + 1)
            case "overwritten before the addition":
                z = x * 2
                out = self.other(x)
                z.mul_(-1)
                return out + z + y
            case "overwritten by the addition":
                z = F.relu(x)
                w = z.view(-1)
                z += y
                return self.other(z) + w.view(z.shape)
            case "input overwritten after":
                x = x.clone()
                out = self.conv(x)
                x.zero_()
                return F.relu(out + x)
            case "reused":
                return self.conv(F.relu(self.norm(self.conv(self.norm(y)))))
            case "in-place on a value read again":
                return F.relu_(y) + self.other(y)
            case "result of an addition read twice":
                z = self.other(x)
                z += y
                return F.relu(z) - z

    traps = (
        "two readers",
        "relu and raw",
        "add to itself",
        "broadcast",
        "scaled addition",
        "number",
        "overwritten before the addition",
        "overwritten by the addition",
        "input overwritten after",
        "reused",
        "in-place on a value read again",
        "result of an addition read twice",
    )


class Activations(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, groups=groups) for groups in (1, 2, 3, 6, 1, 1, 1))
        self.unusual = nn.Conv2d(6, 6, 3, padding="same", padding_mode="circular")
        self.linears = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

    def forward(self, x):
        functions = [F.relu6, F.hardswish, F.silu, F.sigmoid, F.tanh, lambda t: F.hardtanh(t, -0.3, 0.4), F.hardtanh]
        for conv, function in zip(self.convs, functions, strict=True):
            x = function(conv(x) * 3)
            x = function(conv(x))
        x = self.unusual(x).mean((2, 3))
        functions = [F.gelu, lambda t: F.gelu(t, approximate="tanh"), F.relu, F.silu, F.leaky_relu]
        for linear, function in zip(self.linears, functions, strict=True):
            x = function(linear(x))
        return {"logits": x, "more": (x + 1, 3)}


def settled(model):
    """Gives the batch norms statistics and affine values that are not those of a fresh layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def agree(model, inputs, kinds, tolerance=1e-4):
    notes = []
    ready = executions(model, inputs, kinds, notes=notes)
    assert list(ready) == list(kinds), notes
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        expected = tree_leaves(model(*(x.clone() for x in args)))
    for execution in ready.values():
        for _ in range(2):
            for one, other in zip(expected, tree_leaves(execution()), strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * 10)
    return ready


KINDS = ("eager", "eager-channels-last", "packed")


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_executions_of_a_residual_network_agree(inplace, batch):
    agree(settled(Residual(inplace)), torch.randn(batch, 3, 8, 8), KINDS)


def test_a_residual_network_is_wholly_packed():
    for inplace in (True, False):
        packed = pack(folded_twin(settled(Residual(inplace))), Example.of(torch.randn(2, 3, 8, 8)))
        layers = [module.site for module in packed.modules() if isinstance(module, Packed)]
        assert [(layer.kind, layer.residual) for layer in layers].count(("conv2d", False)) == 3
        assert [(layer.kind, layer.residual) for layer in layers].count(("conv2d", True)) == 2
        assert [(layer.kind, layer.residual) for layer in layers].count(("linear", False)) == 1
        left = [node.target for node in packed.graph.nodes if node.op == "call_function"]
        assert left == [torch.ops.aten.mean.dim]


def test_a_linear_layer_takes_the_sum_in_and_the_activation_behind_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x):
            return torch.relu(x + self.outer(nn.functional.gelu(self.inner(x))))

    x = torch.randn(2, 5, 6)
    packed = pack(folded_twin(Block().eval()), Example.of(x))
    layers = [module.site for module in packed.modules() if isinstance(module, Packed)]
    assert [(layer.residual, layer.activation.name) for layer in layers] == [(False, "gelu"), (True, "relu")]
    agree(Block().eval(), x, ("eager", "packed"))


class Readers(nn.Module):
    """A sum whose residual, the output of a layer, is read in different ways beside the sum."""

    def __init__(self, way):
        super().__init__()
        self.stem, self.inner, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.way = way

    def forward(self, x):
        kept = self.stem(x)
        match self.way:
            case "nobody else":
                return self.inner(self.last(x)) + kept
            case "another layer before":
                return self.last(self.inner(self.last(kept)) + kept)
            case "a norm before":
                return self.inner(F.layer_norm(kept, (6, 6))) + kept
            case "a norm behind":
                return self.inner(self.last(x)) + kept, F.layer_norm(kept, (6, 6))
            case "another layer behind":
                return self.inner(self.last(x)) + kept, self.last(kept)
            case "its own input":
                return self.last(self.inner(kept) + kept)
            case "the input of the model":
                return self.last(self.inner(kept) + x)
            case "the caller":
                return self.inner(self.last(x)) + kept, kept
            case "a view":
                return self.inner(self.last(x)) + kept, kept.flatten(1)
            case "an operator":
                return self.inner(self.last(x)) + kept, F.max_pool2d(kept, 2)


@pytest.mark.parametrize(
    ("way", "written"),
    [("nobody else", 1), ("another layer before", 1), ("a norm before", 1), ("a norm behind", 0),
     ("another layer behind", 0), ("its own input", 0),
     ("the input of the model", 0), ("the caller", 0), ("a view", 0), ("an operator", 0)],
)  # fmt: skip
def test_a_residual_is_written_over_only_where_nobody_reads_it_again(way, written):
    torch.manual_seed(0)
    model, x = Readers(way).eval(), torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    packed = pack(folded_twin(model), Example.of(x))
    assert sum(module.overwrites for module in packed.modules() if isinstance(module, Packed)) == written
    before = x.clone()
    with torch.no_grad():
        for graph in (packed, copy.deepcopy(packed), packed):
            for out, expected in zip(tree_leaves(graph(x)), tree_leaves(model(x)), strict=True):
                torch.testing.assert_close(out, expected)
    assert x.equal(before)


def test_a_packed_model_can_be_copied_and_pickled():
    x = torch.randn(2, 3, 8, 8)
    packed = pack(folded_twin(settled(Residual(False))), Example.of(x))
    again = copy.deepcopy(packed)
    assert torch.equal(again(x), packed(x))
    site = next(module for module in packed.modules() if isinstance(module, Packed)).site
    assert pickle.loads(pickle.dumps(Packed(site))).site.weight.equal(site.weight)


@pytest.mark.parametrize("trap", Traps.traps)
def test_packing_keeps_out_of_traps(trap):
    agree(settled(Traps(trap)), torch.randn(2, 4, 6, 6), ("eager", "packed"))


def test_activations_groups_and_outputs_of_any_form():
    agree(Activations().eval(), torch.randn(2, 6, 7, 7), KINDS)


def test_packed_transformer():
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True, activation="gelu")
    agree(nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 16), ("eager", "packed"))


class Keep(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return torch.where(self.mask, weight, 0.0)


def test_masks_are_folded_even_where_an_embedding_shares_the_weight():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    model = Language().eval()
    parametrize.register_parametrization(model.head, "weight", Keep(torch.rand(9, 6) < 0.5))
    agree(model, torch.arange(9)[None], ("eager", "packed"))
    assert model.head.parametrizations.weight.original is model.embedding.weight


def test_the_model_the_inputs_and_the_generator_stay():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 4, 3), nn.Dropout()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, images):
            self.calls += 1
            return self.drop(self.conv(images.mul_(1)).relu_())

    model = Stateful().train()
    parametrize.register_parametrization(model.conv, "weight", Keep(torch.rand(4, 3, 3, 3) < 0.5))
    images = torch.randn(2, 3, 6, 6)
    before, given, state = {k: v.clone() for k, v in model.state_dict().items()}, images.clone(), torch.get_rng_state()
    ready = executions(model, images, KINDS)
    assert "eager" in ready
    for execution in ready.values():
        assert not execution().requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert model.drop.training
    assert all(p.requires_grad for p in model.parameters())


def test_what_does_not_work_is_left_out_and_said():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else -self.layer(x)

    notes = []
    assert list(executions(Branching(), torch.randn(2, 4), KINDS, notes=notes)) == ["eager"]
    assert [note.partition(" was left out: ")[0] for note in notes] == ["eager-channels-last", "packed"]
    notes.clear()
    assert list(executions(nn.ReLU(), torch.randn(2, 4), ("eager", "packed"), notes=notes)) == ["eager"]
    assert "no 2-d convolution or linear layer" in notes[0]
    notes.clear()
    assert list(executions(nn.Linear(4, 4).double(), torch.randn(2, 4).double(), KINDS, notes=notes)) == ["eager"]


def test_a_missing_compiler_is_a_note(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nin a long text")

    monkeypatch.setattr(torch, "compile", refuse)
    notes = []
    assert list(executions(nn.Linear(4, 4), torch.randn(2, 4), ("eager", "compiled"), notes=notes)) == ["eager"]
    assert notes == ["compiled was left out: InvalidCxxCompiler: No working C++ compiler found"]


def test_an_execution_that_computes_something_else_is_left_out(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *args: function(*args) * 1.001)
    notes = []
    assert list(executions(nn.Linear(4, 4), torch.randn(2, 4), ("eager", "compiled"), notes=notes)) == ["eager"]
    assert "differ from the model's by up to" in notes[0]


def test_each_compiled_execution_has_a_code_object_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append((function, options)) or function)
    for _ in range(2):
        executions(nn.Linear(4, 4), torch.randn(2, 4), ("compiled",))
    (one, options), (other, _) = seen
    assert one.__code__ is not other.__code__
    assert one.__code__ != other.__code__
    assert options == {"dynamic": False, "options": {"freezing": True}}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_compiled_agrees():
    agree(settled(Residual(inplace=True)), torch.randn(2, 3, 8, 8), ("eager", "compiled"))


def test_errors_are_for_the_reader():
    with pytest.raises(UnknownNameError, match=r"no execution named 'packd'\. Did you mean 'packed'"):
        executions(nn.Linear(4, 4), torch.randn(2, 4), ("packd",))
    with pytest.raises(MicrogliaError, match="does not run on the example inputs"):
        executions(nn.Linear(4, 4), torch.randn(2, 3))
