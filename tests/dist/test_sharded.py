"""Parameters that FSDP2 shards over two ranks: scores, masks, training and files are those of the unsharded model."""

import pytest
import torch
from test_ranks import every_rank
from torch import nn
from torch.nn.functional import cross_entropy

import microglia as mg
from microglia.core.errors import MicrogliaError
from microglia.core.layers import prunable_layers
from microglia.core.masks import enforce
from microglia.core.sharded import is_sharded, moved, shard_like, whole
from microglia.scores import Evidence, scores

SCORES = ("magnitude", "random", "gradient", "snip-inference", "accumulated-gradient", "lamp", "l2")
BATCH, STEPS = 8, 6


def network():
    """Sizes that two ranks cannot share equally, and a layer that is a unit of FSDP2 by itself."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Sequential(nn.Linear(9, 7), nn.Tanh()), nn.Linear(7, 5))


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for module in (model[0], model[2], model):
        fully_shard(module)


def batches(rank):
    """The batches of one process, or a rank's half of each."""
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(BATCH, 12, generator=generator), torch.randint(5, (BATCH,), generator=generator)) for _ in range(STEPS)
    ]
    part = slice(None) if rank is None else slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    return [(x[part], y[part]) for x, y in made]


def evidence(rank):
    return Evidence(batches(rank)[:3], cross_entropy, torch.Generator().manual_seed(2))


def positions(masks):
    return {name: mask.flatten().nonzero().flatten().tolist() for name, mask in masks.items()}


def values(model):
    return {name: whole(value).tolist() for name, value in model.state_dict().items() if not name.endswith(".mask")}


def left_behind(model, optimizer):
    """Masked entries of weights and of the optimizer's state that are not 0, and how many tensors were looked at."""
    masks, left, seen = mg.masks_of(model), 0, 0
    for name, layer in prunable_layers(model).items():
        for value in (layer.raw.detach(), *optimizer.state[layer.raw].values()):
            if value.shape == masks[name].shape:
                left += int(whole(value)[~masks[name]].count_nonzero())
                seen += 1
    return left, seen


def scored(rank):
    model = network()
    if rank is not None:
        shard(model)
    model(batches(rank)[0][0])  # FSDP2 now leaves the outermost weights gathered
    return {
        name: {n: v.tolist() for n, v in scores[name](model, prunable_layers(model), evidence(rank)).items()} for name in SCORES
    }


def stepped(rank, method, *, first="shards"):
    """Masks, weights, and what is left of masked ones, after a training with a pruner in a loop."""
    model = network()
    if rank is not None and first == "shards":
        shard(model)
    settings = {"updates": 3, "score": "gradient"} if method == "Gradual" else {"pattern": "unstructured", "search": 0.5}
    pruner = getattr(mg.methods, method)(model, density=0.4, total_steps=STEPS, evidence=evidence(rank), **settings)
    if rank is not None and first == "pruner":
        shard(model)
    optimizer = torch.optim.AdamW(pruner.weights_to_train(), lr=0.01, weight_decay=0.1)
    every = [optimizer, *pruner.optimizers()]
    for x, y in batches(rank):
        for each in every:
            each.zero_grad()
        (cross_entropy(model(x), y) + pruner.penalty()).backward()
        for each in every:
            each.step()
        pruner.step(optimizer)
    enforce(model, optimizer)
    pruner.finish()
    found = {"left": left_behind(model, optimizer), "masks": positions(mg.masks_of(model)), "weights": values(model)}
    outputs = model(batches(None)[0][0]).tolist()
    mg.fold(model)
    return found | {"outputs": outputs, "folded": values(model), "folded outputs": model(batches(None)[0][0]).tolist()}


def saved(rank, folder):
    """Saves a model pruned at once; loads the file into a sharded model."""
    model = network()
    if rank is not None:
        shard(model)
    masks = mg.methods.OneShot(model, density=0.4).masks
    mg.save(model, folder)
    found = {name: (folder / name).read_bytes() for name in ("model.safetensors", "plan.json")}
    other = network()
    with torch.no_grad():
        other[3].weight.zero_()
    if rank is not None:
        shard(other)
    mg.load(folder, other)
    sharded = [name for name, value in other.state_dict().items() if is_sharded(value)]
    return {"files": found, "masks": positions(masks), "loaded": values(other), "own": values(model), "sharded": len(sharded)}


