"""The models of the coverage benchmark: how each is built with random weights, and what it is given.

No model gets a line of its own that says how to prune it: a case knows its inputs and, for libraries that have to be told,
the output sizes of its heads.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.zoo.external import import_torchvision

torchvision = import_torchvision()
timm = importlib.import_module("timm")  # only now: it imports torchvision itself

TORCHVISION = [
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn", "densenet121", "mobilenet_v2",
    "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "squeezenet1_1", "googlenet", "mnasnet1_0",
    "convnext_tiny", "vit_b_16", "shufflenet_v2_x1_0", "swin_t", "maxvit_t",
]  # fmt: skip
TIMM = [
    "convnext_tiny", "convnextv2_nano", "efficientnet_b0", "mobilenetv4_conv_small", "hrnet_w18_small", "ghostnet_100",
    "regnety_004", "repvgg_a0", "resnet50", "vit_small_patch16_224", "deit_tiny_patch16_224", "mobilevit_s", "poolformer_s12",
    "convformer_s18", "mixer_s32_224", "edgenext_small", "levit_128", "eva02_tiny_patch14_224", "res2net50_26w_4s",
    "cait_xxs24_224", "fastvit_t8", "swin_tiny_patch4_window7_224", "nf_resnet50", "efficientformerv2_s0", "coatnet_0_224",
]  # fmt: skip
FIXED = {"vit_b_16": 224, "maxvit_t": 224}
"""Models of torchvision that take one image size only."""

SIZES = (64, 128, 224, 256, 299)
"""Image sizes that are tried where the model does not fix one: the smallest that it runs and trains at."""


@dataclass(frozen=True)
class Case:
    """One model of the benchmark.

    Attributes:
        name: Source and name.
        family: The set it belongs to.
        build: Makes it, with random weights.
        inputs: Makes its inputs for an image size: a tuple of arguments or a mapping of keyword arguments.
        sizes: Image sizes to try, smallest first.
        heads: Output sizes of its heads, for libraries that have to be told what to leave alone.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    sizes: tuple[int, ...] = SIZES
    heads: tuple[int, ...] = (1000,)


def images(size: int, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


def torchvision_case(name: str, family: str = "core") -> Case:
    def build() -> nn.Module:
        options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, **options)

    sizes = (FIXED[name],) if name in FIXED else SIZES
    return Case(f"torchvision {name}", family, build, images, sizes)


def timm_case(name: str, family: str = "core") -> Case:
    def build() -> nn.Module:
        return timm.create_model(name, pretrained=False)

    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    usual = settings.input_size[-1] if settings else 224
    fixed = settings is not None and settings.fixed_input_size
    sizes = (usual,) if fixed else (*(s for s in SIZES if s < usual), usual)
    channels = settings.input_size[0] if settings else 3
    return Case(f"timm {name}", family, build, lambda size: (torch.randn(2, channels, size, size),), sizes)


def cases(family: str, most: float = math.inf) -> list[Case]:
    """Returns the cases of a set: core, transformers, detection or families (of timm, with at most so many parameters)."""
    if family == "core":
        return [*map(torchvision_case, TORCHVISION), *map(timm_case, TIMM)]
    if family == "families":
        from timm_families import smallest_members

        return [timm_case(name, family) for name in smallest_members(most)]
    from more_models import detection_cases, transformers_cases

    return transformers_cases() if family == "transformers" else detection_cases()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives a fresh model, in place, statistics and affine parameters as training would: no norm is the identity.

    Running means and variances, weights and biases of norms, and every parameter that begins as one constant (layer scales,
    position tables, gates, biases of zero) get seeded random values; other weights stay as their initialization drew them.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                positive = bool(parameter.flatten()[0] > 0)
                parameter.uniform_(0.5, 1.5) if positive else parameter.normal_(0, 0.1)
    return model
