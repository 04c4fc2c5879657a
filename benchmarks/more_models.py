"""Models of Transformers by configuration, and of torchvision for detection and segmentation; nothing is downloaded."""
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detection_operators import provide
from microglia.zoo.external import import_torchvision
from models import Case, images, torchvision
from own_models import ShuffleNet, SuperResolution, Tagger, UNet, Yolo, audio_net, video_net

WIDE: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384}
WORDS = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PIXELS: dict[str, Any] = {"image_size": 64, "num_labels": 1000}


def transformers_cases() -> list[Case]:
    """Returns encoders, decoders, vision models and a detector, small ones."""
    resnet = {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]}
    detr = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in DETR_SIZES.items()}
    swin = {"embed_dim": 48, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4}
    segformer = {"hidden_sizes": [16, 32, 80, 128], "depths": [2, 2, 2, 2], "decoder_hidden_size": 96, "num_labels": 21}
    gpt = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64, "use_cache": False, **WORDS}
    causal = {**WIDE, **WORDS, "use_cache": False, "num_key_value_heads": 2}
    towers = {"text_config": {**WIDE, **WORDS, "max_position_embeddings": 32}, "vision_config": {**WIDE, "image_size": 64}}
    t5 = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "use_cache": False, **WORDS}
    backbone = {"use_timm_backbone": False, "backbone": None, "backbone_config": {**resnet, "out_features": ["stage4"]}}
    return [
        case("BertForSequenceClassification", "BertConfig", {**WIDE, **WORDS, "num_labels": 1000}, words),
        case("BertForMaskedLM", "BertConfig", {**WIDE, **WORDS}, words),
        case("ViTForImageClassification", "ViTConfig", {**WIDE, **PIXELS}, pixels),
        case("SwinForImageClassification", "SwinConfig", {**swin, **PIXELS}, pixels),
        case("ConvNextV2ForImageClassification", "ConvNextV2Config", {"hidden_sizes": [24, 48, 96, 192], **PIXELS}, pixels),
        case("SegformerForSemanticSegmentation", "SegformerConfig", segformer, pixels, (21,)),
        case("DetrForObjectDetection", "DetrConfig", {**backbone, **detr, "d_model": 96, "num_queries": 20}, pixels, (92, 4)),
        case("LlamaForCausalLM", "LlamaConfig", {**causal, "num_attention_heads": 8}, words),
        case("Qwen2ForCausalLM", "Qwen2Config", causal, words),
        case("GPT2LMHeadModel", "GPT2Config", gpt, words),
        case("T5ForConditionalGeneration", "T5Config", t5, lambda size: {**words(size), "decoder_input_ids": ids()}),
        case("CLIPModel", "CLIPConfig", {**towers, "projection_dim": 64}, lambda size: words(size) | pixels(size), (64,)),
    ]


DETR_SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 192}


def case(
    model: str, config: str, options: Mapping[str, Any], inputs: Callable[[int], Any], heads: tuple[int, ...] = (1000,)
) -> Case:
    def build() -> nn.Module:
        import_torchvision()
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return Case(f"transformers {model}", "transformers", build, inputs, (64,), heads)


def ids() -> Tensor:
    return torch.randint(3, 1000, (2, 16))


def words(size: int) -> dict[str, Tensor]:
    attended = torch.ones(2, 16, dtype=torch.long)
    attended[0, 12:] = 0
    return {"input_ids": ids(), "attention_mask": attended}


def pixels(size: int) -> dict[str, Tensor]:
    return {"pixel_values": images(size)[0]}


