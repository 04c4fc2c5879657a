"""Causal language modelling: windows, perplexity, transformers' models in and out, the command line, wrong input."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import fresh
import microglia as mg
from microglia.cli.app import app
from microglia.core.errors import MicrogliaError
from microglia.data.text import IGNORED, Windows, read_text
from microglia.lab.recipe import resolve
from microglia.tasks.language import language_task, next_token_losses
from microglia.zoo.language import BYTES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is missing")
LENGTH = 32
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a tiny Llama (grouped queries, tied head) of bytes, without a tokenizer."""
    from microglia.zoo.external import import_torchvision

    import_torchvision()
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def task_of(folder, text, **options):
    return language_task(f"hf:{folder}", text=str(text), tokenizer=BYTES, **{"length": LENGTH, **options})


def test_windows_cover_every_token_once():
    tokens = torch.arange(103)
    whole = Windows(tokens, 10, 10)
    assert len(whole) == 10
    assert torch.equal(torch.cat([whole[i][1] for i in range(10)]), tokens[:100])
    sliding = Windows(tokens, 10, 3)
    assert len(sliding) == 32
    counted = torch.cat([labels[1:][labels[1:] != IGNORED] for _, labels in (sliding[i] for i in range(32))])
    assert torch.equal(counted, tokens[1:103])  # each predicted once, the first never
    assert torch.equal(sliding[5][0]["input_ids"], tokens[15:25])


@pytest.mark.parametrize("stride", [None, 8])
def test_perplexity_is_that_of_its_definition(folder, text, stride):
    task = task_of(folder, text, stride=stride)
    model = task.build()
    found = mg.evaluate(model, task)
    data, losses = task.data.test, []
    with torch.no_grad():
        for index in range(len(data)):
            ids = data[index][0]["input_ids"]
            logits = model(input_ids=ids[None]).logits[0]
            each = functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
            losses.append(each if index == 0 or stride is None else each[-stride:])
    mean = float(torch.cat(losses).double().mean())
    assert found["loss"] == pytest.approx(mean, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5)  # a token is a byte
    assert task.headline == "perplexity"
    assert (task.metrics["perplexity"].better, task.metrics["perplexity"].unit) == ("lower", "")


def test_without_overlap_the_loss_is_the_plain_mean_over_windows(folder, text):
    task = task_of(folder, text)
    model = task.build()
    windows = [task.data.test[i] for i in range(len(task.data.test))]
    with torch.no_grad():
        means = [next_token_losses(model(input_ids=x["input_ids"][None]).logits, y[None]).mean().double() for x, y in windows]
    assert mg.evaluate(model, task)["loss"] == pytest.approx(float(torch.stack(means).mean()), rel=1e-6)


def test_a_run_ends_in_a_directory_that_transformers_reads(folder, text, tmp_path):
    out = tmp_path / "run"
    recipe = resolve(
        {
            "model": f"hf:{folder}",
            "task": {"kind": "language", "text": str(text), "tokenizer": BYTES, "length": LENGTH},
            "method": "sparsegpt",
            "prune": {"pattern": "nm:2:4", "score_batches": 4},
            "measure": {"latency": False},
        }
    )
    result = mg.execute(recipe, out)
    assert result["headline"] == "perplexity"
    assert result["masks"]["kept"] * 2 == result["masks"]["total"]
    assert {row["rule"] for row in result["layerwise"]["layers"]} == {"sparsegpt"}
    assert set(result["pruned"]["metrics"]) == {"perplexity", "loss", "bits_per_byte"}
    assert json.loads((out / "microglia.json").read_text())["kept"] == result["masks"]["kept"]
    config = json.loads((out / "config.json").read_text())
    assert not {"sparsity_config", "quantization_config"} & set(config)
    ids = torch.arange(20)[None]
    script = (
        "import sys, torch\n"
        "try:\n    import torchvision\n"
        "except RuntimeError:\n"
        "    library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "    for name in ('nms', 'qnms'):\n"
        "        library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "except ImportError:\n    pass\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "assert model.lm_head.weight is model.model.embed_tokens.weight\n"
        "assert not any(name.startswith('microglia') for name in sys.modules)\n"
        "torch.save(model(input_ids=torch.arange(20)[None]).logits.detach(), sys.argv[2])\n"
    )
    read = tmp_path / "logits.pt"
    done = fresh.run(script, out, read)
    assert done.returncode == 0, done.stderr
    loaded = mg.load(out / "model", task_of(folder, text).build()).eval()
    with torch.no_grad():
        assert torch.equal(torch.load(read), loaded(input_ids=ids).logits)
    again = mg.execute(recipe, out)
    assert again == result


