"""Scores: the importance of a weight, higher = keep. A new score is one pure function under `score`."""

from microglia.scores.accumulated import accumulated, accumulated_gradient
from microglia.scores.base import Evidence, Score, score, scores, values_filters
from microglia.scores.curvature import Rows, curvature_rows, curvatures
from microglia.scores.features import gate_gradients, hrank, map_ranks, taylor, taylor_weights
from microglia.scores.geometry import distances, fpgm, l1, l2, lamp, scale
from microglia.scores.gradient import gradient_magnitude, loss_gradient
from microglia.scores.grasp import grasp, grasp_magnitude, hessian_gradient
from microglia.scores.guard import untouched
from microglia.scores.kfac import mlprune
from microglia.scores.magnitude import magnitude
from microglia.scores.nisp import nisp
from microglia.scores.random import random
from microglia.scores.second_order import estimators, fisher, hutchinson, obd, obs, wanda
from microglia.scores.snip import snip
from microglia.scores.synflow import PositiveFlow, effective_masks, example_of, shares, synflow

__all__ = [
    "Evidence",
    "PositiveFlow",
    "Rows",
    "Score",
    "accumulated",
    "accumulated_gradient",
    "curvature_rows",
    "curvatures",
    "distances",
    "effective_masks",
    "estimators",
    "example_of",
    "fisher",
    "fpgm",
    "gate_gradients",
    "gradient_magnitude",
    "grasp",
    "grasp_magnitude",
    "hessian_gradient",
    "hrank",
    "hutchinson",
    "l1",
    "l2",
    "lamp",
    "loss_gradient",
    "magnitude",
    "map_ranks",
    "mlprune",
    "nisp",
    "obd",
    "obs",
    "random",
    "scale",
    "score",
    "scores",
    "shares",
    "snip",
    "synflow",
    "taylor",
    "taylor_weights",
    "untouched",
    "values_filters",
    "wanda",
]
