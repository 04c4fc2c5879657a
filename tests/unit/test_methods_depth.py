"""Depth: block influence, blocks that leave, caches that still work, files that come back."""

import importlib.util

import pytest
import torch
from torch import nn

import microglia as mg
from microglia.core.errors import BudgetError, FileError, MicrogliaError, SelectorError
from microglia.graph import Depth, depth_of, keep_blocks
from microglia.methods import block_influence, drop_blocks
from microglia.storage.changes import changes_of

if importlib.util.find_spec("transformers"):
    from microglia.zoo.external import declare_operators

    declare_operators()
    import transformers
else:
    transformers = None
needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")


class Block(nn.Module):
    """A residual block that turns its input by a fixed share."""

    def __init__(self, share):
        super().__init__()
        self.linear, self.share = nn.Linear(8, 8, bias=False), share

    def forward(self, x):
        return x + self.share * self.linear(x)


class Net(nn.Module):
    """A stem, four blocks of growing and falling influence, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(share) for share in (0.0, 1.0, 0.0, 0.2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(count=2):
    return [torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_influence_is_one_minus_the_mean_cosine():
    model = Net().eval()
    found = block_influence(model, batches())
    with torch.no_grad():
        x = model.stem(torch.cat(batches()))
        for block, value in zip(model.blocks, found, strict=True):
            y = block(x)
            torch.testing.assert_close(
                1 - nn.functional.cosine_similarity(x, y, dim=-1).double().mean(), value, atol=1e-6, rtol=0
            )
            x = y
    assert found[2] < 1e-6 < found[3] < found[1]
    pairs = block_influence(model, batches(), run=2)
    assert len(pairs) == 3
    torch.testing.assert_close(pairs[0], found[1], atol=1e-6, rtol=0)  # the first block changes nothing


def test_a_block_that_is_the_identity_leaves_without_a_trace(tmp_path):
    model = Net().eval()
    small = drop_blocks(model, batches(), keep=3)
    assert depth_of(small) == Depth("blocks", (0, 1, 3), 4)
    assert len(model.blocks) == 4
    x = batches()[0]
    torch.testing.assert_close(small(x), model(x))
    mg.save(small, tmp_path / "s")
    again = mg.load(tmp_path / "s", Net())
    assert torch.equal(again(x), small(x))
    assert depth_of(again) == depth_of(small)
    assert list(changes_of(again)) == ["depth"]
    other = Net()
    del other.blocks[3]
    with pytest.raises(FileError, match="4 blocks in blocks; this one has 3"):
        mg.load(tmp_path / "s", other)


def test_blocks_leave_twice_and_masks_and_cuts_come_after(tmp_path):
    model = keep_blocks(keep_blocks(Net(), "blocks", [0, 1, 3]), "blocks", [0, 2])
    assert depth_of(model) == Depth("blocks", (0, 3), 4)
    mg.methods.OneShot(model, density=0.5)
    mg.save(model, tmp_path / "s")
    again = mg.load(tmp_path / "s", Net())
    assert mg.masks_of(again).same(mg.masks_of(model))
    x = batches()[0]
    assert torch.equal(again(x), model(x))
    small = mg.prune_channels(keep_blocks(Net(), "blocks", [1, 3]), x, mg.Budget(density=0.5), round_to=1)
    mg.save(small, tmp_path / "t")
    assert torch.equal(mg.load(tmp_path / "t", Net())(x), small(x))
    with pytest.raises(SelectorError, match="This model is shrunk"):
        keep_blocks(small, "blocks", [0])


def test_a_run_leaves_together():
    small = drop_blocks(Net().eval(), batches(), keep=2, consecutive=True)
    assert depth_of(small).kept == (0, 1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: drop_blocks(Net(), batches(), keep=0), BudgetError, "1 to 4 here; got 0"),
        (lambda: drop_blocks(Net(), [], keep=2), MicrogliaError, "give at least one"),
        (lambda: keep_blocks(Net(), "blocks", [2, 1]), SelectorError, "ascending numbers from 0 to 3"),
        (lambda: keep_blocks(Net(), "blocks", [4]), SelectorError, "ascending numbers from 0 to 3"),
        (lambda: keep_blocks(Net(), "layers", [0]), SelectorError, "'layers' is no nn.ModuleList"),
        (lambda: block_influence(Net(), batches(), run=5), BudgetError, "1 to 4 long"),
        (lambda: Depth.from_dict({"blocks": "blocks", "kept": [1, 9], "of": 4}), FileError, "rising numbers below 4"),
    ],
)
def test_wrong_input_ends_in_one_sentence(call, error, text):
    with pytest.raises(error, match=text) as raised:
        call()
    assert "\n" not in str(raised.value)


def llama(**options):
    torch.manual_seed(0)
    config = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **options})).eval()


def windows():
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids}]


@needs_transformers
def test_a_decoder_generates_with_its_cache_and_transformers_reads_it(tmp_path):
    small = drop_blocks(llama(), windows(), keep=2)
    assert small.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    ids = windows()[0]["input_ids"]
    for length in (1, 7, 30):
        with_cache = small.generate(ids[:, :length], max_new_tokens=8, do_sample=False)
        without = small.generate(ids[:, :length], max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(with_cache, without)
    small.save_pretrained(tmp_path / "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.equal(again(ids).logits, small(ids).logits)
    mg.save(small, tmp_path / "mg")
    loaded = mg.load(tmp_path / "mg", llama())
    assert torch.equal(loaded(ids).logits, small(ids).logits)
    assert loaded.config.num_hidden_layers == 2


@needs_transformers
def test_lists_of_a_configuration_follow():
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        use_sliding_window=True, sliding_window=4, max_window_layers=2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    small = keep_blocks(model, "model.layers", [1, 3])
    assert small.config.layer_types == [model.config.layer_types[1], model.config.layer_types[3]]
    assert len(model.config.layer_types) == 4
