"""Weight sharing in a loop of one's own, and Deep Compression as a procedure."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.compress import encode
from microglia.compress.sharing import shared_on
from microglia.core.errors import FileError, MicrogliaError
from microglia.core.layers import prunable_layers
from microglia.lab.recipe import resolve
from microglia.methods import DeepCompressionConfig, Packed, PrunerProtocol, WeightSharing


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 1, 8, 8, generator=generator), torch.randint(10, (32,), generator=generator)


def pruned() -> nn.Module:
    model = network()
    mg.methods.OneShot(model, density=0.3).finish()
    return model


def trained(model: nn.Module, pruner: PrunerProtocol, steps: int = 15) -> list[float]:
    """The loop that `PrunerProtocol` shows."""
    x, y = batch()
    optimizers = [torch.optim.SGD(pruner.weights_to_train(), lr=0.05, weight_decay=0.1), *pruner.optimizers()]
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(model(x), y) + pruner.penalty()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step(optimizers[0])
        losses.append(float(loss.detach()))
    return losses


def test_the_gradient_of_a_centroid_is_the_sum_over_its_weights() -> None:
    model = pruned()
    plain = copy.deepcopy(model)
    sharing = WeightSharing(model, bits=3)
    for name, layer in prunable_layers(plain).items():
        layer.raw.data = prunable_layers(model)[name].weight.detach().clone()
    x, y = batch()
    functional.cross_entropy(model(x), y).backward()
    mg.fold(plain)
    functional.cross_entropy(plain(x), y).backward()
    for name, layer in sharing.layers.items():
        shared = shared_on(layer)
        assert shared is not None
        dense = prunable_layers(plain)[name].raw.grad.flatten()
        sums = [dense[(shared.codes.flatten() == k + 1)].sum() for k in range(len(shared.centroids))]
        torch.testing.assert_close(shared.centroids.grad, torch.stack(sums))
        assert layer.raw.grad is None


def test_the_gradient_is_that_of_a_finite_difference() -> None:
    model = pruned().double()
    sharing = WeightSharing(model, bits=2)
    shared = shared_on(sharing.layers["4.weight"])
    assert shared is not None
    x, y = batch()

    def loss() -> Tensor:
        return functional.cross_entropy(model(x.double()), y)

    loss().backward()
    for k in range(len(shared.centroids)):
        with torch.no_grad():
            shared.centroids[k] += 1e-6
            above = loss()
            shared.centroids[k] -= 2e-6
            below = loss()
            shared.centroids[k] += 1e-6
        assert float(above - below) / 2e-6 == pytest.approx(float(shared.centroids.grad[k]), rel=1e-4, abs=1e-8)


def test_training_moves_the_values_and_neither_codes_nor_zeros() -> None:
    model = pruned()
    masks = mg.masks_of(model)
    sharing = WeightSharing(model, bits={"0": 4, "*": 3}, centroid_lr=0.01)
    codes = {n: shared_on(layer).codes.clone() for n, layer in sharing.layers.items()}
    before = sharing.codebooks
    losses = trained(model, sharing)
    assert losses[-1] < losses[0]
    assert all(torch.equal(codes[n], shared_on(layer).codes) for n, layer in sharing.layers.items())
    assert all(not torch.equal(before[n][1:], table[1:]) and table[0] == 0 for n, table in sharing.codebooks.items())
    with pytest.raises(FileError, match=r"call pruner.finish\(\)"):
        encode(model)
    seen = {n: layer.weight.detach().clone() for n, layer in sharing.layers.items()}
    assert sharing.finish().same(masks)
    for name, layer in prunable_layers(model).items():
        assert torch.equal(layer.raw, seen[name])
        assert torch.equal(layer.weight == 0, ~masks[name])
        assert layer.raw.requires_grad
        assert layer.weight[layer.weight != 0].unique().numel() <= {"0.weight": 15, "4.weight": 7}[name]


def test_the_packed_model_has_the_logits_of_the_shared_one(tmp_path: Path) -> None:
    model = pruned()
    sharing = WeightSharing(model, bits=4)
    trained(model, sharing, 3)
    model.eval()
    shared = model(batch()[0])
    sharing.finish()
    contents = mg.pack(model, tmp_path / "m.mgpack")
    assert all(2 < e.values <= 16 for e in contents.entries if e.form == "shared")  # empty clusters are left out
    back = mg.unpack(tmp_path / "m.mgpack", network()).eval()
    assert torch.equal(back(batch()[0]), shared)


def test_it_obeys_the_protocol_and_resumes() -> None:
    model, other = pruned(), pruned()
    sharing: PrunerProtocol = WeightSharing(model, bits=3, total_steps=10, example_inputs=batch()[0])
    (group,) = sharing.param_groups()
    assert group["lr"] == 1e-4
    assert group["weight_decay"] == 0
    assert not sharing.replaces_step()
    theirs = {id(p) for p in group["params"]}
    assert not theirs & {id(p) for p in sharing.weights_to_train()}
    torch.optim.SGD(sharing.weights_to_train(), lr=0.1).add_param_group(group)
    trained(model, sharing, 4)
    again = WeightSharing(other, bits=3)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(sharing.state_dict())
    assert all(torch.equal(again.codebooks[n], table) for n, table in sharing.codebooks.items())
    assert set(sharing.report()["codebooks"]) == {"0.weight", "4.weight"}
    sharing.finish()
    sharing.finish()
    assert sharing.param_groups() == sharing.optimizers() == []


def test_tied_and_chosen_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.two(self.one(x)))

    model = Tied()
    sharing = WeightSharing(model, bits=2, exclude="other")
    assert list(sharing.layers) == ["one.weight"]
    assert torch.equal(model.one.weight, model.two.weight)
    sharing.finish()
    assert model.one.weight is model.two.weight
    assert model.one.weight.unique().numel() == 3
    assert model.other.weight.unique().numel() == 36


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"bits": 9}, "1 to 8 bits; got 9"),
        ({"bits": {"fc9": 3}}, "meets no layer"),
        ({"bits": {"type:LSTM": 3}}, "No layer shares its weights"),
        ({"initial": "forgy"}, "linear"),
        ({"centroid_optimizer": "lion"}, "adam"),
        ({"centroid_lr": -1.0}, "centroid_lr"),
        ({"sparsity": 0.9}, "sparsity"),
        ({"layers": "fc9"}, "meets no layer"),
    ],
)
def test_wrong_settings_end_in_a_sentence(settings: dict[str, object], text: str) -> None:
    with pytest.raises(MicrogliaError, match=text):
        WeightSharing(network(), **settings)  # type: ignore[arg-type]


def test_models_that_cannot_be_shared() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))
    with pytest.raises(MicrogliaError, match="has a parametrization"):
        WeightSharing(model, bits=2)
    model = network()
    WeightSharing(model, bits=2)
    with pytest.raises(MicrogliaError, match="are shared already"):
        WeightSharing(model, bits=2)
    with pytest.raises(MicrogliaError, match="not both"):
        WeightSharing(network(), DeepCompressionConfig(), bits=2)


def recipe() -> mg.Recipe:
    return resolve(
        {
            "model": "lenet-300-100", "data": "digits", "method": "deep-compression", "dense": {"epochs": 2},
            "prune": {"density": 0.2, "bits": {"fc3": 3, "*": 4}, "share": {"epochs": 1}},
            "train": {"epochs": 2}, "measure": {"latency": False}, "seed": 1,
        }
    )  # fmt: skip


def test_the_procedure_names_the_bytes_of_its_file(tmp_path: Path) -> None:
    result = mg.execute(recipe(), tmp_path / "run")
    found = result.observed(Packed)
    assert found is not None
    file = tmp_path / "run" / "model.mgpack"
    assert found.bytes == file.stat().st_size
    most = {"fc1.weight": 16, "fc2.weight": 16, "fc3.weight": 8}
    assert found.layers.keys() == most.keys()
    assert all(2 < layer.values <= most[name] for name, layer in found.layers.items())
    assert found.dense / found.bytes > 10
    assert f"{found.bytes:,} bytes" in found.kept({})
    saved, small = mg.load(tmp_path / "run" / "model"), mg.unpack(file)
    assert all(torch.equal(v, small.state_dict()[n]) for n, v in saved.state_dict().items())
    assert mg.masks_of(small).density == pytest.approx(0.2, abs=1e-4)


def test_an_interrupted_procedure_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = mg.execute(recipe(), tmp_path / "whole")
    other = tmp_path / "other"
    mg.execute(recipe(), other)
    for name in ("share", "packed", "pruned-observed"):
        (other / "stages" / f"{name}.safetensors").unlink()
    (other / "result.json").unlink()
    assert mg.execute(recipe(), other)["packed"] == whole["packed"]
    assert (other / "model.mgpack").read_bytes() == (tmp_path / "whole" / "model.mgpack").read_bytes()


def test_without_a_directory_the_bytes_are_measured_all_the_same() -> None:
    found = mg.execute(recipe()).observed(Packed)
    assert found is not None
    assert found.file is None
    assert found.bytes > 1000
