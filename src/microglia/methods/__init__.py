"""Methods: whole procedures by name, and the pruners they are made of. A new method is one file that imports `method`."""

from microglia.methods.base import Method, MethodConfig, method, methods, preset
from microglia.methods.channels import ChannelsConfig
from microglia.methods.gradual import Gradual, GradualConfig
from microglia.methods.oneshot import OneShot, OneShotConfig
from microglia.methods.pruner import PruneConfig, Pruner

__all__ = [
    "ChannelsConfig",
    "Gradual",
    "GradualConfig",
    "Method",
    "MethodConfig",
    "OneShot",
    "OneShotConfig",
    "PruneConfig",
    "Pruner",
    "method",
    "methods",
    "preset",
]
