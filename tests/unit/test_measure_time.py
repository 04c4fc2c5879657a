"""Timing without timing: the order of calls under a fake clock, and what a report says."""

import gc
import json
import random
import sys

import pytest
import torch
from torch import nn

from microglia.core.errors import MicrogliaError, UnknownNameError
from microglia.measure import LatencyReport, Timing, measure, measure_latency, time_interleaved


class Clock:
    """Time that passes only in the functions it makes."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def function(self, name, *costs):
        costs = list(costs)

        def call():
            self.calls.append(name)
            self.now += costs.pop(0) if len(costs) > 1 else costs[0]

        return call


def test_medians_quartiles_and_calls_per_round():
    clock = Clock()
    slow = clock.function("slow", 9.0, 9.0, 7.0, 1.0, 7.0, 2.0, 7.0, 3.0, 7.0, 4.0, 7.0, 5.0)  # 7: calls that begin a turn
    fast = clock.function("fast", 0.25)
    times = time_interleaved({"slow": slow, "fast": fast}, rounds=5, warmup=2, min_round_seconds=1.0, clock=clock)
    assert list(times) == ["slow", "fast"]
    assert times["slow"] == Timing(median=3000.0, low=2000.0, high=4000.0, rounds=5)
    assert times["fast"] == Timing(median=250.0, low=250.0, high=250.0, rounds=5)
    assert clock.calls[:4] == ["slow", "slow", "fast", "fast"]
    assert clock.calls.count("fast") == 2 + 5 * (1 + 4)
    assert clock.calls.count("slow") == 2 + 5 * (1 + 1)


def order(seed, rounds=8):
    clock = Clock()
    functions = {name: clock.function(name, 1.0) for name in "abcd"}
    time_interleaved(functions, rounds=rounds, warmup=1, min_round_seconds=0, seed=seed, clock=clock)
    calls = clock.calls[4::2]
    assert calls == clock.calls[5::2]
    return [tuple(calls[at : at + 4]) for at in range(0, len(calls), 4)]


def test_every_round_runs_each_once_in_a_seeded_order():
    rounds = order(seed=0)
    assert len(rounds) == 8
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 1
    assert order(seed=0) == rounds
    assert order(seed=1) != rounds


def test_the_order_draws_from_a_generator_of_its_own():
    state, torch_state = random.getstate(), torch.get_rng_state()
    order(seed=3)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_no_round_starts_after_the_limit_but_three_are_kept():
    clock = Clock()
    functions = {"one": clock.function("one", 2.0)}
    assert time_interleaved(functions, rounds=50, max_seconds=21, clock=clock)["one"].rounds == 6
    assert time_interleaved(functions, rounds=50, max_seconds=0, clock=clock)["one"].rounds == 3
    assert time_interleaved(functions, rounds=1, max_seconds=0, clock=clock)["one"] == Timing(2000.0, 2000.0, 2000.0, 1)


@pytest.mark.parametrize("wrong", [{"callables": {}}, {"rounds": 0}, {"warmup": 0}])
def test_timing_nothing_is_an_error(wrong):
    with pytest.raises(MicrogliaError, match="at least one"):
        time_interleaved(**{"callables": {"one": lambda: None}, **wrong})


def test_garbage_collection_is_switched_on_again_after_a_failure():
    calls = iter([None])
    with pytest.raises(StopIteration):
        time_interleaved({"one": lambda: next(calls)}, warmup=1)
    assert gc.isenabled()


def test_models_that_cannot_be_timed():
    with pytest.raises(MicrogliaError, match=r"None of .*eager-channels-last.* works for the model 'a'"):
        measure_latency({"a": nn.Linear(4, 4)}, torch.randn(2, 4), executions=("eager-channels-last",))
    with pytest.raises(MicrogliaError, match="at least one function"):
        measure_latency({}, torch.randn(2, 4))


def test_a_report_has_every_model_and_execution():
    models = {"dense": nn.Linear(8, 8), "small": nn.Linear(8, 2)}
    kinds = ("eager", "packed", "eager-channels-last")
    report = measure_latency(models, torch.randn(3, 8), executions=kinds, rounds=2, min_round_seconds=0)
    assert {name: list(times) for name, times in report.timings.items()} == {name: ["eager", "packed"] for name in models}
    assert all(timing.rounds == 2 and 0 < timing.low <= timing.high for t in report.timings.values() for timing in t.values())
    assert report.batch == 3
    assert report.threads == torch.get_num_threads()
    assert report.torch_version == torch.__version__
    assert report.device
    assert [note.partition(" was")[0] for note in report.notes] == [f"{m}: eager-channels-last" for m in models]
    assert json.loads(json.dumps(report.to_dict()))["best"].keys() == models.keys()


def timing(median):
    return Timing(median, median, median, 1)


def test_speedup_is_against_the_best_execution_of_both():
    timings = {"dense": {"eager": timing(8.0), "packed": timing(4.0)}, "small": {"eager": timing(2.0), "packed": timing(3.0)}}
    report = LatencyReport(timings, "a CPU", 1, 1, "2")
    assert report.best("dense") == ("packed", timing(4.0))
    assert report.best("small") == ("eager", timing(2.0))
    assert report.speedup("small", over="dense") == 2.0
    with pytest.raises(UnknownNameError, match=r"'smal'\. Did you mean 'small'"):
        report.best("smal")


def test_measure_with_latency(monkeypatch):
    def report(models, inputs, executions, ready):
        assert (executions, ready) == ("all", {})
        return LatencyReport({name: {"eager": timing(1.0)} for name in models}, "a CPU", 1, 1, "2")

    monkeypatch.setattr(sys.modules["microglia.measure"], "measure_latency", report)
    measured = measure(nn.Linear(4, 4), torch.randn(1, 4))
    assert json.loads(json.dumps(measured.to_dict()))["latency"]["best"] == {"model": "eager"}