# ----------------------------------------------------------------------------------------------- detection, segmentation
class OneStage(nn.Module):
    """Backbone and head of a one-stage detector: what comes before boxes are selected by their scores."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        return self.head([features] if isinstance(features, Tensor) else list(features.values()))


class TwoStage(nn.Module):
    """All layers of a two-stage detector, its regions given; masks and keypoints where it has them."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.proposals, self.regions = detector.backbone, detector.rpn.head, detector.roi_heads

    def forward(self, x: Tensor, boxes: Tensor) -> Any:
        features = self.backbone(x)
        regions, shapes = list(boxes.unbind()), [tuple(x.shape[-2:])] * len(boxes)
        pooled = self.regions.box_roi_pool(features, regions, shapes)
        outputs = [self.proposals(list(features.values())), self.regions.box_predictor(self.regions.box_head(pooled))]
        for kind in ("mask", "keypoint"):
            if (pool := getattr(self.regions, f"{kind}_roi_pool")) is not None:
                found = getattr(self.regions, f"{kind}_head")(pool(features, regions, shapes))
                outputs.append(getattr(self.regions, f"{kind}_predictor")(found))
        return outputs


class Whole(nn.Module):
    """A whole detector for one image, its boxes selected by score and overlap."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> Any:
        return self.detector([x])[0]


ONE_STAGE = ("retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "ssd300_vgg16")
TWO_STAGE = (
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
)
SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
WHOLE = ("retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_fpn")


DETECTION_HEADS = (91, 364, 1, 3, 4, 9, 12, 36, 819, 16, 24, 546, 17)
"""Classes, box sides and key points, times the anchors of each detector."""


def torchvision_model(name: str, wrapper: Callable[[nn.Module], nn.Module] | None = None) -> nn.Module:
    provide()
    options: dict[str, Any] = {} if wrapper is not Whole or "ssd" in name else {"min_size": 160, "max_size": 160}
    if wrapper is Whole:  # random weights find nothing that is worth more
        options["box_score_thresh" if "rcnn" in name else "score_thresh"] = 0.005
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)
    return model if wrapper is None else wrapper(model)


def boxes(size: int) -> tuple[Tensor, Tensor]:
    """Returns images and five regions in each, of sizes that the pyramid's levels share out."""
    corner = torch.rand(2, 5, 2) * size / 3
    return (*images(size), torch.cat([corner, corner + torch.tensor([0.1, 0.2, 0.3, 0.5, 0.6]).view(1, 5, 1) * size], 2))


def detection_cases() -> list[Case]:
    def of(
        name: str, wrapper: Callable[[nn.Module], nn.Module] | None, inputs: Callable[[int], Any], size: int, title: str = ""
    ) -> Case:
        heads = (21,) if wrapper is None else DETECTION_HEADS
        return Case(f"torchvision {name}{title}", "detection", lambda: torchvision_model(name, wrapper), inputs, (size,), heads)

    found = [of(name, None, images, 64) for name in SEGMENTATION]
    found += [of(name, OneStage, images, 300 if "ssd300" in name else 128) for name in ONE_STAGE]
    found += [of(name, TwoStage, boxes, 128) for name in TWO_STAGE]
    found += [of(name, Whole, lambda size: (torch.rand(3, size, size),), 160, ", whole") for name in WHOLE]
    return found + own_cases()


def own_cases() -> list[Case]:
    def of(name: str, build: Callable[[], nn.Module], inputs: Callable[[int], Any], head: int) -> Case:
        return Case(f"own {name}", "detection", build, inputs, (64,), (head,))

    return [
        of("YOLO-like (chunk, split, concat)", Yolo, images, 20),
        of("UNet", UNet, images, 21),
        of("ShuffleNet, 3 groups", ShuffleNet, images, 1000),
        of("ShuffleNet, 4 groups", lambda: ShuffleNet(groups=4, width=64), images, 1000),
        of("LSTM tagger", lambda: Tagger("LSTM"), sentence, 17),
        of("LSTM tagger, one direction", lambda: Tagger("LSTM", False, 1), sentence, 17),
        of("GRU tagger", lambda: Tagger("GRU"), sentence, 17),
        of("super resolution (pixel shuffle)", SuperResolution, images, 3),
        of("video net (3-d)", video_net, lambda size: (torch.randn(2, 3, 8, 16, 16),), 10),
        of("audio net (1-d)", audio_net, lambda size: (torch.randn(2, 1, 512),), 10),
    ]


def sentence(size: int) -> tuple[Tensor]:
    return (torch.randint(0, 200, (2, 12)),)
