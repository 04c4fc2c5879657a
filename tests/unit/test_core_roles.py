"""The classifier of a model, found by what its output is made of and not by names; and selectors that mean it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import microglia as mg
from microglia.core.errors import MicrogliaError, SelectorError
from microglia.core.roles import mark_roles
from microglia.lab.execute import make_task
from microglia.lab.recipe import method_config, resolve
from microglia.methods import methods

SHRINKBENCH = ("global-magnitude", "layer-magnitude", "global-gradient", "layer-gradient", "random")
x = torch.randn(2, 8)


def net(*layers):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), *layers)


class Heads(nn.Module):
    """Two heads whose names say nothing, called in another order than they stand, and one layer that is never called."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(8, 16)
        self.b, self.unused, self.a = nn.Linear(16, 4), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        x = self.classifier(x).relu()
        return {"classes": self.a(x).softmax(1), "boxes": [self.b(x).sigmoid()]}


class Functional(nn.Module):
    """Its layers are never called as modules; the classifier stands first and is frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 3), nn.Linear(8, 16)
        self.first.requires_grad_(False)

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.second.weight).relu(), self.first.weight * 2) / 3


class Tied(nn.Module):
    """A language model: integers in, an output of several parts, the last layer tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.body(self.embedding(ids)).tanh()
        return {"hidden": (hidden,), "logits": self.head(hidden)}


class Frozen(nn.Module):
    """A backbone without gradients and a head on top."""

    def __init__(self):
        super().__init__()
        self.body, self.top = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.body(x)
        return self.top(x)


class Headless(nn.Module):
    """Residual branches that all reach the output: the last one makes it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        x = x + self.one(x)
        return self.norm(x + self.two(x))


class Writing(nn.Module):
    """Writes into its input and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x):
        return self.layer(x.mul_(2) + torch.rand(()))


MODELS = {
    "behind a softmax": (net(nn.Linear(16, 3), nn.Softmax(1)), {"2"}),
    "behind a norm": (net(nn.Linear(16, 3), nn.BatchNorm1d(3)), {"2"}),
    "one layer": (nn.Linear(8, 3), {""}),
    "one output": (net(nn.Linear(16, 1)), {"2"}),
    "weight norm": (net(parametrizations.weight_norm(nn.Linear(16, 3))), {"2"}),
    "spectral norm": (net(parametrizations.spectral_norm(nn.Linear(16, 3))), {"2"}),
    "convolution": (
        nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1), nn.MaxPool2d(2), nn.Flatten()),
        {"2"},
    ),
    "two heads": (Heads(), {"a", "b"}),
    "functional and frozen": (Functional(), {"first"}),
    "frozen backbone": (Frozen(), {"top"}),
    "residual, headless": (Headless(), {"two"}),
    "writing": (Writing(), {"layer"}),
}


@pytest.mark.parametrize("case", list(MODELS))
def test_the_classifier_is_the_last_layer_whatever_its_name(case):
    model, expected = copy.deepcopy(MODELS[case][0]), MODELS[case][1]
    before = copy.deepcopy(model.state_dict())
    trainable = [p.requires_grad for p in model.parameters()]
    given, drawn = x.clone(), torch.get_rng_state()
    assert set(mark_roles(model, given)["classifier"]) == expected
    assert torch.equal(given, x)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_tied_output_layer_is_the_classifier_and_the_body_is_not():
    model = Tied()
    assert set(mark_roles(model, {"ids": torch.tensor([[1, 2, 3]])})["classifier"]) == {"embedding", "head"}
    assert set(mg.core.layers.prunable_layers(model, exclude=["role:classifier"])) == {"body.weight"}


