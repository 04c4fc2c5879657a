"""Scores: the importance of a weight, higher = keep. A new score is one pure function under `score`."""

from microglia.scores.accumulated import accumulated, accumulated_gradient
from microglia.scores.base import Evidence, Score, score, scores
from microglia.scores.gradient import gradient_magnitude, loss_gradient
from microglia.scores.grasp import grasp, grasp_magnitude, hessian_gradient
from microglia.scores.guard import untouched
from microglia.scores.magnitude import magnitude
from microglia.scores.random import random
from microglia.scores.snip import snip
from microglia.scores.synflow import PositiveFlow, effective_masks, example_of, shares, synflow

__all__ = [
    "Evidence",
    "PositiveFlow",
    "Score",
    "accumulated",
    "accumulated_gradient",
    "effective_masks",
    "example_of",
    "gradient_magnitude",
    "grasp",
    "grasp_magnitude",
    "hessian_gradient",
    "loss_gradient",
    "magnitude",
    "random",
    "score",
    "scores",
    "shares",
    "snip",
    "synflow",
    "untouched",
]
