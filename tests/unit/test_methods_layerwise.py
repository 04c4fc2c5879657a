"""Layer-wise pruning: blocks found, one at a time, resumed to the same bits; transformers; wrong input in one sentence."""

import gc
import importlib.util
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import BudgetError, MicrogliaError, PatternError, SelectorError, UnknownNameError
from microglia.core.patterns import Unstructured
from microglia.methods import layerwise as module
from microglia.methods.blocks import candidates, find_blocks
from microglia.methods.layerwise import Layerwise
from microglia.methods.layerwise_rules import PrunedLayer, Rule, Wish, rules
from microglia.scores.second_moments import Moments
from microglia.storage.run import Run

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is missing")


class Block(nn.Module):
    """A residual block that takes a scale besides the hidden state and returns a tuple, as those of older transformers."""

    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, hidden, *, scale=None):
        x = self.norm(hidden)
        return (hidden + scale * self.down(torch.relu(self.gate(x)) * self.up(x)),)


class Net(nn.Module):
    """An embedding whose weight the head shares, three blocks, a norm."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(12, 16), nn.LayerNorm(16), nn.Linear(16, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, tokens):
        hidden, scale = self.embedding(tokens), torch.ones(())
        for block in self.blocks:
            hidden = block(hidden, scale=scale)[0]
        return self.head(self.norm(hidden))


def net():
    torch.manual_seed(0)
    return Net()


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(12, (6, 10), generator=generator) for _ in range(count)]


def by_hand(model, rule, density):
    """Prunes the net block by block without the library's procedure; every layer sees its own inputs."""
    hidden = [model.embedding(tokens) for tokens in batches()]
    for block in model.blocks:
        seen = {name: [] for name in ("up", "gate", "down")}
        hooks = [
            getattr(block, n).register_forward_hook(lambda m, args, out, n=n, to=seen: to[n].append(args[0].flatten(0, 1)))
            for n in seen
        ]
        for h in hidden:
            block(h, scale=torch.ones(()))
        for hook in hooks:
            hook.remove()
        for name, read in seen.items():
            layer = getattr(block, name)
            x = torch.cat(read).double()
            given = {"diagonal": x.square().mean(0)[None], "whole": (x.T @ x / len(x))[None], "none": None}[rules[rule].needs]
            wish = Wish(Unstructured(), round(density * layer.weight.numel()))
            layer.weight.copy_(rules[rule].prune(layer.weight, rules[rule].prepare(given, wish), wish).weight)
        hidden = [block(h, scale=torch.ones(()))[0] for h in hidden]


@pytest.mark.parametrize("rule", list(rules))
def test_it_is_pruning_by_hand_block_after_block(rule):
    model, expected = net(), net()
    with torch.no_grad():
        by_hand(expected.eval(), rule, 0.5)
    report = Layerwise(model, batches(), rule=rule, density=0.5).prune()
    assert [row["layer"] for row in report["layers"]] == [
        f"blocks.{i}.{name}.weight" for i in range(3) for name in ("up", "gate", "down")
    ]
    folded = mg.fold(model)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_tied_embedding_and_head_are_untouched_and_modes_are_kept():
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = Layerwise(model, batches(), rule="sparsegpt", pattern="nm:2:4")
    pruner.prune()
    assert model.training
    assert model.head.weight is model.embedding.weight
    changed = {name for name, value in mg.fold(model).state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"blocks.{i}.{name}.weight" for i in range(3) for name in ("up", "gate", "down")}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_density_one_changes_nothing():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Layerwise(model, batches(), rule="sparsegpt", density=1.0).prune()
    assert all(torch.equal(value, before[name]) for name, value in mg.fold(model).state_dict().items())


def test_layers_that_read_the_same_tensor_share_its_moments(monkeypatch):
    made = []

    class Counted(Moments):
        def __init__(self, layer, *, whole):
            super().__init__(layer, whole=whole)
            made.append(self)

    monkeypatch.setattr("microglia.methods.layer_inputs.Moments", Counted)
    Layerwise(net(), batches(), rule="sparsegpt", density=0.5).prune()
    assert len(made) == 6  # of each block: up and gate together, and down


def test_memory_is_bounded_by_one_block_and_the_calibration_batches(monkeypatch):
    alive, most = weakref.WeakSet(), []
    usual = Moments.__init__

    def noted(self, layer, *, whole):
        usual(self, layer, whole=whole)
        alive.add(self)

    def hiddens():
        gc.collect()  # of what was made since the freeze
        return sum(o.shape == (6, 10, 16) for o in gc.get_objects() if type(o) is torch.Tensor)

    pruned = module.Layerwise._prune_layer

    def watched(self, *args):
        most.append((len(alive), hiddens()))
        return pruned(self, *args)

    monkeypatch.setattr(Moments, "__init__", noted)
    monkeypatch.setattr(module.Layerwise, "_prune_layer", watched)
    given = batches(5)
    gc.freeze()  # what is there is not looked at
    try:
        assert hiddens() == 0
        Layerwise(net(), given, rule="sparsegpt", density=0.5).prune()
    finally:
        gc.unfreeze()
    assert len(most) == 9
    assert max(moments for moments, _ in most) <= 2
    assert 0 < max(count for _, count in most) <= len(given)


