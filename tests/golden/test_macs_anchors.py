"""The MAC counter against the published numbers (survey, section 0.5) and torch's own counter on large models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from microglia.measure import count_macs, count_parameters
from microglia.zoo import build

CIFAR = (3, 32, 32)
MNIST = (1, 28, 28)

ANCHORS = [  # name, shape, options, all parameters, prunable weights, MACs
    ("lenet-300-100", MNIST, {}, 266_610, 266_200, 266_200),
    ("resnet20-projection", CIFAR, {}, 272_474, 270_896, 40_813_184),
    ("resnet20", CIFAR, {}, 269_722, 268_336, 40_551_040),
    ("resnet56", CIFAR, {}, 853_018, 848_944, 125_485_696),
    ("resnet110", CIFAR, {}, 1_727_962, 1_719_856, 252_887_680),
    ("vgg16-bn", CIFAR, {}, 14_724_042, 14_715_584, 313_201_664),
    ("vgg16-bn", CIFAR, {"hidden": True}, 14_986_698, 14_977_728, 313_463_808),
    ("vgg16-bn", CIFAR, {"hidden": "norm", "conv_bias": True}, 14_991_946, 14_977_728, 313_463_808),
    ("vgg19-bn", CIFAR, {}, 20_035_018, 20_024_000, 398_136_320),
    ("vgg19-bn", CIFAR, {"classes": 100}, 20_081_188, 20_070_080, 398_136_320 + 90 * 512),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "shape", "options", "parameters", "prunable", "macs"), ANCHORS)
def test_published_counts(name, shape, options, parameters, prunable, macs, batch):
    with torch.device("meta"):
        model = build(name, **{"shape": shape, **options})
        counted = count_macs(model, torch.zeros(batch, *shape))
    assert counted.total == macs
    assert counted.other == 0
    assert counted.effective == macs
    assert counted.speedup == 1
    sizes = count_parameters(model)
    assert (sizes.all, sizes.prunable, sizes.kept) == (parameters, prunable, prunable)
    assert set(counted.layers) == set(sizes.layers)


def test_a_real_forward_pass_counts_the_same():
    model = build("resnet20")
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)  # a drawn weight may be exactly 0
    counted = count_macs(model, torch.randn(2, *CIFAR))
    assert counted.total == counted.effective == 40_551_040


LARGE = [  # name, options, prunable MACs published or derived (None: only against torch's counter)
    ("torchvision:resnet50", {}, 4_089_184_256),
    ("timm:vit_base_patch16_224", {}, None),
    ("timm:mobilenetv3_small_100", {}, None),
    ("timm:convnext_atto", {}, None),
]


@pytest.mark.parametrize(("name", "options", "macs"), LARGE)
def test_large_models_agree_with_torch(name, options, macs):
    pytest.importorskip(name.partition(":")[0])
    shape = (3, 224, 224)
    with torch.device("meta"):
        model = build(name, classes=1000, shape=shape, **options).eval()
        images = torch.zeros(2, *shape)
    with FlopCounterMode(display=False) as reference, torch.no_grad():
        model(images)
    counted = count_macs(model, images)
    assert counted.total == reference.get_total_flops() / 2 / 2  # 2 flops per MAC, 2 images
    assert macs is None or counted.total == macs


def test_attention_splits_into_weights_and_scores():
    """ViT-B/16: 12 layers, width 768, 197 tokens; scores and weighted sums are the only products without a weight."""
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = build("timm:vit_base_patch16_224", classes=1000, shape=(3, 224, 224))
        counted = count_macs(model, torch.zeros(1, 3, 224, 224))
    tokens, width, depth = 197, 768, 12
    assert counted.other == depth * 2 * tokens**2 * width
    blocks = depth * tokens * (4 + 8) * width**2
    assert sum(counted.layers.values()) == blocks + 196 * 3 * 16**2 * width + 1000 * width
