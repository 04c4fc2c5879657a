"""Sentence embeddings: the dense model is its own target, pruning moves away from it, text of data sets is read."""

import importlib.util

import pytest
import torch
from torch.nn import functional

import microglia as mg
from microglia.core.errors import DataError, MicrogliaError
from microglia.data.text import read_text
from microglia.methods import Layerwise
from microglia.tasks import embedding_task
from microglia.tasks.embedding import embedding, fidelity, sentences_of

if not importlib.util.find_spec("transformers"):
    pytest.skip("transformers is not installed", allow_module_level=True)

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "red",
    "green",
    "blue",
    "dog",
    "cat",
    "bird",
    "runs",
    "sleeps",
    "eats",
    "the",
    "a",
    "in",
    "on",
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny BERT with a tokenizer of words, and a text."""
    from microglia.zoo.external import declare_operators

    declare_operators()
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "."]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (7,), generator=generator)) + "." for _ in range(120)]
    text = folder / "text.txt"
    text.write_text("\n".join(lines))
    return folder, text


def task_of(places, **options):
    folder, text = places
    return embedding_task(f"hf:{folder}", text=str(text), **{"length": 12, **options})


def test_the_dense_model_is_as_near_as_can_be_and_pruning_is_less(places, tmp_path):
    task = task_of(places)
    found = mg.evaluate(task.build(), task)
    assert found == pytest.approx({"cosine": 1, "ranks": 1, "neighbours": 1}, abs=1e-5)
    batches = [inputs for inputs, _ in task.data.batches("train", 16, seed=0, shuffle=True).epoch(0)]
    near = {}
    for rule in ("magnitude", "sparsegpt"):
        model = task.build()
        Layerwise(model, batches, rule=rule, density=0.5).prune()
        near[rule] = mg.evaluate(model, task)["cosine"]
    assert near["magnitude"] < near["sparsegpt"] < 1
    task.deliver(model, tmp_path)
    from transformers import AutoModel

    again = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(embedding(again, task.example), embedding(model.eval(), task.example))


def test_padding_changes_no_embedding(places):
    short, long = task_of(places), task_of(places, length=20)
    one, other = (embedding(t.build(), t.data.test.inputs(slice(0, 4))) for t in (short, long))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(4))


def test_fidelity_counts_ranks_and_neighbours():
    dense = functional.normalize(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double())[0].float()
    assert fidelity(dense @ turned, dense) == pytest.approx({"ranks": 1, "neighbours": 1}, abs=0.05)
    other = fidelity(dense.flip(0), dense)
    assert other["ranks"] < 0.5
    assert other["neighbours"] < 0.9


def test_sentences_are_cut_joined_and_counted_once():
    text = "One two three four. Short one.\nA line goes\non here now! One two three four.\n\nA heading without an end"
    assert sentences_of(text) == ["One two three four.", "A line goes on here now!", "A heading without an end"]


def test_text_of_a_data_set(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.txt").write_text("first line\nsecond line\n")
    (tmp_path / "test.txt").write_text("third line\n")
    assert read_text(f"hf:{tmp_path}") == "first line\n\nsecond line"
    assert read_text(f"hf:{tmp_path},default,test") == "third line"
    with pytest.raises(DataError, match=r"has the splits .* not 'dev'"):
        read_text(f"hf:{tmp_path},default,dev")


@pytest.mark.parametrize(
    ("model", "settings", "match"),
    [
        ("timm:resnet18", {}, "take hf:NAME_OR_FOLDER"),
        ("hf:x", {"text": ""}, "give text=FILE"),
    ],
)
def test_wrong_input_ends_in_one_sentence(places, model, settings, match):
    with pytest.raises(MicrogliaError, match=match) as raised:
        embedding_task(model, **{"text": str(places[1]), **settings})
    assert "\n" not in str(raised.value)


def test_too_few_sentences_end_in_one_sentence(places, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("the dog sleeps on the cat.")
    with pytest.raises(DataError, match="at least two sentences"):
        embedding_task(f"hf:{places[0]}", text=str(short))
