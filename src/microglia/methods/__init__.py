"""Methods: whole procedures by name, and the pruners they are made of. A new method is one file that imports `method`."""

from microglia.methods.acdc import Acdc, AcdcConfig
from microglia.methods.at_init import AtInit, AtInitConfig
from microglia.methods.at_init_observed import Initialization
from microglia.methods.awg import Awg, AwgConfig
from microglia.methods.channels import ChannelsConfig
from microglia.methods.config import Method, MethodConfig, method, methods, preset
from microglia.methods.ddnp import DdnpConfig
from microglia.methods.ftwt import Ftwt
from microglia.methods.ftwt_config import FtwtConfig
from microglia.methods.ftwt_observed import Predicted, Routing
from microglia.methods.gradual import Gradual, GradualConfig
from microglia.methods.lottery import Level, LotteryConfig, Tickets
from microglia.methods.oneshot import OneShot, OneShotConfig
from microglia.methods.pas import Pas, PasConfig
from microglia.methods.pdp import Pdp, PdpConfig
from microglia.methods.pruner import PruneConfig, Pruner
from microglia.methods.search_observed import Search
from microglia.methods.smart import Smart, SmartConfig
from microglia.methods.sparse_training import SparseTraining
from microglia.methods.sparse_training_config import SparseTrainingConfig
from microglia.methods.unit_pruner import SearchConfig, UnitConfig, UnitPruner

__all__ = [
    "Acdc",
    "AcdcConfig",
    "AtInit",
    "AtInitConfig",
    "Awg",
    "AwgConfig",
    "ChannelsConfig",
    "DdnpConfig",
    "Ftwt",
    "FtwtConfig",
    "Gradual",
    "GradualConfig",
    "Initialization",
    "Level",
    "LotteryConfig",
    "Method",
    "MethodConfig",
    "OneShot",
    "OneShotConfig",
    "Pas",
    "PasConfig",
    "Pdp",
    "PdpConfig",
    "Predicted",
    "PruneConfig",
    "Pruner",
    "Routing",
    "Search",
    "SearchConfig",
    "Smart",
    "SmartConfig",
    "SparseTraining",
    "SparseTrainingConfig",
    "Tickets",
    "UnitConfig",
    "UnitPruner",
    "method",
    "methods",
    "preset",
]
