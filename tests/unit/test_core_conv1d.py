"""Weights laid out (in, out), as those of transformers' Conv1D: every method prunes them as it prunes a linear twin's."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import PatternError
from microglia.core.kinds import kind_of
from microglia.core.layers import oriented
from microglia.core.patterns import Block
from microglia.core.shuffle import shuffled
from microglia.measure.macs import count_macs
from microglia.measure.parameters import count_parameters
from microglia.methods import Acdc, Awg, Pas, Pdp, Smart, SparseTraining
from microglia.scores.inputs import mean_inputs

STEPS = 6


class Conv1D(nn.Module):
    """transformers' layer as it stands, named like it, so that these tests need no transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf) / 10)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view((*x.size()[:-1], self.nf))


Conv1D.__module__ = "transformers.pytorch_utils"


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c_fc, self.c_proj, self.head = Conv1D(24, 12), Conv1D(12, 24), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.c_proj(torch.relu(self.c_fc(x))))


def twin(model: nn.Module) -> nn.Module:
    """Returns a copy whose Conv1D layers are linear ones that compute the same."""
    same = copy.deepcopy(model)
    for name in ("c_fc", "c_proj"):
        old: Any = getattr(same, name)
        new = nn.Linear(old.nx, old.nf)
        new.weight, new.bias = nn.Parameter(old.weight.detach().T.contiguous()), nn.Parameter(old.bias.detach().clone())
        setattr(same, name, new)
    return same


def turned(masks: mg.core.masks.MaskSet) -> mg.core.masks.MaskSet:
    return mg.core.masks.MaskSet({n: m.T if n.startswith("c_") else m for n, m in masks.items()})


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 12, generator=generator), torch.randint(5, (8,), generator=generator)


def evidence() -> mg.scores.Evidence:
    return mg.scores.Evidence([batch()], functional.cross_entropy, generator=torch.Generator().manual_seed(0))


CHOICES: list[dict[str, Any]] = [
    {"density": 0.4},
    {"density": 0.4, "scope": "row"},
    {"density": 0.4, "scope": "erk", "pattern": "block:4x2"},
    {"density": 0.4, "pattern": "block:5x3", "scope": "layer"},
    {"density": 0.4, "pattern": "channel", "exclude": ["head"]},
    {"density": 0.4, "pattern": "channel", "reduction": "l2", "protect": ["head"]},
    {"pattern": "nm:2:4"},
    {"density": 0.4, "pattern": "block:4x1", "score": "snip"},
    {"density": 0.4, "pattern": "block:4x1", "score": "synflow"},
    {"density": 0.4, "scope": {"c_fc.weight": 0.5, "c_proj.weight": 0.25, "head.weight": 1.0}},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_one_shot_masks_are_those_of_the_linear_twin(choice: dict[str, Any]) -> None:
    choice = {k: v for k, v in choice.items() if k != "density" or not isinstance(choice.get("scope"), dict)}
    model = Mlp()
    other = twin(model)
    found = mg.methods.OneShot(model, evidence=evidence(), **choice).masks
    wanted = mg.methods.OneShot(other, evidence=evidence(), **choice).masks
    assert found["c_fc.weight"].shape == (12, 24)
    assert 0 < found.kept < found.total
    assert turned(found).same(wanted)
    again = mg.methods.OneShot(model, evidence=evidence(), **choice).masks  # what is masked stays masked
    assert again.nested_in(found)
    torch.testing.assert_close(model(batch()[0]), other(batch()[0]), rtol=0, atol=1e-6)


def test_a_channel_is_an_output_of_the_layer() -> None:
    model = Mlp()
    mg.methods.OneShot(model, density=0.5, pattern="channel", layers=["c_fc"])
    with torch.no_grad():
        model.c_fc.bias.zero_()
    silent = model.c_fc(batch()[0]).abs().amax(0) == 0
    assert int(silent.sum()) == 12


def test_a_pattern_that_fits_no_layer_is_told_by_its_true_sides() -> None:
    with pytest.raises(PatternError, match=r"c_fc\.weight with 24 x 12"):
        mg.methods.OneShot(Mlp(), density=0.5, pattern="block:16x16", layers=["c_fc"])


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        (k, p)
        for k in (mg.methods.Gradual, Smart, Pdp, Pas, Awg, Acdc)
        for p in ("unstructured", "block:4x2", "nm:2:4")
        if (k, p[:2]) != (Pas, "nm")
    ],
    ids=str,
)
def test_training_with_masks_is_that_of_the_linear_twin(kind: Any, pattern: str) -> None:
    x, y = batch()
    settings = {"pattern": pattern, "total_steps": STEPS} | ({} if pattern.startswith("nm") else {"density": 0.4})
    if kind is Acdc:
        settings |= {"compress": (0.1, 0.7), "decompress": (0.4,)}
    if kind is Awg:
        settings |= {"updates": 2}
    if kind is Smart:
        settings |= {"init": "magnitude"}
    ends = []
    for model in (Mlp(), twin(Mlp())):
        pruner = kind(model, evidence=evidence(), **settings)
        own = pruner.param_groups()
        scores = {id(p) for group in own for p in group["params"]}
        optimizer = torch.optim.SGD([{"params": [p for p in model.parameters() if id(p) not in scores]}, *own], lr=0.05)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (functional.cross_entropy(model(x), y) + pruner.penalty()).backward()
            optimizer.step()
            pruner.step(optimizer)
        ends.append((pruner.finish(), model(x).detach()))
    (found, here), (wanted, there) = ends
    assert 0 < found.kept < found.total
    assert turned(found).same(wanted)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)


