"""The zoo: networks of the pruning papers, and access to those of timm, torchvision, transformers and your own code."""

from microglia.zoo.builder import build, check_name, is_known, model_names
from microglia.zoo.checkpoint import load_checkpoint
from microglia.zoo.registry import ModelError

__all__ = ["ModelError", "build", "check_name", "is_known", "load_checkpoint", "model_names"]
