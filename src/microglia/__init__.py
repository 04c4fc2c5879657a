"""Microglia: prune any PyTorch model, see it get measurably faster and smaller, and load the result anywhere.

`mask` writes zeros; `fold` makes them part of the weights; `save` and `load` keep a model without pickle. A pruner
(`OneShot`, `Gradual`, `Smart` and its rivals, `SparseTraining`, `Ftwt`) steps inside anybody's loop; `execute` runs a
whole `Recipe`. `accelerate` finds the fastest exact execution on this machine.
"""

from microglia.core.budget import Budget
from microglia.core.errors import MicrogliaError
from microglia.core.layers import prunable_layers
from microglia.core.masks import MaskSet, enforce, fold, mask, masks_of
from microglia.core.patterns import NM, Block, Channel, Unstructured
from microglia.core.roles import mark_roles
from microglia.core.selection import select
from microglia.core.soft_topk import soft_topk
from microglia.data import load_data
from microglia.dynamic import Gathered
from microglia.graph import permutation_of, permute_channels, plan_of, prune_channels, shrink
from microglia.lab.execute import execute
from microglia.lab.recipe import Recipe, resolve
from microglia.measure import measure, measure_latency
from microglia.methods import Acdc, AtInit, Awg, Ftwt, Gradual, OneShot, Pas, Pdp, Smart, SparseTraining
from microglia.runtime import Accelerated, accelerate
from microglia.scores import Evidence, score
from microglia.storage.archive import load, save
from microglia.tasks.classification import build_noted as build
from microglia.tasks.classification import image_task
from microglia.tasks.task import Task
from microglia.train.evaluate import evaluate
from microglia.train.fit import fit
from microglia.train.optim import FitConfig
from microglia.train.recover import recalibrate

__all__ = [
    "NM",
    "Accelerated",
    "Acdc",
    "AtInit",
    "Awg",
    "Block",
    "Budget",
    "Channel",
    "Evidence",
    "FitConfig",
    "Ftwt",
    "Gathered",
    "Gradual",
    "MaskSet",
    "MicrogliaError",
    "OneShot",
    "Pas",
    "Pdp",
    "Recipe",
    "Smart",
    "SparseTraining",
    "Task",
    "Unstructured",
    "accelerate",
    "build",
    "enforce",
    "evaluate",
    "execute",
    "fit",
    "fold",
    "image_task",
    "load",
    "load_data",
    "mark_roles",
    "mask",
    "masks_of",
    "measure",
    "measure_latency",
    "permutation_of",
    "permute_channels",
    "plan_of",
    "prunable_layers",
    "prune_channels",
    "recalibrate",
    "resolve",
    "save",
    "score",
    "select",
    "shrink",
    "soft_topk",
]
