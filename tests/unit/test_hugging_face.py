"""Layers that differ in width, in directories of transformers: sizes are data, checked, and read after one import."""

import copy
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

import microglia as mg
from microglia.core.errors import FileError

if importlib.util.find_spec("transformers"):
    from microglia.zoo.external import declare_operators

    declare_operators()
    import transformers

    from microglia.hugging_face import SizedConfig, base_config
else:
    pytest.skip("transformers is not installed", allow_module_level=True)

IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def llama(**options):
    torch.manual_seed(0)
    config = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **options})).eval()


def widths(model):
    layers = getattr(model, "model", model).layers
    return [(layer.mlp.gate_proj.out_features, layer.self_attn.q_proj.out_features) for layer in layers]


def generated(model):
    return model.generate(IDS, max_new_tokens=6, do_sample=False)


@pytest.fixture(scope="module")
def small():
    model = llama()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):  # weak heads in one layer, weak units in another
            layer.self_attn.o_proj.weight[:, : 8 * i] *= 0.01
            layer.mlp.down_proj.weight[:, : 10 * i] *= 0.01
    found = mg.prune_channels(model, {"input_ids": IDS}, mg.Budget(params=0.8), scope="global", exclude=["*embed*"], round_to=1)
    assert all(len(set(sizes)) > 1 for sizes in zip(*widths(found), strict=True))
    return found


@pytest.fixture(scope="module")
def directory(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "small"
    small.save_pretrained(path)
    return path


READER = """
import sys, torch
from microglia.zoo.external import declare_operators
declare_operators()
import transformers
directory = sys.argv[1]
try:
    transformers.AutoModelForCausalLM.from_pretrained(directory)
except ValueError as error:
    assert "microglia" in str(error), error
else:
    raise AssertionError("plain transformers opened it")
try:
    transformers.LlamaForCausalLM.from_pretrained(directory)
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error), error
else:
    raise AssertionError("plain transformers opened it")
import microglia.hugging_face
model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
assert type(model) is transformers.LlamaForCausalLM and model.config.model_type == "llama"
ids = torch.load(f"{directory}/../ids.pt")
with torch.no_grad():
    torch.save((model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)), f"{directory}/../outputs.pt")
"""


def test_another_process_opens_it_after_one_import(small, directory):
    torch.save(IDS, directory.parent / "ids.pt")
    done = subprocess.run([sys.executable, "-c", READER, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    logits, ids = torch.load(directory.parent / "outputs.pt")
    assert torch.equal(logits, small(IDS).logits)
    assert torch.equal(ids, generated(small))


def test_every_auto_class_builds_the_sizes(small, directory):
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    assert widths(whole) == widths(small)
    assert whole.config.microglia["shapes"]["model.layers.2.mlp.gate_proj.weight"] == [widths(small)[2][0], 32]
    body = transformers.AutoModel.from_pretrained(directory).eval()
    assert type(body) is transformers.LlamaModel
    assert torch.equal(body(IDS)[0], small.model(IDS)[0])
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)
    assert (widths(judge), judge.score.out_features) == (widths(small), 3)
    fresh = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    assert widths(fresh) == widths(small)
    with pytest.raises(FileError, match="AutoModelForImageClassification has no class for the architecture 'llama'"):
        transformers.AutoModelForImageClassification.from_pretrained(directory)


def test_what_was_opened_or_copied_is_saved_again(small, directory, tmp_path):
    again = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    again.save_pretrained(tmp_path / "bf16")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert (third.dtype, widths(third)) == (torch.bfloat16, widths(small))
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.lm_head.weight += 1
    other.save_pretrained(tmp_path / "copy")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval()
    assert torch.equal(found(IDS).logits, other(IDS).logits)
    mg.save(small, tmp_path / "mg")
    loaded = mg.load(tmp_path / "mg", llama())
    loaded.save_pretrained(tmp_path / "loaded")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "loaded").eval()
    assert torch.equal(found(IDS).logits, small(IDS).logits)


def test_shared_weights_and_layers_that_left_come_back(tmp_path):
    dense = mg.graph.keep_blocks(llama(tie_word_embeddings=True), "model.layers", [0, 2])
    found = mg.prune_channels(dense, {"input_ids": IDS}, mg.Budget(params=0.8), scope="global", round_to=1)
    assert found.model.embed_tokens.weight.shape[1] < 32  # the residual stream lost channels
    found.save_pretrained(tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(IDS).logits, found(IDS).logits)


def changed(directory, path, change):
    """Returns a copy of a directory whose sizes are changed."""
    path.mkdir()
    for file in directory.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    content = json.loads((path / "config.json").read_text())
    change(content["microglia"])
    (path / "config.json").write_text(json.dumps(content))
    return path


GATE = "model.layers.2.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda own: own.update(version=2), "no sizes of version 1"),
        (lambda own: own.pop("shapes"), "no sizes of version 1"),
        (
            lambda own: own.update(architecture="os.system"),
            "'os.system', which this transformers does not have",
        ),
        (lambda own: own.update(architecture="microglia"), "the architecture 'microglia'"),
        (
            lambda own: own["shapes"].update({GATE: [10**9, 32]}),
            r"the shape \[1000000000, 32\].* \[48, 32\]",
        ),
        (lambda own: own["shapes"].update({GATE: [0, 32]}), r"the shape \[0, 32\], which is no part"),
        (lambda own: own["shapes"].update({GATE: [8]}), r"the shape \[8\], which is no part"),
        (lambda own: own["shapes"].update({GATE: ["8", 32]}), r"which is no part of \[48, 32\]"),
        (lambda own: own["shapes"].update({"model.evil": [1]}), "tensors that LlamaForCausalLM does not have"),
        (lambda own: own["shapes"].update({GATE: [1, 32]}), "do not have the sizes of its config.json"),
        (lambda own: own["shapes"].pop(GATE), "do not have the sizes of its config.json"),
    ],
)
def test_wrong_sizes_are_refused_in_one_sentence(directory, tmp_path, change, text):
    with pytest.raises(FileError, match=text) as raised:
        transformers.AutoModelForCausalLM.from_pretrained(changed(directory, tmp_path / "x", change))
    assert "\n" not in str(raised.value)


def test_no_code_is_read(directory, tmp_path):
    path = changed(directory, tmp_path / "x", lambda own: None)
    content = json.loads((path / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (path / "config.json").write_text(json.dumps(content))
    (path / "evil.py").write_text("raise SystemExit(1)\n")
    config = base_config(transformers.AutoConfig.from_pretrained(path, trust_remote_code=True))
    assert not hasattr(config, "auto_map")
    transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


def test_what_the_sizes_do_not_say_is_refused(small, tmp_path):
    other = copy.deepcopy(small)
    other.model.layers[0].self_attn.num_key_value_groups = 1
    with pytest.raises(FileError, match=r"LlamaForCausalLM cannot say the widths.*microglia.save"):
        other.save_pretrained(tmp_path / "x")
    with pytest.raises(FileError, match="upload the directory later"):
        small.save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not (tmp_path / "x").exists()
    assert SizedConfig.model_type == "microglia"
