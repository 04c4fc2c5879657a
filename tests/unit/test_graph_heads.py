"""Heads of a decoder: whole key-value groups leave, the configuration follows, the cache works at any length."""

import importlib.util

import pytest
import torch

import microglia as mg

if not importlib.util.find_spec("transformers"):
    pytest.skip("transformers is not installed", allow_module_level=True)

from microglia.zoo.external import declare_operators

declare_operators()
import transformers  # noqa: E402

IDS = {"input_ids": torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))}


def decoder(kind="Llama", **options):
    torch.manual_seed(0)
    config = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
        "tie_word_embeddings": True, "head_dim": 8, **options,
    }  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
    return model.eval()


@pytest.mark.parametrize(("kind", "exclude"), [("Llama", []), ("Qwen3", ["*mlp*"])])
def test_groups_of_heads_leave_and_transformers_reads_the_rest(tmp_path, kind, exclude):
    exclude = ["*embed_tokens*", "lm_head", *exclude]
    small = mg.prune_channels(decoder(kind), IDS, mg.Budget(density=0.5), round_to=1, exclude=exclude)
    if "*mlp*" in exclude:
        attention, config = small.model.layers[0].self_attn, small.config
        assert attention.q_proj.out_features < 64
        assert config.num_attention_heads * 8 == attention.q_proj.out_features
        assert config.num_key_value_heads * 8 == attention.k_proj.out_features
        assert config.num_attention_heads == 2 * config.num_key_value_heads
        assert config.head_dim == 8
    for length in (1, 40):
        ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(length))
        made = [small.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*made)
    small.save_pretrained(tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(again(**IDS).logits, small(**IDS).logits)
    static = again.generate(IDS["input_ids"], max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, small.generate(IDS["input_ids"], max_new_tokens=6, do_sample=False))
    mg.save(small, tmp_path / "mg")
    loaded = mg.load(tmp_path / "mg", decoder(kind))
    assert torch.equal(loaded(**IDS).logits, small(**IDS).logits)
    assert loaded.config.num_attention_heads == small.config.num_attention_heads


def test_depth_and_heads_together(tmp_path):
    small = mg.methods.drop_blocks(decoder(num_hidden_layers=3), [IDS], keep=2)
    small = mg.prune_channels(small, IDS, mg.Budget(density=0.5), round_to=1, exclude=["*embed_tokens*", "lm_head", "*mlp*"])
    small.save_pretrained(tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(again(**IDS).logits, small(**IDS).logits)
    mg.save(small, tmp_path / "mg")
    loaded = mg.load(tmp_path / "mg", decoder(num_hidden_layers=3))
    assert torch.equal(loaded(**IDS).logits, small(**IDS).logits)
