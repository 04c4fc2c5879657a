"""Modes of somebody's model: set for a while, put back as they were, through its own `train` where it runs."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from microglia.core.modes import evaluating, modes_kept, reading


class Adapted(nn.Module):
    """A low-rank adapter that merges itself into the weight in evaluation mode alone, as such layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.low = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.full((2, 2), 0.5))
        self.merged, self.calls = False, 0

    def train(self, mode: bool = True):
        super().train(mode)
        self.calls += 1
        if mode == self.merged:
            with torch.no_grad():
                self.weight += -self.low if self.merged else self.low
            self.merged = not mode
        return self

    def forward(self, x):
        return x @ (self.weight if self.merged else self.weight + self.low)


def mixed() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()  # frozen by its owner
    return model


@pytest.mark.parametrize("context", [modes_kept, evaluating, reading])
@pytest.mark.parametrize("mode", [True, False])
def test_every_module_is_back_in_its_own_mode(context, mode):
    model = mixed()
    model.training = mode
    with context(model):
        model.train()
    assert [m.training for m in model.modules()] == [mode, True, False, True]
    with pytest.raises(RuntimeError, match="mine"), context(model):  # noqa: PT012
        model.train()
        raise RuntimeError("mine")
    assert [m.training for m in model.modules()] == [mode, True, False, True]


@pytest.mark.parametrize("context", [evaluating, reading])
def test_within_it_every_module_is_in_evaluation_mode(context):
    model = mixed()
    with context(model):
        assert not any(m.training for m in model.modules())


def test_a_model_that_runs_goes_through_its_own_train():
    model = Adapted()
    x = torch.eye(2)
    before = model(x)
    with evaluating(model):
        assert model.merged
        assert torch.equal(model(x), before)
    assert not model.merged
    assert torch.equal(model(x), before)  # merged once more it would be larger
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_a_model_that_is_read_is_not_told():
    model = Adapted()
    with reading(model):
        assert not torch.is_grad_enabled()
    assert model.calls == 0
    assert torch.is_grad_enabled()


def test_reading_leaves_the_state_of_a_parametrization():
    layer = spectral_norm(nn.Linear(4, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with reading(layer):
        first, second = layer.weight, layer.weight
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