def test_the_command_line_prunes_a_language_model(folder, text, tmp_path):
    words = ["prune", f"hf:{folder}", "--task", "language", "--text", str(text), "--method", "wanda", "--density", "0.5"]
    words += [
        "--out",
        str(tmp_path / "run"),
        "task.tokenizer=bytes",
        f"task.length={LENGTH}",
        "measure.latency=false",
        "--json",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "model.safetensors").exists()
    shown = json.loads(done.stdout)
    assert shown["recipe"]["task"]["kind"] == "language"
    assert shown["masks"]["kept"] * 2 == shown["masks"]["total"]


def test_recovery_and_distillation_train_with_masks_fixed(folder, text, tmp_path):
    source = {
        "model": f"hf:{folder}",
        "task": {"kind": "language", "text": str(text), "tokenizer": BYTES, "length": LENGTH},
        "method": "sparsegpt",
        "prune": {"density": 0.3, "score_batches": 4},
        "train": {"epochs": 2, "batch_size": 16, "optimizer": "adamw", "lr": 0.003, "distill": 0.3},
        "measure": {"latency": False},
    }
    result = mg.execute(resolve(source), tmp_path / "run")
    assert result["pruned"]["metrics"]["perplexity"] < result["before"]["metrics"]["perplexity"]
    assert result["masks"]["kept"] == round(0.3 * result["masks"]["total"])


class Bigram(nn.Module):
    """A model of one's own: tokens to logits."""

    def __init__(self, classes):
        super().__init__()
        self.embedding = nn.Embedding(classes, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, classes)

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        return self.head(hidden)


def test_a_model_of_ones_own_reads_bytes(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_language", sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], "bigram", Bigram, raising=False)
    task = language_task("own_language:bigram", text=str(text), tokenizer=BYTES, length=16)
    assert not task.pretrained
    assert mg.evaluate(task.build(), task)["perplexity"] > 1
    task.deliver(task.build(), tmp_path)
    assert not (tmp_path / "microglia.json").exists()


def test_the_text_of_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.py").write_text("no text")
    assert read_text(tmp_path) == "first\n\nsecond"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokenizer": "auto"}, "holds no tokenizer that transformers reads"),
        ({"length": 5000}, r"has 3,\d+ tokens, fewer than one window of 5,000"),
        ({"length": 64, "text": "{short}"}, "The training text has"),
        ({"text": "{nowhere}"}, "There is no text"),
        ({"text": "{empty}"}, "has no text files"),
        ({"text": ""}, "reads a text: give text=FILE"),
        ({"text": "{binary}"}, "cannot be read as UTF-8"),
        ({"stride": 33}, "a stride from 1 to its length"),
        ({"length": 65}, "longer than the 64 that the model reads"),
        ({"model": "resnet20"}, "takes hf:NAME_OR_FOLDER or package.module:function"),
        ({"model": "hf:{empty}"}, "cannot be built"),
    ],
)
def test_wrong_input_ends_in_one_sentence(folder, text, tmp_path, options, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    places = {"short": "short.txt", "binary": "binary.txt", "nowhere": "nowhere.txt", "empty": "empty"}
    paths = {name: str(tmp_path / file) for name, file in places.items()}
    given = {key: value.format(**paths) if isinstance(value, str) else value for key, value in options.items()}
    model = given.pop("model", f"hf:{folder}")
    with pytest.raises(MicrogliaError, match=said) as raised:
        language_task(model, **{"text": str(text), "tokenizer": BYTES, "length": LENGTH, **given}).build()
    assert "\n" not in str(raised.value)


def test_a_token_beyond_the_vocabulary_ends_in_one_sentence(folder, tmp_path, text, monkeypatch):
    monkeypatch.setattr("microglia.zoo.language.Bytes.encode", lambda self, text: [300] * len(text))
    with pytest.raises(MicrogliaError, match="has the token 300, and the model knows 256"):
        task_of(folder, text).build()
