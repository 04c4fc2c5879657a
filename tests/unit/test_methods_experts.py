"""Experts: scores by hand, cuts equal to masked routers, directories that plain transformers opens."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError, FileError, MicrogliaError, SelectorError, UnknownNameError
from microglia.graph import Experts, experts_of, keep_blocks, keep_experts
from microglia.graph.experts import ExpertForm, expert_forms, expert_layers, masked_experts, verify_experts
from microglia.methods import ExpertScore, drop_experts, expert_scores, tally_experts
from microglia.storage.changes import changes_of

transformers = pytest.importorskip("transformers") if importlib.util.find_spec("transformers") else None
needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
          "v_head_dim": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 8},
    "Qwen2Moe": {"num_experts": 8, "shared_expert_intermediate_size": 20},
    "Qwen3Moe": {"num_experts": 8},
    "Olmoe": {"num_experts": 8},
    "GptOss": {"num_local_experts": 8},
    "DeepseekV3": {**LATENT, "n_routed_experts": 8, "n_group": 2},
}
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS}


def built(family, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # far from ties of the router
            nn.init.normal_(parameter, std=0.1, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            nn.init.normal_(buffer, std=0.1, generator=generator)
    return model


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@needs_transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_the_masked_one_and_plain_transformers_opens_it(family, tmp_path):
    model = built(family)
    before = tensors(model)
    small = drop_experts(model, [BATCH], keep=4)
    kept = experts_of(small).kept
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(len(own) == 4 for own in kept.values())
    with masked_experts(model, kept), torch.no_grad():
        wanted = model(IDS).logits
    with torch.no_grad():
        found, dense = small(IDS).logits, model(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-3)  # the removed experts did something
    small.save_pretrained(tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(again) is type(model)
    assert torch.equal(again(IDS).logits, found)
    assert torch.equal(
        again.generate(IDS, max_new_tokens=4, do_sample=False), small.generate(IDS, max_new_tokens=4, do_sample=False)
    )
    count = next(iter(FAMILIES[family].keys() & {"num_local_experts", "num_experts", "n_routed_experts"}))
    assert (getattr(again.config, count), getattr(model.config, count)) == (4, 8)
    assert {layer.count for layer in expert_layers(again)} == {4}


@needs_transformers
def test_it_is_saved_and_loaded_and_cut_again(tmp_path):
    model = built("Mixtral")
    small = drop_experts(drop_experts(model, [BATCH], keep=6, score="frequency"), [BATCH], keep=3, score="weighted")
    value = experts_of(small)
    assert value.of == 8
    mg.save(small, tmp_path / "m")
    again = mg.load(tmp_path / "m", built("Mixtral"))
    assert (experts_of(again), list(changes_of(again))) == (value, ["experts"])
    assert torch.equal(again(IDS).logits, small(IDS).logits)
    assert (again.config.num_local_experts, again.num_experts) == (3, 3)
    with masked_experts(model, value.kept), torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileError, match="8 experts in a layer; this one has 6"):
        mg.load(tmp_path / "m", built("Mixtral", num_local_experts=6))


@needs_transformers
def test_experts_leave_after_blocks_and_before_the_rest(tmp_path):
    model = built("Qwen3Moe", num_hidden_layers=3)
    small = drop_experts(keep_blocks(model, "model.layers", [0, 2]), [BATCH], keep=4)
    mg.save(small, tmp_path / "m")
    again = mg.load(tmp_path / "m", built("Qwen3Moe", num_hidden_layers=3))
    assert list(changes_of(again)) == ["depth", "experts"]
    assert torch.equal(again(IDS).logits, small(IDS).logits)
    with pytest.raises(SelectorError, match="without some of its experts already"):
        keep_blocks(small, "model.layers", [0])
    mg.methods.OneShot(small, density=0.5)
    with pytest.raises(SelectorError, match="has the change 'masks' already"):
        keep_experts(small, {"model.layers.0.mlp": [0, 1], "model.layers.1.mlp": [0, 1]})


@needs_transformers
def test_scores_are_their_formulas_and_padding_does_not_count():
    model = built("Mixtral")
    padded = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    padded["attention_mask"][1, 7:] = 0
    found = tally_experts(model, [padded], runs=True)
    seen = []
    block = model.model.layers[0].mlp
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**padded)
        handle.remove()
        hidden = seen[0][padded["attention_mask"].bool()]
        weights, index = functional.linear(hidden, block.gate.weight).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        gate, up = torch.einsum("td,efd->etf", hidden, block.experts.gate_up_proj).chunk(2, -1)
        outputs = torch.einsum("etf,edf->ted", functional.silu(gate) * up, block.experts.down_proj)
        norms = outputs.norm(dim=-1).gather(1, index)
        sums = torch.zeros(3, 8)
        for row, values in enumerate((torch.ones_like(weights), weights, weights * norms)):
            sums[row].index_add_(0, index.flatten(), values.flatten())
    tally = found["model.layers.0.mlp"]
    assert (tally.tokens, sums[0].sum()) == (19, 38)  # 12 tokens and 7
    for name, wanted in (
        ("frequency", sums[0]), ("weighted", sums[1]), ("contribution", sums[2]), ("reap", sums[2] / sums[0].clamp_min(1))
    ):  # fmt: skip
        torch.testing.assert_close(expert_scores[name].of(tally), wanted.double(), rtol=1e-4, atol=1e-5)
        small = drop_experts(model, [padded], keep=3, score=name)
        assert set(experts_of(small).kept["model.layers.0.mlp"]) == set(wanted.topk(3).indices.tolist())


@needs_transformers
def test_random_is_a_control_and_scores_can_be_given():
    model = built("Olmoe")
    one, other = (experts_of(drop_experts(model, [BATCH], keep=3, score="random")) for _ in range(2))
    assert one == other
    given = {layer.path: torch.arange(8.0) for layer in expert_layers(model)}
    assert set(experts_of(drop_experts(model, [BATCH], keep=2, score=given)).kept.values()) == {(6, 7)}


@needs_transformers
def test_groups_of_a_router_keep_equally_many():
    model = built("DeepseekV3")
    kept = experts_of(drop_experts(model, [BATCH], keep=4, score={"model.layers.1.mlp": torch.arange(8.0)})).kept
    assert kept == {"model.layers.1.mlp": (2, 3, 6, 7)}
    for keep in (3, 2):
        with pytest.raises(SelectorError, match="keep a multiple of 2, 4 or more"):
            drop_experts(model, [BATCH], keep=keep)


class Listed(nn.Module):
    """A layer as in older models: a list of experts, and a linear layer as router."""

    def __init__(self, count=4):
        super().__init__()
        self.num_experts, self.top_k = count, 2
        self.gate = nn.Linear(6, count, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(count))

    def forward(self, x):
        weights, index = self.gate(x).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for k in range(self.num_experts):
            rows, places = torch.where(index == k)
            y[rows] += self.experts[k](x[rows]) * weights[rows, places, None]
        return x + y


class Net(nn.Module):
    """Two such layers, whose class is given."""

    def __init__(self, layer=Listed):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


def test_a_list_of_experts_loses_entries(tmp_path):
    model = Net()
    small = drop_experts(model, [X], keep=2)
    value = experts_of(small)
    assert [len(block.experts) for block in (*small.blocks, *model.blocks)] == [2, 2, 4, 4]
    assert small.blocks[0].gate.out_features == 2
    with masked_experts(model, value.kept), torch.no_grad():
        torch.testing.assert_close(small(X), model(X))
    tally, block = tally_experts(model, [X], runs=True)["blocks.0"], model.blocks[0]
    with torch.no_grad():
        weights, index = block.gate(X).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        rows, places = torch.where(index == 1)
        wanted = (weights[rows, places] * block.experts[1](X[rows]).norm(dim=-1)).sum()
    torch.testing.assert_close(tally.contribution[1], wanted.double(), rtol=1e-4, atol=1e-5)
    mg.save(small, tmp_path / "m")
    again = mg.load(tmp_path / "m", Net())
    assert torch.equal(again(X), small(X))
    assert experts_of(again) == value


class Numbered(Listed):
    """A layer that knows its experts by number."""

    def forward(self, x):
        return super().forward(x) + (self.gate(x).argmax(-1) == 0)[:, None]


def test_a_layer_that_uses_the_numbers_otherwise_is_refused():
    with pytest.raises(MicrogliaError, match=r"blocks\.0 without the experts computes something else"):
        drop_experts(Net(Numbered), [X], keep=3, score={f"blocks.{i}": torch.arange(4.0) for i in range(2)})
    model = Net()
    kept = {"blocks.0": [0, 1], "blocks.1": [0, 2]}
    small = keep_experts(model, kept)
    verify_experts(model, small, kept, X)
    with torch.no_grad():
        small.blocks[1].experts[0][0].bias += 1
    with pytest.raises(MicrogliaError, match=r"blocks\.1 without the experts computes something else"):
        verify_experts(model, small, kept, X)
    assert "forward" not in vars(model.blocks[0].gate)


def test_scores_and_forms_are_table_values():
    expert_scores.add("toy: the last")(ExpertScore(lambda tally: torch.arange(float(tally.experts))))
    assert set(experts_of(drop_experts(Net(), [X], keep=2, score="toy: the last")).kept.values()) == {(2, 3)}

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 6
            self.matrix = nn.Parameter(torch.randn(4 * self.width, self.width) / 4)

        def forward(self, x, index, weights):
            outputs = torch.einsum("td,ekd->tek", x, self.matrix.view(-1, self.width, self.width))
            return (outputs.gather(1, index[..., None].expand(-1, -1, self.width)) * weights[..., None]).sum(1)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.bank = nn.Linear(6, 4), Stacked()

        def forward(self, x):
            weights, index = self.router(x).softmax(-1).topk(1)
            return self.bank(x, index, weights / weights)

    fused = expert_forms["fused"]
    expert_forms.add("toy: stacked")(
        ExpertForm(
            count=lambda name, module: len(module.matrix) // module.width if isinstance(module, Stacked) else 0,
            rows=lambda bank, kept: {"matrix": {"0": [k * bank.width + i for k in kept for i in range(bank.width)]}},
            run=fused.run,
            routing=fused.routing,
        )
    )
    model = Net(Layer)
    small = drop_experts(model, [X], keep=2)
    assert small.blocks[0].bank.matrix.shape == (12, 6)
    with masked_experts(model, experts_of(small).kept), torch.no_grad():
        torch.testing.assert_close(small(X), model(X))


LAYERS = {"blocks.0": [0, 1], "blocks.1": [2, 3]}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: drop_experts(nn.Sequential(nn.Linear(2, 2)), [X], keep=1), SelectorError, "has no layer of experts"),
        (lambda: drop_experts(Net(), [X], keep=5), BudgetError, "1 to 4 here; got 5"),
        (lambda: drop_experts(Net(), [X], keep=1), BudgetError, "goes to 2 experts, so at least 2 stay; got 1"),
        (lambda: drop_experts(Net(), [], keep=2), MicrogliaError, "give at least one"),
        (lambda: drop_experts(Net(), [X], keep=2, score="reep"), UnknownNameError, "Did you mean 'reap'"),
        (lambda: drop_experts(Net(), [X], keep=2, score={}), SelectorError, "are 4 finite numbers; got none"),
        (lambda: keep_experts(Net(), {"blocks.0": [0, 1]}), SelectorError, "blocks.1 is one too many or few"),
        (lambda: keep_experts(Net(), {**LAYERS, "blocks.1": [3, 2]}), SelectorError, "rising numbers from 0 to 3"),
        (lambda: keep_experts(Net(), {**LAYERS, "blocks.1": [0, 1, 2]}), SelectorError, "equally many experts"),
        (lambda: Experts.from_dict({"kept": {"a": [0, 4]}, "of": 4}), FileError, "equally many for every layer"),
        (lambda: Experts.from_dict({"kept": {"a": [0, 1], "b": [0]}, "of": 4}), FileError, "equally many for every layer"),
    ],
)
def test_wrong_input_ends_in_one_sentence(call, error, text):
    with pytest.raises(error, match=text) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_layers_that_are_not_clear_are_refused():
    class Square(Listed):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 4)

    class TwoRouters(Listed):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(6, 4)

    class Hashed(Listed):
        def __init__(self):
            super().__init__()
            self.register_buffer("expert_of_token", torch.zeros(64, 2, dtype=torch.long))

    for layer, text in ((Square, "as wide as it has experts"), (TwoRouters, "gate, router beside"), (Hashed, "by number")):
        with pytest.raises(SelectorError, match=text):
            keep_experts(Net(layer), LAYERS)
    model = Net()
    model.blocks[1] = Listed(5)
    with pytest.raises(SelectorError, match=r"different numbers of experts, \[4, 5\]"):
        keep_experts(model, LAYERS)
