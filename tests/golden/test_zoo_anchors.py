"""Parameters, prunable weights and MACs of the zoo against closed forms and the published numbers."""

import pytest
import torch
from torch import nn

from microglia.core.layers import prunable_layers
from microglia.zoo import build

MNIST = {"shape": (1, 28, 28)}
HRANK = {"hidden": "norm", "conv_bias": True}
HUNDRED = {"classes": 100}
THOUSAND = {"classes": 1000, "shape": (3, 224, 224), "imagenet_strides": True}

ALEXNET_NORMS = 2 * (96 + 256 + 384 + 384 + 256 + 1024 + 1024)
"""Scales and shifts, which SNIP's public code does not count."""
VGG_NORMS = 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512 + 2 * 512)

ANCHORS = [  # name, options, parameters, prunable weights, MACs (None: no published number to hold it against)
    ("lenet-300-100", MNIST, 266_610, 266_200, 266_200),
    ("lenet-5", MNIST, 431_080, 430_500, None),
    ("conv-6", {}, 2_262_602, 2_261_184, None),
    ("resnet20", {}, 269_722, 268_336, 40_551_040),
    ("resnet20-projection", {}, 272_474, 270_896, 40_813_184),
    ("resnet56", {}, 853_018, 848_944, 125_485_696),
    ("resnet110", {}, 1_727_962, 1_719_856, 252_887_680),
    ("vgg16-bn", {}, 14_724_042, 14_715_584, 313_201_664),
    ("vgg16-bn", {"hidden": True}, 14_986_698, 14_977_728, 313_463_808),
    ("vgg16-bn", HRANK, 14_991_946, 14_977_728, 313_463_808),
    ("vgg19-bn", {}, 20_035_018, 20_024_000, 398_136_320),
    ("vgg19-bn", HUNDRED, 20_081_188, 20_070_080, None),
    ("densenet40", {}, 1_019_722, 1_001_616, None),
    ("wrn-16-2", {}, 691_674, 689_840, None),
    ("wrn-16-8", {}, 10_961_370, 10_954_160, None),
    ("wrn-28-10", {}, 36_479_194, 36_461_232, None),
    ("resnet164", {}, 1_703_258, 1_679_024, None),
    ("resnet164", HUNDRED, 1_726_388, 1_702_064, None),
    ("googlenet", {}, 6_166_250, 6_142_528, 1_521_756_160),
    ("alexnet-s", {}, 5_070_218 + ALEXNET_NORMS, 5_066_784, None),
    ("alexnet-b", {}, 8_490_378 + ALEXNET_NORMS + 2 * 2 * 1024, 8_484_896, None),
    ("vgg-c", {}, 10_526_538 + VGG_NORMS, 10_521_280, None),
    ("vgg-d", {}, 15_245_130 + VGG_NORMS, 15_239_872, 313_725_952),
    ("vgg-like", {}, 14_991_946, 14_977_728, 313_463_808),
    ("lstm-s", MNIST, 136_586, 135_936, None),
    ("lstm-b", MNIST, 535_306, 534_016, None),
    ("gru-s", MNIST, 103_690, 103_168, None),
    ("gru-b", MNIST, 403_978, 402_944, None),
    ("mobilenet-v1", THOUSAND, 4_231_976, 4_209_088, 568_740_352),
    ("mobilenet-v2", THOUSAND, 3_504_872, 3_469_760, 300_774_272),
]


def multiply_accumulates(model, shape):
    """Counts the MACs of one input from the sizes that convolutions and linear layers really produce."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        total += module.weight.numel() * (output[0][0].numel() if output.ndim == 4 else 1)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, *shape, device="meta"))
    return total


@pytest.mark.parametrize(("name", "options", "parameters", "weights", "macs"), ANCHORS)
def test_anchor(name, options, parameters, weights, macs):
    with torch.device("meta"):
        model = build(name, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(layer.raw.numel() for layer in prunable_layers(model).values()) == weights
    if macs is not None:
        assert multiply_accumulates(model, options.get("shape", (3, 32, 32))) == macs


PUBLISHED = [  # name, options, millions of parameters, millions of MACs: as the tables print them
    ("mobilenet-v1", {**THOUSAND, "width": 0.75}, 2.6, 325),
    ("mobilenet-v1", {**THOUSAND, "width": 0.5}, 1.3, 149),
    ("mobilenet-v1", {**THOUSAND, "width": 0.25}, 0.5, 41),
    ("densenet40", {"stem": 24}, 1.04, 282),
]


@pytest.mark.parametrize(("name", "options", "parameters", "macs"), PUBLISHED)
def test_rounded_counts_of_tables(name, options, parameters, macs):
    with torch.device("meta"):
        model = build(name, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters * 1e6, rel=0.06)
    assert multiply_accumulates(model, options.get("shape", (3, 32, 32))) == pytest.approx(macs * 1e6, abs=1e6)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "file", "correct"), [("resnet20", "resnet20-12fca82f.th", 0.9173), ("resnet56", "resnet56-4bfd9763.th", 0.9339)]
)
def test_the_public_checkpoints_reach_their_accuracy(data_root, name, file, correct):
    """Also proves the shortcut: new channels on the wrong side would leave chance accuracy."""
    import io

    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    from microglia.zoo import load_checkpoint

    model = build(name)
    load_checkpoint(model, data_root / "checkpoints" / file)
    rows = next(parquet.ParquetFile(data_root / "cifar10" / "test-00000-of-00001.parquet").iter_batches(400)).to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    inputs = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / deviation
    with torch.inference_mode():
        predicted = model.eval()(inputs).argmax(1)
    accuracy = (predicted == torch.tensor([row["label"] for row in rows])).float().mean().item()
    assert accuracy == pytest.approx(correct, abs=0.04)  # three standard errors of 400 images
