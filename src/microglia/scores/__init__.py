"""Scores: how much a weight matters, higher = keep. A new score is one pure function under `score`."""

from microglia.scores.accumulated import accumulated, accumulated_gradient
from microglia.scores.base import Evidence, Score, score, scores
from microglia.scores.gradient import gradient_magnitude, loss_gradient
from microglia.scores.guard import untouched
from microglia.scores.magnitude import magnitude
from microglia.scores.random import random

__all__ = [
    "Evidence",
    "Score",
    "accumulated",
    "accumulated_gradient",
    "gradient_magnitude",
    "loss_gradient",
    "magnitude",
    "random",
    "score",
    "scores",
    "untouched",
]
