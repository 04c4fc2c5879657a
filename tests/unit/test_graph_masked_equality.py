"""Where a removed channel is more than a masked one: the plan says so, and against what its error is."""

import pytest
import torch
from torch import nn

import microglia as mg

HALF = mg.Budget(density=0.5)


class Reduced(nn.Module):
    """A hidden layer, a function of it, and a reduction over it without any weight."""

    def __init__(self, function, reduce):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function, self.reduce, self.head = nn.Linear(8, 16), function, reduce, nn.Linear(1, 3)

    def forward(self, x):
        return self.head(self.reduce(self.function(self.first(x))))


class LinearAttention(nn.Module):
    """Attention by the kernel elu + 1 (Katharopoulos et al. 2020), which is 1 at zero."""

    def __init__(self, kernel):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3)
        self.kernel = kernel

    def forward(self, x):
        q, k, v = self.kernel(self.q(x)), self.kernel(self.k(x)), self.v(x)
        return self.o(q @ (k.transpose(1, 2) @ v))


def one_above_elu(x):
    return nn.functional.elu(x) + 1


def cut(model, x):
    small = mg.prune_channels(model.eval(), x, HALF, round_to=1)
    plan = mg.graph.plan_of(small)
    assert plan.error < 1e-10
    return small, plan, [note for note in plan.notes if note.startswith("Removed channels leave")]


def with_zeros(model, plan):
    """Returns the model with the weights and biases zero of all that was removed."""
    with torch.no_grad():
        for name, by_dim in plan.kept.items():
            tensor = model.get_parameter(name)
            for k, kept in by_dim.items():
                gone = torch.ones(tensor.shape[int(k)], dtype=torch.bool)
                gone[kept] = False
                tensor.index_fill_(int(k), gone.nonzero()[:, 0], 0)
    return model


def over_last(x):
    return x.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "reduce", "operator"),
    [
        (torch.sigmoid, over_last, "sum"),
        (torch.cos, over_last, "sum"),
        (torch.relu, lambda x: x.mean(-1, keepdim=True), "mean"),
        (torch.relu, lambda x: x.softmax(-1).square().sum(-1, keepdim=True), "softmax"),
        (torch.exp, lambda x: torch.einsum("bc,bc->b", x, x)[:, None], "einsum"),
        (torch.sigmoid, lambda x: x.var(-1, keepdim=True), "var"),
        (torch.sigmoid, lambda x: torch.var_mean(x, -1, keepdim=True)[0], "var_mean"),
        (torch.exp, lambda x: (x[:, None] @ x[..., None])[:, 0], "matmul"),
    ],
)
def test_a_reduction_that_zeros_would_change_is_named(function, reduce, operator):
    x = torch.randn(4, 8)
    small, plan, (note,) = cut(Reduced(function, reduce), x)
    assert note.startswith(f"Removed channels leave {operator} in the model")
    assert "not against one with zero weights" in note
    difference = (small(x) - with_zeros(Reduced(function, reduce).eval(), plan)(x)).abs().max()
    assert difference > 1e-4  # what the note warns of is there


@pytest.mark.parametrize(
    ("function", "reduce"),
    [
        (torch.relu, over_last),
        (torch.tanh, lambda x: torch.einsum("bc,bc->b", x, x)[:, None]),
        (nn.functional.silu, lambda x: (x[:, None] @ x[..., None])[:, 0]),
        (torch.tanh, lambda x: x.norm(dim=-1, keepdim=True)),
    ],
)
def test_a_reduction_that_zeros_do_not_change_is_the_masked_one_without_a_note(function, reduce):
    x = torch.randn(4, 8)
    small, plan, notes = cut(Reduced(function, reduce), x)
    assert notes == []
    wanted = with_zeros(Reduced(function, reduce).eval(), plan)(x)
    torch.testing.assert_close(small(x), wanted, rtol=1e-5, atol=1e-6)


def test_linear_attention_is_named_where_its_kernel_is_not_zero_at_zero():
    x = torch.randn(2, 5, 8)
    small, plan, (note,) = cut(LinearAttention(one_above_elu), x)
    assert note.startswith("Removed channels leave matmul in the model")
    assert (small(x) - with_zeros(LinearAttention(one_above_elu).eval(), plan)(x)).abs().max() > 1e-3
    small, plan, notes = cut(LinearAttention(torch.relu), x)
    assert notes == []
    torch.testing.assert_close(small(x), with_zeros(LinearAttention(torch.relu).eval(), plan)(x), rtol=1e-5, atol=1e-6)


def test_a_norm_over_a_residual_stream_is_named_by_its_layer():
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    _, _, (note,) = cut(model, torch.randn(4, 8))
    assert "layer_norm in 1" in note


def test_of_many_operators_three_are_shown():
    layers = [m for _ in range(5) for m in (nn.Linear(8, 8), nn.LayerNorm(8))]
    _, _, (note,) = cut(nn.Sequential(*layers, nn.Linear(8, 8)), torch.randn(4, 8))
    assert "and 2 more, where" in note


def test_shrink_never_removes_what_such_a_sum_still_counts():
    model = Reduced(torch.sigmoid, over_last).eval()
    with torch.no_grad():
        model.first.weight[:4], model.first.bias[:4] = 0, 0
    x = torch.randn(4, 8)
    small = mg.shrink(model, x)
    torch.testing.assert_close(small(x), model(x))
    assert not [note for note in mg.graph.plan_of(small).notes if note.startswith("Removed channels leave")]