class Killed(BaseException):
    """Stands for kill -9 between two blocks."""


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_after_any_block_it_resumes_to_the_same_bits(after, tmp_path, monkeypatch):
    whole = net()
    expected = Layerwise(whole, batches(), rule="sparsegpt", density=0.4).prune()
    stage, done = Run.stage, []

    def killed(self, name, work):
        if len(done) > after:
            raise Killed
        done.append(name)
        return stage(self, name, work)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "stage", killed)
        first = Run(tmp_path, {})
        if after < 2:
            with pytest.raises(Killed):
                Layerwise(net(), batches(), rule="sparsegpt", density=0.4).prune(first)
        else:
            Layerwise(net(), batches(), rule="sparsegpt", density=0.4).prune(first)
        first.close()
    calls = []
    monkeypatch.setattr(module.Layerwise, "_prune_block", _noting(module.Layerwise._prune_block, calls))
    model = net()
    report = Layerwise(model, batches(), rule="sparsegpt", density=0.4).prune(Run(tmp_path, {}))
    assert calls == list(range(after + 1, 3))
    assert report == expected
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


def _noting(function, calls):
    def noted(self, index):
        calls.append(index)
        return function(self, index)

    return noted


# ---------------------------------------------------------------------------------------------------------------- blocks
def test_the_longest_list_is_found_and_lists_within_blocks_are_none():
    model = nn.Module()
    model.encoder = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    model.heads = nn.ModuleList([nn.Linear(4, 1)])
    assert list(candidates(model)) == ["encoder"]
    assert find_blocks(model)[0] == "encoder"
    assert find_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))[0] == "."


def test_convolutions_in_sequence_are_blocks_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    images = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    dense = [model.eval()(x).detach() for x in images]
    errors = {}
    for rule in ("magnitude", "sparsegpt"):
        twin = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)).eval()
        twin.load_state_dict(model.state_dict())
        pruner = Layerwise(twin, images, rule=rule, density=0.5)
        pruner.prune()
        assert pruner.masks.kept == round(0.5 * pruner.masks.total)
        errors[rule] = sum(float((twin(x) - y).square().sum().detach()) for x, y in zip(images, dense, strict=True))
    assert errors["sparsegpt"] < errors["magnitude"]


def test_padding_is_left_out_of_the_moments():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x, attention_mask):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    found = []
    for junk in (0.0, 1e3):
        torch.manual_seed(1)
        model = Padded()
        inputs = torch.where(mask[..., None].bool(), x, junk)
        report = Layerwise(model, [{"x": inputs, "attention_mask": mask}], rule="wanda", density=0.5).prune()
        assert report["layers"][0]["rows"] == 8
        found.append(mg.masks_of(model))
    assert found[0].same(found[1])


# ----------------------------------------------------------------------------------------------------------- transformers
def llama(**options):
    from microglia.zoo.external import import_torchvision

    import_torchvision()
    import transformers

    torch.manual_seed(0)
    config = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **options})).eval()


def windows(count=6):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(64, (4, 16), generator=generator)} for _ in range(count)]


@needs_transformers
def test_llama_with_grouped_queries_and_a_tied_head():
    model = llama()
    embedding = model.model.embed_tokens.weight.clone()
    cached = model.config.use_cache
    pruner = Layerwise(model, windows(), rule="sparsegpt", pattern="nm:2:4")
    assert pruner.path == "model.layers"
    report = pruner.prune()
    assert len(report["layers"]) == 3 * 7
    assert all(2 * row["kept"] == row["total"] for row in report["layers"])
    assert model.config.use_cache == cached
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)
    ids = windows(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, mg.fold(model)(input_ids=ids).logits)


@needs_transformers
def test_compensation_keeps_a_llama_nearer_to_the_dense_one():
    given, dense = windows(12), llama()
    with torch.no_grad():
        expected = [dense(**one).logits for one in given]
        errors = {}
        for rule in ("magnitude", "wanda-update", "sparsegpt"):
            model = llama()
            Layerwise(model, given, rule=rule, density=0.5).prune()
            errors[rule] = sum(float((model(**one).logits - y).square().sum()) for one, y in zip(given, expected, strict=True))
    assert errors["sparsegpt"] < errors["magnitude"]
    assert errors["wanda-update"] < errors["magnitude"]


