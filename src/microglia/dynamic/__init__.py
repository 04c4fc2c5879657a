"""Dynamic pruning: what is computed is chosen for every input, by gates (FTWT) or by thresholds of activations (TEAL)."""

from microglia.dynamic import change as _registered  # noqa: F401
from microglia.dynamic.activation_kernels import TunedLayers, tune_activations
from microglia.dynamic.activation_layers import ThresholdedLinear, thresholded_layers
from microglia.dynamic.activations import sparse_activations
from microglia.dynamic.calibrate import calibrate
from microglia.dynamic.choose import Estimate, choose_density, choose_r, estimate, shares
from microglia.dynamic.counting import COUNTS, Costs, Count, Counter
from microglia.dynamic.fitting import fit_heads
from microglia.dynamic.flow import Flow
from microglia.dynamic.gate_plan import GatePlan, Site
from microglia.dynamic.gates import (
    Gate,
    Passage,
    attach_gates,
    detach_gates,
    gate_plan,
    gates_of,
    listening,
    note_plan,
)
from microglia.dynamic.gathered import Gathered
from microglia.dynamic.routes import Routes, frequencies, record, statistics
from microglia.dynamic.sites import PLACES, Places, Sites, blocks_of, find_sites
from microglia.dynamic.static import start_static, static_masks
from microglia.dynamic.targets import RULES, Rule, mass, targets
from microglia.dynamic.tuning import Crossover, Fastest, tune

__all__ = [
    "COUNTS",
    "PLACES",
    "RULES",
    "Costs",
    "Count",
    "Counter",
    "Crossover",
    "Estimate",
    "Fastest",
    "Flow",
    "Gate",
    "GatePlan",
    "Gathered",
    "Passage",
    "Places",
    "Routes",
    "Rule",
    "Site",
    "Sites",
    "ThresholdedLinear",
    "TunedLayers",
    "attach_gates",
    "blocks_of",
    "calibrate",
    "choose_density",
    "choose_r",
    "detach_gates",
    "estimate",
    "find_sites",
    "fit_heads",
    "frequencies",
    "gate_plan",
    "gates_of",
    "listening",
    "mass",
    "note_plan",
    "record",
    "shares",
    "sparse_activations",
    "start_static",
    "static_masks",
    "statistics",
    "targets",
    "thresholded_layers",
    "tune",
    "tune_activations",
]
