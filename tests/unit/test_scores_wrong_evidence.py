"""Evidence of wrong shapes and kinds: one sentence says what was given; the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import ScoreError

GOOD = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
ASKING = ["gradient", "snip", "grasp", "accumulated-gradient"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def prune(model: nn.Module, score: str, batches: Any, **settings: Any) -> None:
    evidence = mg.scores.Evidence(batches=batches, **{"loss": functional.cross_entropy, **settings})
    mg.methods.OneShot(model, density=0.5, score=score, evidence=evidence)


def refused(told: str, score: str, batches: Any, **settings: Any) -> None:
    """Holds that it is refused in one line, and that nothing of the model changed."""
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ScoreError, match=told) as caught:
        prune(model, score, batches, **settings)
    assert "\n" not in str(caught.value)
    assert not mg.masks_of(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


KINDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "fewer targets than inputs": (
        [(GOOD[0], GOOD[1][:2])], {}, r"inputs of shape \(4, 3, 8, 8\) and targets of shape \(2,\)"),
    "a target that is one number": ([(GOOD[0], torch.tensor(1))], {}, r"got a tensor of shape \(\)"),
    "targets that are a number": ([(GOOD[0], 3)], {}, "one for each input of a batch; got a int"),
    "targets that are none": ([(GOOD[0], None)], {}, "one for each input of a batch; got None"),
    "an input without a batch": ([(torch.tensor(1.0), GOOD[1])], {}, r"are a batch, \(batch, ...\); got a tensor of shape"),
    "three in a batch": ([(*GOOD, 1)], {}, "is a pair"),
    "a loss by name": ([GOOD], {"loss": "cross_entropy"}, "is a function of .* got a str"),
    "the class of a loss": ([GOOD], {"loss": nn.CrossEntropyLoss}, "got the class CrossEntropyLoss itself: call it first"),
    "a seed for a generator": ([GOOD], {"generator": 0}, "is a torch.Generator; got a int"),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("score", ["magnitude", "gradient", "synflow"])
def test_kinds_and_lengths_are_looked_at_before_any_score(score: str, case: str) -> None:
    batches, settings, told = KINDS[case]
    refused(told, score, batches, **settings)


INPUTS: dict[str, Any] = {
    "channels": torch.randn(4, 1, 8, 8),
    "dimensions": torch.randn(4, 3),
    "too small": torch.randn(4, 3, 2, 2),
    "integers": torch.ones(4, 3, 8, 8, dtype=torch.long),
    "double": torch.randn(4, 3, 8, 8, dtype=torch.float64),
    "a list": [[1.0]] * 4,
}


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("score", ASKING)
def test_inputs_that_the_model_does_not_take(score: str, case: str) -> None:
    refused(r"^The Sequential does not take the inputs of evidence, a (tensor of shape|list)", score, [(INPUTS[case], GOOD[1])])


@pytest.mark.parametrize("case", ["channels", "dimensions", "too small"])
def test_synflow_says_it_too(case: str) -> None:
    refused("does not take the inputs of evidence, a tensor of shape", "synflow", [(INPUTS[case], GOOD[1])])


TARGETS = {"one-hot of other classes": torch.ones(4, 5), "floats": torch.rand(4), "images": torch.ones(4, 3, 8, 8)}


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("score", ASKING)
def test_targets_that_the_loss_does_not_take(score: str, case: str) -> None:
    told = r"does not take the model's outputs, .*\(4, 3\).* with the targets, a tensor of shape"
    refused(told, score, [(GOOD[0], TARGETS[case])])


@pytest.mark.parametrize("score", ASKING)
def test_a_loss_for_each_example_is_no_mean(score: str) -> None:
    refused(r"a tensor of one number; got a tensor of shape \(4,\)", score, [GOOD], loss=nn.CrossEntropyLoss(reduction="none"))


def test_channels_say_it_too() -> None:
    evidence = mg.scores.Evidence([(INPUTS["channels"], GOOD[1])], functional.cross_entropy)
    with pytest.raises(ScoreError, match="does not take the inputs of evidence"):
        mg.prune_channels(net(), GOOD[0], mg.Budget(params=0.5), score="gradient", evidence=evidence)


@pytest.mark.parametrize("score", [*ASKING, "synflow"])
def test_evidence_that_fits_is_taken(score: str) -> None:
    model = net()
    prune(model, score, [GOOD])
    assert mg.masks_of(model).density == pytest.approx(0.5, abs=0.01)
