"""Where gathering pays: limits by timing, the choice between gathered and masked. The outputs are equal in any case."""

from __future__ import annotations

import functools

import pytest
import torch

from gated import SHAPE, gated, images, network
from microglia.core.timing import Timing
from microglia.dynamic import Fastest, Gathered, tune, tuning

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def told(times: dict[str, float]):
    """Returns a stand-in for the clock: times by the name of what is timed."""

    def time_interleaved(calls, **settings):
        for call in calls.values():
            call()
        return {name: Timing(times[name], 0, 0, 1) for name in calls}

    return time_interleaved


@functools.cache
def compiled(name: str) -> Gathered:
    """Returns the gathered execution of a gated network: a trace takes long."""
    return Gathered(gated(network(name).double(), images(1).double()), images(1).double())


@pytest.mark.parametrize("limit", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["residual", "depthwise", "branches"])
def test_layers_that_run_whole_compute_the_same(name: str, limit: float) -> None:
    fast, x = compiled(name), images(3, shape=SHAPE).double()
    fast.limits = {}
    gathered = fast(x), fast.macs
    fast.limits = dict.fromkeys(fast.flow.convolutions, limit)
    torch.testing.assert_close(fast(x), gathered[0], rtol=1e-12, atol=1e-12)
    assert fast.macs > gathered[1] if limit == 0 else fast.macs >= gathered[1]


def test_the_limit_is_where_the_times_cross() -> None:
    assert tuning._limit({0.25: 1.0, 0.5: 2.0, 0.75: 4.0}, 3.0) == pytest.approx(0.625)
    assert tuning._limit({0.25: 1.0, 0.5: 2.0}, 3.0) == 1.0
    assert tuning._limit({0.25: 4.0, 0.5: 2.0}, 3.0) == 0.0


def test_tuning_sets_a_limit_for_every_layer_and_keeps_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"whole": 1.0, **{str(f): 2 * f for f in tuning.FRACTIONS}}
    monkeypatch.setattr(tuning, "time_interleaved", told(times))
    model, x = gated(network("residual"), images(1)), images(2, shape=SHAPE)
    fast = Gathered(model, x[:1])
    found = tune(fast)
    assert sorted(layer for crossover in found for layer in crossover.layers) == sorted(fast.flow.convolutions)
    whole = {layer: crossover.limit for crossover in found for layer in crossover.layers}
    assert whole == fast.limits
    assert whole["stem"] == pytest.approx(0.5)  # its input is the image: half the products at half the filters
    assert whole["one"] == pytest.approx(0.25)
    torch.testing.assert_close(fast(x), model(x).detach(), **CLOSE)


@pytest.mark.parametrize("winner", ["gathered", "masked", "masked packed"])
def test_the_fastest_is_chosen_for_each_shape_and_equals_the_model(monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    times = dict.fromkeys(["whole", *map(str, tuning.FRACTIONS)], 1.0)
    times |= {name: 1.0 if name == winner else 2.0 for name in ("gathered", "masked", "masked packed")}
    monkeypatch.setattr(tuning, "time_interleaved", told(times))
    model, x = gated(network("residual"), images(1)), images(3, shape=SHAPE)
    fast = Fastest(model, x[:1])
    for batch in (x, x[:1], x.flip(0)):
        torch.testing.assert_close(fast(batch), model(batch).detach(), **CLOSE)
    assert fast.chosen == {(3, *SHAPE): winner, (1, *SHAPE): winner}
    assert set(fast.times[3, *SHAPE]) == {"gathered", "masked", "masked packed"}


def test_timed_for_real() -> None:
    model, x = gated(network("residual"), images(1)), images(1, shape=SHAPE)
    fast = Fastest(model, x)
    torch.testing.assert_close(fast(x), model(x).detach(), **CLOSE)
    assert fast.chosen[tuple(x.shape)] == min(fast.times[tuple(x.shape)], key=fast.times[tuple(x.shape)].__getitem__)
    assert all(0 <= limit <= 1 for limit in fast.gathered.limits.values())
