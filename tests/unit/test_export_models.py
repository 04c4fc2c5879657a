"""Pruned models of every kind through every target: the file gives the model's outputs in its engine."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.batch import Example, tensors_of
from microglia.core.errors import MicrogliaError
from microglia.export import targets
from microglia.graph import plan_of
from microglia.graph.dims.trace import known_outputs

HALF = mg.Budget(flops=0.5)
FILES = {"onnx": "model.onnx", "openvino": "model.xml", "program": "model.pt2", "hf": "folder"}


class UNet(nn.Module):
    """Two scales, a skip connection, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))

    def forward(self, x):
        wide = self.down(x)
        return self.out(torch.cat([wide, self.up(self.deep(wide))], 1))


def unet():
    return UNet(), torch.randn(1, 3, 16, 16), (0, 2, 3)


def resnet():
    return mg.tasks.build("resnet8", classes=10, shape=(3, 32, 32)), torch.randn(1, 3, 32, 32), (0,)


def mobilenet():
    torchvision = pytest.importorskip("torchvision")
    blocks, last = torchvision.models.mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.5)
    kinds = [blocks[0], blocks[1], blocks[4]]  # with and without squeeze, expansion, a shortcut, hard-swish
    kinds[1].input_channels, kinds[2].input_channels = kinds[0].out_channels, kinds[1].out_channels
    model = torchvision.models.MobileNetV3(kinds, last, num_classes=10)
    return model, torch.randn(1, 3, 64, 64), (0,)


def vit():
    timm = pytest.importorskip("timm")
    settings = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **settings), torch.randn(1, 3, 32, 32), (0,)


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def bert():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))
    ids = torch.randint(0, 64, (1, 8))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (0, 1)


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 64, (1, 8))}, (0, 1)


def outputs(model, example):
    given = Example.of(example)
    with torch.no_grad():
        return tensors_of(known_outputs(model(*given.args, **given.kwargs)))


@pytest.mark.parametrize("make", [unet, resnet, mobilenet, vit, bert, llama])
def test_shrunk_models_give_equal_outputs_through_every_engine(tmp_path, make: Callable):
    torch.manual_seed(0)
    model, example, dynamic = make()
    small = mg.prune_channels(model.eval(), example, HALF)
    assert plan_of(small).kept
    wanted = outputs(small, example)
    for name in ("onnx", "openvino", "program"):
        written = mg.export(small, tmp_path / FILES[name], example, dynamic=dynamic)
        assert written.examples == 4, "the example, and a batch of three"
        assert written.bytes == sum(file.stat().st_size for file in written.files) > 1000
        given = Example.of(example)
        for one, other in zip(tensors_of(written.open()(*given.args, **given.kwargs)), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.xml", "model.bin", "model.pt2"}


@pytest.mark.parametrize(
    ("make", "exclude"),
    [(bert, ["*embeddings*", "*attention*", "*pooler*", "classifier"]), (llama, ["*embed_tokens*", "*self_attn*"])],
)
def test_a_cut_that_the_configuration_can_say_opens_in_transformers(tmp_path, make, exclude):
    import transformers

    torch.manual_seed(0)
    model, example, _ = make()
    small = mg.prune_channels(model.eval(), example, mg.Budget(density=0.5), round_to=1, exclude=exclude)
    written = mg.export(small, tmp_path / "folder", example)
    assert written.target == "hf"
    assert written.difference < 1e-6
    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "folder").eval()
    assert loaded.config.intermediate_size == 32
    torch.testing.assert_close(outputs(loaded, example), outputs(small, example))


def test_a_cut_whose_layers_differ_opens_in_transformers_with_this_library(tmp_path):
    model, example, _ = bert()
    small = mg.prune_channels(model.eval(), example, HALF)
    written = mg.export(small, tmp_path / "folder", example)
    assert (written.target, written.difference < 1e-6) == ("hf", True)


def test_a_cut_that_no_configuration_can_say_leaves_nothing_behind(tmp_path):
    model, example, _ = bert()
    small = mg.prune_channels(model.eval(), example, HALF)
    small.bert.encoder.layer[0].attention.self.num_attention_heads += 1  # what no list of sizes says
    with pytest.raises(MicrogliaError, match="cannot say the widths of this pruned model"):
        mg.export(small, tmp_path / "folder", example)
    with pytest.raises(MicrogliaError, match="is no model of transformers"):
        mg.export(UNet(), tmp_path / "folder", torch.randn(1, 3, 16, 16))
    assert not list(tmp_path.iterdir())


def test_every_target_is_tried_here():
    assert {name for name, _ in targets.items()} == {*FILES, "executorch"}  # which test_export_executorch.py tries