@needs_transformers
def test_conv1d_of_gpt2_is_pruned_in_its_own_layout():
    from microglia.zoo.external import import_torchvision

    import_torchvision()
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    pruner = Layerwise(model, windows(), rule="wanda", density=0.5)
    assert pruner.path == "transformer.h"
    pruner.prune()
    mask = pruner.masks["transformer.h.0.mlp.c_fc.weight"]  # (in, out): every output keeps half of its inputs
    assert torch.equal(mask.sum(0), torch.full((64,), 8))


# ------------------------------------------------------------------------------------------------------------ wrong input
def test_too_few_rows_end_in_one_warning():
    with pytest.warns(UserWarning, match=r"9 layers were calibrated on fewer rows than they have inputs, .* on 10 for 24"):
        Layerwise(net(), [batches()[0][:1]], rule="sparsegpt", density=0.5).prune()


class Nothing(nn.Module):
    """No list of blocks."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.two(self.one(x))


class Twice(Nothing):
    """A list that runs in another order."""

    def __init__(self):
        super().__init__()
        self.list = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.list[2](self.list[1](self.list[0](x) + 1))


class Idle(Twice):
    """A list that never runs."""

    def forward(self, x):
        return self.one(x)


def two_lists():
    model = nn.Module()
    model.first = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    model.second = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    return model


@pytest.mark.parametrize(
    ("model", "settings", "error", "text"),
    [
        (Nothing, {"density": 0.5}, SelectorError, "Nothing has no blocks to find"),
        (Twice, {"density": 0.5}, SelectorError, "block 1 does not read what block 0 returned"),
        (Idle, {"density": 0.5}, SelectorError, "Of the 3 blocks of Idle 0 ran"),
        (two_lists, {"density": 0.5}, SelectorError, "several lists of 2 blocks, first, second"),
        (net, {"density": 0.5, "blocks": "blocks.0"}, SelectorError, "is a Block in Net; candidates: blocks"),
        (net, {"density": 0.5, "blocks": "layers"}, SelectorError, "is nothing in Net"),
        (net, {"pattern": "nm:2:5"}, PatternError, "needs a multiple of 5 inputs, and blocks.0.up.weight has 16"),
        (net, {"pattern": "nm:2:4", "density": 0.3}, BudgetError, "keeps 0.5 of the weights by itself"),
        (net, {"pattern": "channel", "density": 0.3}, PatternError, "it removes no whole rows"),
        (net, {}, BudgetError, "needs at least one of density"),
        (net, {"density": 0.5, "rule": "sparsgpt"}, UnknownNameError, "layerwise rule .* Did you mean 'sparsegpt'"),
        (net, {"density": 0.5, "layers": ["head"]}, SelectorError, "No layer of the 3 blocks of Net is left"),
        (net, {"density": 0.5, "mask_block": 0}, PatternError, "at least 1"),
        (net, {"density": 0.5, "dampening": -1.0}, BudgetError, "dampening is a fraction"),
        (net, {"density": 0.5, "score": "random"}, MicrogliaError, "its rule ranks the weights"),
    ],
)
def test_wrong_input_ends_in_one_sentence(model, settings, error, text):
    given = batches() if model is net else [torch.randn(8, 4)]
    with pytest.raises(error, match=text) as raised:
        Layerwise(model(), given, **settings).prune()
    assert str(raised.value).endswith(".")
    assert "\n" not in str(raised.value)


def test_a_batch_that_does_not_fit_ends_in_one_sentence():
    with pytest.raises(MicrogliaError, match=r"The Net does not take a calibration batch, a tuple: .*inputs alone"):
        Layerwise(net(), [(batches()[0], torch.zeros(6))], density=0.5).prune()


@pytest.mark.parametrize("rule", ["magnitude", "wanda", "sparsegpt"])
def test_weights_of_half_precision_are_pruned_in_full_precision(rule):
    model = net().bfloat16()
    pruner = Layerwise(model, batches(), rule=rule, density=0.5)
    pruner.prune()
    assert model.blocks[0].up.weight.dtype == torch.bfloat16
    assert pruner.masks.kept * 2 == pruner.masks.total


def test_no_batches_end_in_one_sentence():
    with pytest.raises(MicrogliaError, match="give at least one"):
        Layerwise(net(), [], density=0.5).prune()


# -------------------------------------------------------------------------------------------------------------- the seam
@dataclass(frozen=True)
class FirstCome:
    """Keeps the first weights of a layer."""

    def __call__(self, weight, prepared, wish):
        mask = (torch.arange(weight.numel()) < wish.keep).view(weight.shape)
        return PrunedLayer(weight * mask, mask)


def test_a_rule_from_outside_is_known_by_its_name():
    rules.add("first-come")(Rule(FirstCome()))
    try:
        pruner = Layerwise(net(), batches(), rule="first-come", density=0.25)
        assert {row["rule"] for row in pruner.prune()["layers"]} == {"first-come"}
        assert all(mask.flatten()[: mask.numel() // 4].all() for mask in pruner.masks.values())
    finally:
        rules._items.pop("first-come")
