"""BiSeNet-v2: published counts, the variant of SMART's paper, auxiliary heads, cuts."""

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.auxiliary import auxiliary_paths, counted_parameters, drop_auxiliary
from microglia.core.layers import prunable_layers
from microglia.measure.parameters import count_parameters
from microglia.train.recover import recalibrate
from microglia.zoo import ModelError, build


def tiny(**options):
    torch.manual_seed(0)
    return build("bisenetv2", classes=11, shape=(3, 64, 64), **{"width": 8, **options})


@pytest.mark.parametrize(("classes", "training", "inference"), [(19, 5_231_487, 3_358_627), (11, 5_212_375, 3_350_427)])
def test_counts(classes, training, inference):
    with torch.device("meta"):
        model = build("bisenetv2", classes=classes, shape=(3, 64, 64))
        plain = build("bisenetv2", classes=classes, shape=(3, 64, 64), boosters=False)
    assert sum(p.numel() for p in model.parameters()) == training
    assert sum(p.numel() for p in plain.parameters()) == inference == counted_parameters(model)


def test_counts_of_the_parts():
    with torch.device("meta"):
        model = build("bisenetv2", classes=19, shape=(3, 64, 64))
    semantic = model.semantic
    parts = (
        model.detail, model.stem, semantic.stage3, semantic.stage4, semantic.stage5, semantic.context, model.aggregation,
        model.head, model.boosters,
    )  # fmt: skip
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [
        519_232, 6_432, 25_936, 94_368, 868_160, 164_608, 478_720, 1_201_171, 1_872_860,
    ]  # fmt: skip


def test_the_variant_of_smarts_paper_is_the_same_function():
    model, variant = tiny().eval(), tiny(pool="average-resize").eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight)
            nn.init.uniform_(part.running_mean)
    variant.load_state_dict(model.state_dict())
    for size in ((64, 96), (120, 160)):  # the second is no multiple of 32: maps are resized to each other's size
        images = torch.randn(2, 3, *size)
        difference = (model(images) - variant(images)).abs().max()
        assert tuple(model(images).shape) == (2, 11, *size)
        assert difference <= 1e-6


def test_training_returns_the_boosters_and_gradients_reach_every_parameter():
    model = tiny().train()
    maps = model(torch.randn(2, 3, 64, 64))
    assert [tuple(one.shape) for one in maps] == [(2, 11, 64, 64)] * 5
    sum(one.square().mean() for one in maps).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    assert isinstance(model.eval()(torch.randn(1, 3, 64, 64)), torch.Tensor)


def test_batches_of_one_image_recalibrate():
    model = tiny()
    recalibrate(model, [(torch.randn(1, 3, 64, 64), None) for _ in range(2)])
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_last_batch_of_one_image_trains():
    model = tiny().train()
    assert torch.isfinite(model(torch.randn(1, 3, 64, 64))[0]).all()


def test_pruning_and_counts_leave_the_boosters_out():
    model = tiny()
    assert auxiliary_paths(model) == ("boosters",)
    assert not [name for name in prunable_layers(model) if "boosters" in name]
    assert count_parameters(model).all == count_parameters(tiny(boosters=False)).all
    assert count_parameters(model).prunable == count_parameters(tiny(boosters=False)).prunable


def test_a_cut_model_drops_the_boosters_and_trains():
    model = tiny().eval()
    small = mg.prune_channels(model, torch.zeros(1, 3, 64, 64), mg.Budget(density=0.5), round_to=1)
    assert type(small) is type(model)
    assert len(small.boosters) == 0
    assert len(model.boosters) == 4
    assert isinstance(small.train()(torch.randn(2, 3, 64, 64)), torch.Tensor)
    assert counted_parameters(small) < 0.5 * counted_parameters(model)


class Toy(nn.Module):
    """A user's own model with an auxiliary head that is no list."""

    auxiliary = ("aux",)

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.body(x).relu()
        return (self.head(x), self.aux(x)) if self.training and self.aux is not None else self.head(x)


def test_a_model_from_outside_declares_its_auxiliary_parts():
    outer = nn.Sequential(Toy())
    assert auxiliary_paths(outer) == ("0.aux",)
    assert list(prunable_layers(outer)) == ["0.body.weight", "0.head.weight"]
    small = mg.prune_channels(outer.eval(), torch.zeros(1, 3, 4, 4), mg.Budget(density=0.5), round_to=1)
    assert small[0].aux is None
    assert auxiliary_paths(drop_auxiliary(outer)) == ()


@pytest.mark.parametrize(
    ("options", "told"),
    [({"width": 12}, "multiple of 8"), ({"pool": "max"}, "mean or average-resize"), ({"wide": 1}, "no option")],
)
def test_wrong_options(options, told):
    with pytest.raises(ModelError, match=told):
        tiny(**options)