def refused(rank):
    model, texts = network(), {}
    shard(model)
    example, data = batches(rank)[0][0], evidence(rank)
    calls = {
        "fold": lambda: mg.save(model, "nowhere", fold=True),
        "cut": lambda: mg.shrink(model, example),
        "score": lambda: scores["grasp"](model, prunable_layers(model), data),
        "batches": lambda: scores["gradient"](model, prunable_layers(model), Evidence(data.batches[: 1 + rank], cross_entropy)),
        "method": lambda: mg.methods.SparseTraining(model, density=0.4, total_steps=STEPS),
        "search": lambda: mg.methods.Smart(model, density=0.4, pattern="unstructured", total_steps=STEPS),
    }
    for name, call in calls.items():
        try:
            call()
        except MicrogliaError as error:
            texts[name] = str(error)
    return texts


def unwritable(rank):
    """The error of a save into a directory that cannot be: rank 0's own, and that of the rank that waits for it."""
    model = network()
    shard(model)
    texts = {}
    calls = {"save": lambda: mg.save(model, f"{__file__}/model"), "push": lambda: mg.push(model, "me/sharded")}
    for name, call in calls.items():
        try:
            call()
        except MicrogliaError as error:
            texts[name] = str(error)
    return texts


JOURNEYS = {
    "Gradual": ("Gradual", "shards"),
    "Gradual, then shards": ("Gradual", "pruner"),
    "Smart, then shards": ("Smart", "pruner"),
}


def everything(rank, folder):
    journeys = {name: stepped(rank, method, first=first) for name, (method, first) in JOURNEYS.items()}
    return {"scores": scored(rank), "saved": saved(rank, folder), **journeys}


class OnRanks:
    """Everything on one rank; a class, because processes are sent it."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, rank):
        return everything(rank, self.folder) | {"refused": refused(rank), "unwritable": unwritable(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process found, and what each of two ranks did."""
    folder = tmp_path_factory.mktemp("sharded")
    return everything(None, folder / "alone"), every_rank(OnRanks(folder / "ranks"))


def close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(other[name]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_shards_are_those_of_whole_weights(found, name):
    alone, (first, second) = found
    assert first["scores"][name] == second["scores"][name]
    close(first["scores"][name], alone["scores"][name])


@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_pruner_in_a_loop_does_on_shards_what_it_does_alone(found, journey):
    alone, (first, second) = (found[0][journey], [rank[journey] for rank in found[1]])
    assert first == second
    assert first["masks"] == alone["masks"]
    assert sum(map(len, first["masks"].values())) == round(0.4 * (12 * 9 + 9 * 7 + 7 * 5))
    assert first["left"] == alone["left"]
    left, seen = first["left"]
    assert (left, seen) == (0, 9)  # three weights with two moments each
    for part in ("weights", "folded"):
        close(first[part], alone[part])
    close({"": first["outputs"]}, {"": first["folded outputs"]})
    close({"": first["outputs"]}, {"": alone["outputs"]})


def test_both_ranks_save_the_bytes_of_the_unsharded_model_and_load_them_into_shards(found):
    alone, (first, second) = (found[0]["saved"], [rank["saved"] for rank in found[1]])
    assert first == second
    assert first["masks"] == alone["masks"]
    assert first["files"] == alone["files"]
    assert first["loaded"] == first["own"] == alone["own"]
    assert first["sharded"] == 6


def test_what_needs_whole_parameters_says_so_in_one_sentence(found):
    for texts in (rank["refused"] for rank in found[1]):
        assert texts.keys() == {"fold", "cut", "score", "batches", "method", "search"}
        for name in ("fold", "cut", "score", "method"):
            assert "microglia.save on all ranks, then microglia.load" in texts[name]
        assert "Sequential is sharded" in texts["cut"]  # without FSDP's prefix
        assert "got [1, 2]" in texts["batches"]
        assert "attach it to the model first, then shard" in texts["search"]


def test_a_save_that_fails_on_rank_0_fails_on_the_rank_that_waits_for_it(found):
    first, second = (rank["unwritable"] for rank in found[1])
    assert "test_sharded.py/model" in first["save"]
    assert second["save"] == f"Rank 0 did not write the model: {first['save']}"
    assert "push needs whole parameters" in first["push"]
    assert first["push"] == second["push"]


def test_plain_tensors_pass_through():
    weight = nn.Parameter(torch.randn(2, 3))
    assert whole(weight) is weight
    assert shard_like(weight, weight) is weight
    assert not is_sharded(weight)
    moved(weight, (nn.Linear(3, 2), "weight"), (nn.Linear(3, 2), "weight"))
