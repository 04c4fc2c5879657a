"""Methods: whole procedures by name, and the pruners that they use. A new method is one file that imports `method`."""

from microglia.methods.acdc import Acdc, AcdcConfig
from microglia.methods.amc import Amc, AmcConfig
from microglia.methods.at_init import AtInit, AtInitConfig
from microglia.methods.at_init_observed import Initialization
from microglia.methods.awg import Awg, AwgConfig
from microglia.methods.ccp import Ccp, CcpConfig
from microglia.methods.channel_pruner import ChannelConfig, ChannelPruner
from microglia.methods.channels import ChannelsConfig
from microglia.methods.config import Method, MethodConfig, SearchConfig, UnitConfig, method, methods, preset
from microglia.methods.dcp import Dcp, DcpConfig
from microglia.methods.ddnp import Ddnp, DdnpConfig
from microglia.methods.deep_compression import DeepCompressionConfig
from microglia.methods.deep_r import DeepR, DeepRConfig
from microglia.methods.deephoyer import DeepHoyer, DeepHoyerConfig
from microglia.methods.depth import block_influence, drop_blocks
from microglia.methods.dsr import Dsr, DsrConfig
from microglia.methods.eagleeye import EagleEye, EagleEyeConfig
from microglia.methods.evolution import Evolution
from microglia.methods.experts import ExpertScore, Tally, drop_experts, expert_scores, tally_experts
from microglia.methods.fbs import Fbs, FbsConfig
from microglia.methods.filter_norms import FilterNorms, FilterNormsConfig
from microglia.methods.fpgm import Fpgm, FpgmConfig
from microglia.methods.ftwt import Ftwt, FtwtConfig
from microglia.methods.ftwt_method import ftwt as _  # noqa: F401 -- registers it
from microglia.methods.ftwt_observed import Predicted, Routing
from microglia.methods.gal import Gal, GalConfig
from microglia.methods.gradual import Gradual, GradualConfig
from microglia.methods.group_lasso import GroupLasso, GroupLassoConfig
from microglia.methods.hrank import Hrank, HrankConfig
from microglia.methods.layerwise import Layerwise, LayerwiseConfig
from microglia.methods.layerwise_observed import LayerwiseReport
from microglia.methods.lottery import Level, LotteryConfig, Tickets
from microglia.methods.metapruning import MetaPruning, MetaPruningConfig, PruningNet
from microglia.methods.not_built import NOT_BUILT as _NOT_BUILT  # noqa: F401 -- answers their names
from microglia.methods.obd import Obd, ObdConfig
from microglia.methods.obs import Obs, ObsConfig
from microglia.methods.oneshot import OneShot, OneShotConfig
from microglia.methods.packed_observed import Packed, PackedLayer
from microglia.methods.pas import Pas, PasConfig
from microglia.methods.pdp import Pdp, PdpConfig
from microglia.methods.pfp import Pfp, PfpConfig
from microglia.methods.polarization import Polarization, PolarizationConfig
from microglia.methods.pruner import Pruner, PrunerProtocol
from microglia.methods.rounds import Round, Rounds
from microglia.methods.scop import Scop, ScopConfig
from microglia.methods.search_observed import Search
from microglia.methods.sfp import Sfp, SfpConfig
from microglia.methods.slimming import Slimming, SlimmingConfig
from microglia.methods.smart import Smart, SmartConfig
from microglia.methods.sparse_training import SparseTraining, SparseTrainingConfig
from microglia.methods.sss import Sss, SssConfig
from microglia.methods.taylor import Taylor, TaylorConfig
from microglia.methods.thinet import Thinet, ThinetConfig
from microglia.methods.unit_pruner import UnitPruner
from microglia.methods.weight_sharing import SharingConfig, WeightSharing, WeightSharingConfig
from microglia.methods.what import PruneConfig, Takes
from microglia.methods.width_search import Evaluator, SearchedConfig, SearchedPruner, WidthSpace
from microglia.methods.widths_observed import WidthSearch, WidthVectors
from microglia.methods.woodfisher import WoodFisher, WoodFisherConfig

__all__ = [
    "Acdc",
    "AcdcConfig",
    "Amc",
    "AmcConfig",
    "AtInit",
    "AtInitConfig",
    "Awg",
    "AwgConfig",
    "Ccp",
    "CcpConfig",
    "ChannelConfig",
    "ChannelPruner",
    "ChannelsConfig",
    "Dcp",
    "DcpConfig",
    "Ddnp",
    "DdnpConfig",
    "DeepCompressionConfig",
    "DeepHoyer",
    "DeepHoyerConfig",
    "DeepR",
    "DeepRConfig",
    "Dsr",
    "DsrConfig",
    "EagleEye",
    "EagleEyeConfig",
    "Evaluator",
    "Evolution",
    "ExpertScore",
    "Fbs",
    "FbsConfig",
    "FilterNorms",
    "FilterNormsConfig",
    "Fpgm",
    "FpgmConfig",
    "Ftwt",
    "FtwtConfig",
    "Gal",
    "GalConfig",
    "Gradual",
    "GradualConfig",
    "GroupLasso",
    "GroupLassoConfig",
    "Hrank",
    "HrankConfig",
    "Initialization",
    "Layerwise",
    "LayerwiseConfig",
    "LayerwiseReport",
    "Level",
    "LotteryConfig",
    "MetaPruning",
    "MetaPruningConfig",
    "Method",
    "MethodConfig",
    "Obd",
    "ObdConfig",
    "Obs",
    "ObsConfig",
    "OneShot",
    "OneShotConfig",
    "Packed",
    "PackedLayer",
    "Pas",
    "PasConfig",
    "Pdp",
    "PdpConfig",
    "Pfp",
    "PfpConfig",
    "Polarization",
    "PolarizationConfig",
    "Predicted",
    "PruneConfig",
    "Pruner",
    "PrunerProtocol",
    "PruningNet",
    "Round",
    "Rounds",
    "Routing",
    "Scop",
    "ScopConfig",
    "Search",
    "SearchConfig",
    "SearchedConfig",
    "SearchedPruner",
    "Sfp",
    "SfpConfig",
    "SharingConfig",
    "Slimming",
    "SlimmingConfig",
    "Smart",
    "SmartConfig",
    "SparseTraining",
    "SparseTrainingConfig",
    "Sss",
    "SssConfig",
    "Takes",
    "Tally",
    "Taylor",
    "TaylorConfig",
    "Thinet",
    "ThinetConfig",
    "Tickets",
    "UnitConfig",
    "UnitPruner",
    "WeightSharing",
    "WeightSharingConfig",
    "WidthSearch",
    "WidthSpace",
    "WidthVectors",
    "WoodFisher",
    "WoodFisherConfig",
    "block_influence",
    "drop_blocks",
    "drop_experts",
    "expert_scores",
    "method",
    "methods",
    "preset",
    "tally_experts",
]
