"""Checks of a score's evidence, with one sentence for each mistake of a caller."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from microglia.core.errors import ScoreError
from microglia.scores.base import Evidence

PAIR = 2


def check_evidence(evidence: object, user: str) -> Evidence:
    """Returns the evidence with batches that can be read more than once.

    Raises:
        ScoreError: The argument is not an `Evidence`; its batches are not (inputs, targets) pairs, or are an exhausted
            generator; inputs and targets differ in number; or its loss or generator is of a wrong kind.
    """
    if evidence is None:
        return Evidence()
    if not isinstance(evidence, Evidence):
        raise ScoreError(
            f"evidence of {user} is mg.scores.Evidence(batches=[(inputs, targets), ...], loss=...); got {described(evidence)}."
        )
    batches: Any = evidence.batches
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ScoreError(f"The batches of evidence are a list of (inputs, targets); got {described(batches)}.")
    if isinstance(batches, Iterator):
        batches = list(batches)
        if not batches:
            raise ScoreError("The batches of evidence are a generator that is used up: give a list of (inputs, targets).")
        object.__setattr__(evidence, "batches", batches)
    if isinstance(batches, Sequence):
        for batch in batches:
            if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) != PAIR:
                raise ScoreError(f"Each batch of evidence is a pair (inputs, targets); got {described(batch)}.")
            _check_batch(*batch, needed=evidence.loss is not None)
    _check_loss(evidence.loss, evidence.generator)
    return evidence


def _check_batch(inputs: Any, targets: Any, *, needed: bool) -> None:
    """Raises unless inputs and targets, if both are tensors, have the same number; a score without a loss needs no targets."""
    if isinstance(inputs, Tensor) and inputs.ndim == 0:
        raise ScoreError(f"The inputs of evidence are a batch, (batch, ...); got {described(inputs)}.")
    if targets is None and not needed:
        return
    if not hasattr(targets, "__len__") or (isinstance(targets, Tensor) and targets.ndim == 0):
        raise ScoreError(f"The targets of evidence are one for each input of a batch; got {described(targets)}.")
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor) and len(inputs) != len(targets):
        raise ScoreError(
            "A batch of evidence has as many inputs as targets; got inputs of shape "
            f"{tuple(inputs.shape)} and targets of shape {tuple(targets.shape)}."
        )


def _check_loss(loss: object, generator: object) -> None:
    if isinstance(loss, type):
        raise ScoreError(
            f"The loss of evidence is a function of (outputs, targets); got the class {loss.__name__} itself: call it first."
        )
    if loss is not None and not callable(loss):
        raise ScoreError(f"The loss of evidence is a function of (outputs, targets); got {described(loss)}.")
    if not isinstance(generator, torch.Generator):
        raise ScoreError(f"The generator of evidence is a torch.Generator; got {described(generator)}.")


def described(value: object) -> str:
    """Returns what a value is, for a sentence that refuses it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
