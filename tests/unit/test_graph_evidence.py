"""`prune_channels` refuses wrong evidence and wrong scopes in one sentence, as every pruner does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import ScoreError, UnknownNameError
from microglia.lab.recipe import resolve
from microglia.scores import Evidence


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        ([(torch.zeros(1, 8), torch.zeros(1))], "evidence of prune_channels is mg.scores.Evidence"),
        (Evidence(batches=[torch.zeros(1, 8)]), r"Each batch of evidence is a pair \(inputs, targets\)"),
        (Evidence(loss=nn.CrossEntropyLoss), "got the class CrossEntropyLoss itself"),
    ],
)
def test_wrong_evidence_is_refused_before_anything_is_traced(evidence: Any, words: str) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(ScoreError, match=words):
        mg.prune_channels(model, torch.zeros(1, 8), mg.Budget(density=0.5), score="snip", evidence=evidence, round_to=1)


@pytest.mark.parametrize("scope", ["erk", "layer", "row"])
def test_a_scope_of_masks_is_refused_for_channels_in_our_words(scope: str) -> None:
    with pytest.raises(UnknownNameError, match=f"no scope of this method named '{scope}'.*Known: global, uniform"):
        resolve({"method": "channels", "prune": {"density": 0.5, "scope": scope}})