def test_sparse_training_moves_their_weights() -> None:
    model, (x, y) = Mlp(), batch()
    pruner = SparseTraining(model, density=0.3, total_steps=4, every=2, until=1.0, evidence=evidence())
    first, optimizer = pruner.masks, torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        if not pruner.replaces_step():
            optimizer.step()
        pruner.step(optimizer)
    assert pruner.masks.kept == first.kept
    assert not torch.equal(pruner.masks["c_fc.weight"], first["c_fc.weight"])


def test_inputs_are_measured_along_their_own_dimension() -> None:
    model = Mlp()
    other = twin(model)
    found, wanted = (mean_inputs(m, mg.core.layers.prunable_layers(m), evidence()) for m in (model, other))
    for name in ("c_fc.weight", "c_proj.weight"):
        mine, theirs = (
            values[name].expand(mg.core.layers.prunable_layers(m)[name].shape)
            for m, values in ((model, found), (other, wanted))
        )
        torch.testing.assert_close(mine.T, theirs)


def test_counts_are_those_of_the_linear_twin() -> None:
    model = Mlp()
    other = twin(model)
    for each in (model, other):
        mg.methods.OneShot(each, density=0.25, layers=["c_fc", "c_proj"])
    found, wanted = (count_macs(m, batch()[0]) for m in (model, other))
    assert found.total == wanted.total == 2 * 12 * 24 + 12 * 5
    assert found.to_dict() == wanted.to_dict()
    assert found.effective < found.total
    assert count_parameters(model).to_dict() == count_parameters(other).to_dict()


def test_fold_save_and_load_keep_the_masks(tmp_path: Any) -> None:
    model, x = Mlp(), batch()[0]
    mg.methods.OneShot(model, density=0.4, pattern="block:4x2")
    wanted, masks = model(x).detach(), mg.masks_of(model)
    mg.save(model, tmp_path / "model")
    back = mg.load(tmp_path / "model", Mlp())
    assert mg.masks_of(back).same(masks)
    assert torch.equal(back(x), wanted)
    mg.fold(model)
    assert torch.equal(model(x), wanted)
    assert torch.equal(model.c_fc.weight != 0, masks["c_fc.weight"])
    assert list(model.state_dict()) == list(Mlp().state_dict())