def test_a_mask_hides_nothing():
    model = net(nn.Linear(16, 3))
    mg.mask(model, {name: torch.rand(layer.shape) < 0.5 for name, layer in mg.core.layers.prunable_layers(model).items()})
    assert mark_roles(model, x) == {"classifier": ("2",)}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("resnet20", (3, 32, 32), {"linear"}),
        ("densenet40", (3, 32, 32), None),
        ("torchvision:squeezenet1_1", (3, 64, 64), {"classifier.1"}),
        ("torchvision:mobilenet_v3_small", (3, 64, 64), {"classifier.3"}),
        ("timm:convnext_atto", (3, 64, 64), {"head.fc"}),
        ("timm:deit_tiny_distilled_patch16_224", (3, 224, 224), {"head", "head_dist"}),
    ],
)
def test_models_of_every_source(name, shape, expected):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    if name.startswith("torchvision:"):
        pytest.importorskip("torchvision")
    model = mg.tasks.build(name, classes=7, shape=shape)
    found = set(mark_roles(model, torch.randn(1, *shape))["classifier"])
    assert expected is None or found == expected
    modules = dict(model.named_modules())
    assert all(modules[path].weight.shape[0] == 7 for path in found)


def test_a_classifier_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    ids = torch.tensor([[1, 2, 3]])
    assert mark_roles(model, {"input_ids": ids, "output_hidden_states": True}) == {"classifier": ("classifier",)}


def test_selectors_mean_a_role_and_copies_keep_it():
    model = copy.deepcopy(MODELS["two heads"][0])
    mark_roles(model, x)
    for each in (model, copy.deepcopy(model)):
        assert set(mg.core.layers.prunable_layers(each, exclude=["role:classifier"])) == {"classifier.weight", "unused.weight"}
        assert set(mg.core.layers.prunable_layers(each, ["role:classifier"])) == {"a.weight", "b.weight"}
        assert set(mg.core.layers.prunable_layers(each, ["!role:classifier"])) == {"classifier.weight", "unused.weight"}
    assert mg.methods.OneShot(model, density=0.5, exclude=["role:classifier"]).masks.keys() == {
        "classifier.weight",
        "unused.weight",
    }


def test_a_role_without_marks_or_of_another_name_is_refused():
    with pytest.raises(SelectorError, match="mark_roles"):
        mg.methods.OneShot(net(nn.Linear(16, 3)), density=0.5, exclude=["role:classifier"])
    model = net(nn.Linear(16, 3))
    mark_roles(model, x)
    with pytest.raises(SelectorError, match="'role:stem'"):
        mg.methods.OneShot(model, density=0.5, exclude=["role:stem"])


def test_a_classifier_that_cannot_be_masked_is_no_mistake():
    model = copy.deepcopy(MODELS["weight norm"][0])
    mark_roles(model, x)
    assert set(mg.methods.OneShot(model, density=0.5, exclude=["role:classifier"]).masks) == {"0.weight"}


@pytest.mark.parametrize(
    ("model", "text"), [(nn.ReLU(), "makes its output|No layer is left"), (nn.Linear(9, 3), "does not run")]
)
def test_a_model_that_has_none_is_refused(model, text):
    with pytest.raises(MicrogliaError, match=text):
        mark_roles(model, x)


@pytest.mark.parametrize("method", SHRINKBENCH)
def test_the_baselines_of_shrinkbench_leave_the_classifier_alone(method):
    recipe = resolve({"model": "conv-2", "method": method, "prune": {"density": 0.5}})
    config = method_config(recipe)
    task = make_task(recipe)
    methods[method].check(task, config)
    model, (last,) = task.build(), mark_roles(task.build(), task.example)["classifier"]
    pruner = mg.methods.OneShot(model, density=0.5, exclude=config.exclude)
    assert set(pruner.masks) == set(mg.core.layers.prunable_layers(model)) - {f"{last}.weight"}
    assert set(mg.methods.OneShot(task.fresh(1), density=0.5, exclude=config.exclude).masks) == set(pruner.masks)
    named = resolve({"model": "conv-2", "method": method, "prune": {"density": 0.5, "exclude": []}})
    assert method_config(named).exclude == ()


def test_channels_of_a_marked_model_leave_the_classifier_alone():
    model = net(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    mark_roles(model, x)
    small = mg.prune_channels(model, x, mg.Budget(params=0.6), exclude=["role:classifier"])
    assert small.get_parameter("4.weight").shape == (3, 8)
    assert small.get_parameter("0.weight").shape[0] < 16
