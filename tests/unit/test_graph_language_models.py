"""Language models: caches and other objects among the outputs, token ids of any length, and what transformers saves."""

import importlib.util
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import FileError
from microglia.graph.dims.trace import TraceError, trace

transformers = pytest.importorskip("transformers") if importlib.util.find_spec("transformers") else None
needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")

HALF = mg.Budget(density=0.5)
OPTIONS = {"round_to": 1, "exclude": ["*embed_tokens*"]}
EXCLUDED = ["*embed_tokens*", "*self_attn*"]


def tokens(*shape):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(0))


def llama(**options):
    torch.manual_seed(0)
    config = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **options})).eval()


def masked(model, plan):
    """Returns the model in float64 with the inputs of its layers zero that the plan removed."""
    model = model.double()
    with torch.no_grad():
        for name, by_dim in plan.kept.items():
            weight = dict(model.named_parameters()).get(name)
            if weight is not None and weight.ndim == 2 and "1" in by_dim:
                gone = torch.ones(weight.shape[1], dtype=torch.bool)
                gone[by_dim["1"]] = False
                weight[:, gone] = 0
    return model


# -------------------------------------------------------------------------------------------------------- caches, objects
@needs_transformers
@pytest.mark.parametrize("keep_class", [False, True])
def test_a_decoder_that_returns_its_cache_keeps_its_class_and_generates(keep_class):
    ids = tokens(2, 8)
    small = mg.prune_channels(llama(), {"input_ids": ids}, HALF, keep_class=keep_class, **OPTIONS)
    assert type(small) is transformers.LlamaForCausalLM
    assert small.model.layers[0].mlp.gate_proj.out_features == 32
    plan = mg.graph.plan_of(small)
    assert plan.kind == "module"
    assert plan.error < 1e-10
    dense = masked(llama(), plan)
    assert small(input_ids=ids).past_key_values is not None
    small = small.double()
    torch.testing.assert_close(small(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=0, atol=1e-12)
    made, wanted = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (small, dense))
    assert torch.equal(made, wanted)
    assert made.shape == (2, 16)


class State:
    """An object of the user's own, which no tracer knows."""

    def __init__(self, hidden):
        self.hidden = hidden


class WithState(nn.Module):
    """Its classes can follow a cut unless the width is written into its forward."""

    def __init__(self, width=None):
        super().__init__()
        self.first, self.second, self.width = nn.Linear(8, 16), nn.Linear(16, 3), width

    def forward(self, x):
        hidden = self.first(x).relu()
        if self.width:
            hidden = hidden.reshape(x.shape[0], self.width)
        return {"out": self.second(hidden), "state": State(hidden), "name": "mine"}


def test_an_output_that_is_an_object_does_not_cost_the_class():
    small = mg.prune_channels(WithState().eval(), torch.randn(2, 8), HALF, round_to=1)
    assert type(small) is WithState
    assert small(torch.randn(2, 8))["state"].hidden.shape == (2, 8)


def test_a_graph_says_that_it_returns_no_object():
    small = mg.prune_channels(WithState(16).eval(), torch.randn(2, 8), HALF, round_to=1)
    plan = mg.graph.plan_of(small)
    assert plan.kind == "graph"
    assert "The graph of WithState returns None where its own code returns State." in plan.notes
    assert small(torch.randn(2, 8))["state"] is None
    assert small(torch.randn(2, 8))["out"].shape == (2, 3)


def test_a_wrong_number_among_the_outputs_still_costs_the_class():
    class Counts(WithState):
        def forward(self, x):
            return {**super().forward(x), "width": torch.tensor(float(self.first.out_features))}

    small = mg.prune_channels(Counts().eval(), torch.randn(2, 8), HALF, round_to=1)
    assert mg.graph.plan_of(small).kind == "graph"


def test_a_trace_of_a_model_that_returns_an_object_alone_is_refused_in_a_sentence():
    @dataclass
    class Prediction:
        logits: torch.Tensor

    class Wrapped(WithState):
        def forward(self, x):
            return Prediction(super().forward(x)["out"])

    with pytest.raises(
        TraceError, match=r"^Wrapped returns Prediction, in which no tensor can be followed: let it return tensors"
    ):
        trace(Wrapped(), torch.randn(2, 8))