def test_dead_units_of_a_masked_mlp_are_removed_and_the_outputs_stay() -> None:
    model, x = Mlp().double(), batch()[0].double()
    mg.methods.OneShot(model, density=0.5, pattern="channel", layers=["c_fc"])
    with torch.no_grad():
        model.c_fc.bias.masked_fill_(~mg.masks_of(model)["c_fc.weight"].any(0), 0.0)
    wanted = model(x).detach()
    small = mg.shrink(model, x)
    assert small.c_fc.weight.shape == (12, 12)
    assert small.c_proj.weight.shape == (12, 12)
    torch.testing.assert_close(small(x), wanted, rtol=0, atol=1e-12)


def test_what_came_back_as_a_graph_has_the_same_layout() -> None:
    class Written(Mlp):  # a width in the forward, which no class can follow
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.c_fc(x)).view(-1, 24)
            return self.head(x + self.c_proj(hidden))

    x = batch()[0]
    small = mg.prune_channels(Written(), x, mg.Budget(density=0.5), round_to=1)
    assert mg.graph.plan_of(small).kind == "graph"
    layer = mg.core.layers.prunable_layers(small)["c_fc.weight"]
    assert layer.swapped
    assert layer.sides == (layer.shape[1], 12)
    mg.methods.OneShot(small, density=0.5, pattern="channel", layers=["type:Conv1D"], exclude=["c_proj"])
    columns = mg.masks_of(small)["c_fc.weight"]
    assert torch.equal(columns.any(0), columns.all(0))


def test_channels_are_permuted_for_blocks_of_true_outputs() -> None:
    model, x = Mlp(), batch()[0]
    other = twin(model)
    found, wanted = (
        mg.graph.permutation_of(mg.permute_channels(m, x, Block(4, 1), density=0.3)) for m in (model, other)
    )  # fmt: skip
    assert found.layers.keys() == wanted.layers.keys()
    for name, mass in found.layers.items():
        assert mass.after == pytest.approx(wanted.layers[name].after)
        assert mass.before == pytest.approx(wanted.layers[name].before)
    assert sum(m.after for m in found.layers.values()) > sum(m.before for m in found.layers.values())


def test_shuffles_are_those_of_the_linear_twin() -> None:
    """The control of a ticket: orientation first, then the shuffle."""
    model = Mlp()
    masks = mg.methods.OneShot(model, density=0.4, pattern="block:4x2").masks
    layers = mg.core.layers.prunable_layers(model)
    found = oriented(layers, shuffled(oriented(layers, masks), Block(4, 2), 0))
    wanted = shuffled(turned(masks), Block(4, 2), 0)
    assert turned(mg.core.masks.MaskSet(found)).same(wanted)


def test_accelerated_models_leave_them_dense() -> None:
    model, x = Mlp().eval(), batch()[0]
    mg.methods.OneShot(model, density=0.2, pattern="block:16x1", layers=["c_fc", "c_proj"])
    with torch.no_grad():
        wanted = model(x)
        fast = mg.accelerate(model, x, against="eager", cache=None)
        torch.testing.assert_close(fast(x), wanted, rtol=0, atol=1e-5)
    assert [layer.name for layer in fast.report().layers] == ["head"]
    assert any("Run dense" in note and note.endswith("c_fc.weight, c_proj.weight.") for note in fast.report().notes)


def test_only_transformers_own_class_and_its_heirs_are_meant() -> None:
    class Heir(Conv1D):
        pass

    class Other(nn.Module):
        weight: nn.Parameter

    Other.__name__ = "Conv1D"
    assert kind_of(Heir(4, 4)).swapped
    assert kind_of(Other()) is None


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@needs_transformers
def test_gpt2_is_masked_and_its_tied_embedding_is_not() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    net = transformers.GPT2LMHeadModel(config).eval()
    with pytest.warns(UserWarning, match=r"embedding shares the weight of lm_head\.weight"):
        pruner = mg.methods.OneShot(net, density=0.5)
    own = [f"transformer.h.{i}.{n}.weight" for i in (0, 1) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert list(pruner.layers) == own
    mg.fold(net)
    zeros = {n: int((p == 0).sum()) for n, p in net.named_parameters() if p.ndim > 1}
    assert zeros["transformer.wte.weight"] == zeros["transformer.wpe.weight"] == 0
    assert sum(zeros[n] for n in own) == 12_288
    assert all(zeros[n] for n in own)
