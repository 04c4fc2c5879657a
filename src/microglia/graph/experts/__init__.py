"""Experts: layers of a mixture of experts, found by their structure, cut physically, and compared with the masked model."""

from microglia.graph.experts.forms import ExpertForm, Routing, expert_forms
from microglia.graph.experts.layers import ExpertLayer, expert_layers
from microglia.graph.experts.masked import masked_experts, verify_experts
from microglia.graph.experts.removal import Experts, experts_of, keep_experts

__all__ = [
    "ExpertForm",
    "ExpertLayer",
    "Experts",
    "Routing",
    "expert_forms",
    "expert_layers",
    "experts_of",
    "keep_experts",
    "masked_experts",
    "verify_experts",
]