# -------------------------------------------------------------------------------------------------------- free dimensions
class Attention(nn.Module):
    """Self-attention whose heads are written into its forward, so that a cut comes back as a graph."""

    def __init__(self, length=None):
        super().__init__()
        self.e, self.qkv, self.o, self.h = nn.Embedding(64, 32), nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 5)
        self.length = length

    def forward(self, ids):
        b, n = ids.shape
        x = self.e(ids)
        q, k, v = self.qkv(x).reshape(b, self.length or n, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.h(x + self.o(y))


def pruned(model, dynamic, keep=HALF):
    return mg.prune_channels(model.eval(), tokens(2, 8), keep, round_to=1, exclude=["e"], dynamic=dynamic)


def test_the_length_of_token_ids_is_free_where_it_was_asked():
    torch.manual_seed(0)
    model = Attention()
    small = pruned(model, (0, 1))
    plan = mg.graph.plan_of(small)
    assert plan.kind == "graph"
    assert not [note for note in plan.notes if "stays" in note]
    short = mg.prune_channels(model.eval(), tokens(2, 5), HALF, round_to=1, exclude=["e"], dynamic=())
    assert mg.graph.plan_of(short).kept == plan.kept  # the same cut, traced at another length
    torch.testing.assert_close(small(tokens(2, 5)), short(tokens(2, 5)))
    for shape in ((3, 8), (2, 13), (1, 3)):
        assert small(tokens(*shape)).shape == (*shape, 5)


def test_a_saved_graph_keeps_its_free_length(tmp_path):
    torch.manual_seed(0)
    small = pruned(Attention(), (0, 1))
    mg.save(small, tmp_path / "s")
    again = mg.load(tmp_path / "s", Attention())
    torch.testing.assert_close(again(tokens(3, 13)), small(tokens(3, 13)))


def test_a_saved_graph_names_the_class_to_load_it_into(tmp_path):
    torch.manual_seed(0)
    mg.save(pruned(Attention(), (0,)), tmp_path / "s")
    with pytest.raises(FileError, match="does not say how to build its Attention: pass a freshly built one"):
        mg.load(tmp_path / "s")


def test_a_length_that_the_code_fixes_is_named():
    small = pruned(Attention(length=8), (0, 1))
    text = "Dimension 1 of the input ids stays 8, as in the example: the model's own code fixes it."
    assert text in mg.graph.plan_of(small).notes
    assert small(tokens(3, 8)).shape == (3, 8, 5)


def test_a_length_that_was_not_asked_stays_fixed():
    small = pruned(Attention(), (0,))
    assert small(tokens(3, 8)).shape == (3, 8, 5)
    with pytest.raises((RuntimeError, ValueError)):
        small(tokens(2, 13))


# ---------------------------------------------------------------------------------------------- what transformers saves
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


@needs_transformers
@pytest.mark.parametrize(
    ("build", "exclude"),
    [(llama, EXCLUDED), (bert, ["*embeddings*", "*attention*", "*pooler*", "classifier"])],
)
def test_even_hidden_widths_go_through_transformers_own_saving(tmp_path, build, exclude):
    ids = tokens(2, 8)
    small = mg.prune_channels(build(), {"input_ids": ids}, HALF, round_to=1, exclude=exclude)
    assert small.config.intermediate_size == 32
    small.save_pretrained(tmp_path / "hf")
    again = type(small).from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, small(input_ids=ids).logits, rtol=0, atol=0)
    mg.save(small, tmp_path / "mg")
    loaded = mg.load(tmp_path / "mg", build())
    assert loaded.config.intermediate_size == 32
    loaded.save_pretrained(tmp_path / "hf2")
    again = type(small).from_pretrained(tmp_path / "hf2").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, small(input_ids=ids).logits, rtol=0, atol=0)


@needs_transformers
def test_widths_that_differ_between_layers_are_listed_for_transformers_does_not_build_them(tmp_path):
    small = mg.prune_channels(llama(), {"input_ids": tokens(2, 8)}, HALF, scope="global", exclude=EXCLUDED, round_to=1)
    widths = [layer.mlp.gate_proj.out_features for layer in small.model.layers]
    assert widths[0] != widths[1]
    small.save_pretrained(tmp_path / "hf")  # opened in test_hugging_face.py
    listed = json.loads((tmp_path / "hf" / "config.json").read_text())["microglia"]["shapes"]
    assert [listed[f"model.layers.{i}.mlp.gate_proj.weight"][0] for i in range(len(widths))] == widths
    mg.save(small, tmp_path / "mg")
    again = mg.load(tmp_path / "mg", llama())
    assert [layer.mlp.gate_proj.out_features for layer in again.model.layers] == widths
    if hasattr(small.config, "per_layer_config"):  # where its models follow it, `fitting_fields` can use it
        config = llama().config
        config.per_layer_config = {i: {"intermediate_size": width} for i, width in enumerate(widths)}
        with pytest.raises(Exception, match="intermediate_size"):
            transformers.LlamaForCausalLM(config)


@needs_transformers
def test_widths_that_no_configuration_says_are_refused_in_a_sentence(tmp_path):
    ids = tokens(2, 8)
    dense = bert()
    small = mg.prune_channels(dense, {"input_ids": ids}, mg.Budget(params=0.6), round_to=1)
    mg.save(small, tmp_path / "mg")
    part = small.bert  # not the whole, which lists the sizes of its tensors
    again = mg.load(tmp_path / "mg", bert())
    for model in (small, again):
        model.bert.encoder.layer[0].attention.self.num_attention_heads += 1  # no list of sizes says this
    for model in (small, part, again):
        with pytest.raises(FileError, match=r"BertForSequenceClassification cannot say the widths.*microglia.save"):
            model.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    dense.save_pretrained(tmp_path / "dense")  # the model that was given is as it was
    assert dense.config.intermediate_size == 64
