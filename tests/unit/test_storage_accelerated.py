"""Saving an accelerated model writes the model that it was made of; pickling it is refused."""

import copy
import io
import pickle

import pytest
import torch

import microglia as mg
from microglia.core.errors import MicrogliaError


def small(pattern):
    torch.manual_seed(0)
    model = mg.tasks.build("resnet20", classes=10, shape=(3, 32, 32))
    mg.methods.OneShot(model, pattern=pattern, density=0.3, scope="layer").finish()
    return model.eval()


def accelerated(model, x):
    return mg.accelerate(model, x, against=("eager",), cache=None, rounds=1)


def test_what_is_saved_loads_alone_and_is_the_model_that_was_accelerated(tmp_path):
    model, x = small(mg.Block(16, 1)), torch.randn(1, 3, 32, 32)
    fast = accelerated(model, x)
    loaded = mg.load(mg.save(fast, tmp_path), kernels="none").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    again = accelerated(loaded, x)
    torch.testing.assert_close(again(x), fast(x))
    densities = [[layer.density for layer in one.report().layers] for one in (fast, again)]
    assert densities[0] == densities[1]
    assert min(densities[0]) < 0.5


def test_a_shrunk_model_that_was_accelerated_is_saved_as_shrunk(tmp_path):
    model, x = small(mg.Channel()), torch.randn(1, 3, 32, 32)
    shrunk = mg.shrink(model, x)
    loaded = mg.load(mg.save(accelerated(shrunk, x), tmp_path), kernels="none").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), shrunk(x))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())


def test_pickling_is_refused_in_words_and_copying_is_not():
    model, x = small(mg.Block(16, 1)), torch.randn(1, 3, 32, 32)
    fast = accelerated(model, x)
    for write in (pickle.dumps, lambda given: torch.save(given, io.BytesIO())):
        with pytest.raises(MicrogliaError, match=r"microglia\.save, read it with microglia\.load, then accelerate"):
            write(fast)
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
