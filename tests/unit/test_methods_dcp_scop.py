"""DCP and SCOP: greedy choices by gradients beside auxiliary classifiers, channels against their knockoffs."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import BudgetError, MicrogliaError, ScoreError
from microglia.methods import Dcp, Scop, methods
from microglia.methods.scop import images_of
from microglia.scores import Evidence
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy
from thinning import descend, images, made, network


# ------------------------------------------------------------------------------------------------------------------ dcp
def test_stages_end_one_after_the_other_and_what_is_removed_stays_zero() -> None:
    model = network()
    pruner = made(Dcp, model, classifiers=3)  # two groups have two stages
    assert [list(stage) for stage in pruner.stages] == [[0], [1]]
    assert pruner.sites == ["3"]  # the layer that reads the first stage's channels
    descend(model, pruner, 2)
    assert bool(pruner.target.all())
    descend(model, pruner, 1)
    assert [int(part.sum()) for part in pruner.target.split([8, 12])] == [4, 12]
    gone = ~pruner.target[:8]
    descend(model, pruner, 3, weight_decay=0.1)
    assert not model[0].weight[gone].any()
    assert not model[1].bias[gone].any()
    pruner.finish()
    assert [int(part.sum()) for part in pruner.kept.split([8, 12])] == [4, 6]
    assert torch.equal(pruner.kept[:8], ~gone)
    small = mg.shrink(model, images()[0])
    torch.testing.assert_close(small.eval()(images()[0]), model.eval()(images()[0]))


def test_the_auxiliary_loss_trains_what_lies_before_its_classifier_and_the_last_stage_has_none() -> None:
    model = network()
    statistics = deepcopy(dict(model.named_buffers()))
    pruner = made(Dcp, model, auxiliary=2.0)
    features = model.train()[:4](images()[0])
    model.load_state_dict(network().state_dict())
    wanted = 2 * functional.cross_entropy(deepcopy(pruner.heads[0])(features), images()[1])
    penalty = pruner.penalty()
    torch.testing.assert_close(penalty, wanted)
    penalty.backward()
    assert model[3].weight.grad.any()
    assert model[8].weight.grad is None  # behind the classifier
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers() if "tracked" not in name)
    descend(model, pruner, 3)
    assert pruner.stage == 1
    assert pruner.penalty() == 0.0


def test_the_first_choice_has_the_largest_gradient_of_reconstruction_and_loss() -> None:
    model = network().eval()
    pruner = made(Dcp, model, classifiers=0, updates=0)
    (x, y), reader = images(), model[3].weight
    dense = model[:4](x).detach()
    columns = reader.detach().clone()
    with torch.no_grad():
        reader.zero_()
    loss = functional.mse_loss(model[:4](x), dense) / 2 + functional.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(loss, reader)
    with torch.no_grad():
        reader.copy_(columns)
    best = int(gradient.square().sum((0, 2, 3)).argmax())
    assert pruner._greedy(slice(0, 8), 1).nonzero().flatten().tolist() == [best]
    assert torch.equal(reader[:, best], columns[:, best])
    assert not reader[:, [k for k in range(8) if k != best]].any()


def test_silent_channels_are_not_chosen_and_updates_bring_the_outputs_nearer() -> None:
    errors = {}
    for updates in (0, 20):
        model = network().eval()
        with torch.no_grad():
            model[1].weight[[1, 2, 5, 7]] = 0
            model[1].bias[[1, 2, 5, 7]] = -1  # maps of zeros
        wanted = model[:4](images()[0]).detach()
        pruner = made(Dcp, model, classifiers=0, updates=updates, auxiliary=0.0, update_lr=0.1)
        assert pruner._greedy(slice(0, 8), 4).nonzero().flatten().tolist() == [0, 3, 4, 6]
        pruner._greedy(slice(0, 8), 2)
        errors[updates] = float((model[:4](images()[0]) - wanted).detach().square().mean())
    assert 0 < errors[20] < errors[0]


def test_epsilon_stops_each_group_sooner_the_larger_it_is() -> None:
    kept = {}
    for epsilon in (1e-9, 0.02, 10.0):
        model = network()
        pruner = made(Dcp, model, epsilon=epsilon, classifiers=1)
        pruner.finish()
        kept[epsilon] = int(pruner.kept.sum())
    assert kept[1e-9] == 20  # the loss never settles so far
    assert kept[10.0] == 4  # at the second choice of each group, where two values are known
    assert 4 < kept[0.02] < 20
    with pytest.raises(BudgetError, match="give one of both"):
        made(Dcp, network(), epsilon=0.1, density=0.5)


def test_a_model_that_is_no_classifier_and_missing_evidence_are_told() -> None:
    with pytest.raises(ScoreError, match=r"Dcp adds classifiers to a classifier, which returns \(batch, classes\)"):
        made(Dcp, nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    with pytest.raises(ScoreError, match="give evidence with batches"):
        made(Dcp, network(), evidence=None)
    with pytest.raises(BudgetError, match="its scope is uniform; got"):
        made(Dcp, network(), scope="global")


# ----------------------------------------------------------------------------------------------------------------- scop
def test_the_weights_rest_while_beta_learns_and_evaluation_mixes_nothing() -> None:
    model, (x, _) = network(), images()
    before, outputs = deepcopy(model.state_dict()), network().eval()(x)
    pruner = made(Scop, model)
    torch.testing.assert_close(model.eval()(x), outputs)
    descend(model, pruner)
    beta = pruner.beta.detach().clone()
    assert (beta != 0.5).any()
    assert bool(((beta >= 0) & (beta <= 1)).all())
    pruner.finish()
    after = {name.replace("parametrizations.", "").replace(".original", ""): v for name, v in model.state_dict().items()}
    assert torch.equal(after["0.weight"][pruner.kept[:8]], before["0.weight"][pruner.kept[:8]])
    assert torch.equal(after["1.running_mean"][pruner.kept[:8]], before["1.running_mean"][pruner.kept[:8]])
    assert all(p.requires_grad for p in model.parameters())


def test_real_and_fake_halves_are_mixed_behind_each_layer_with_one_batch_norm() -> None:
    model, (x, _) = network(), images()
    fakes = images(5)[0]
    pruner = made(Scop, model, knockoffs=fakes)
    with torch.no_grad():
        pruner.beta[:8] = torch.linspace(0, 1, 8)
    pruner.fakes = lambda count: fakes[:count]
    plain, beta = network().train(), pruner.beta.detach()

    def mixed(both: Tensor, factor: Tensor) -> Tensor:
        real, fake = both.chunk(2)
        factor = factor.view(1, -1, 1, 1)
        return torch.cat([factor * real + (1 - factor) * fake, fake])

    hidden = mixed(plain[0](torch.cat([x, fakes])), beta[:8])
    hidden = mixed(plain[3](plain[2](plain[1](hidden))), beta[8:])
    torch.testing.assert_close(model.train()(x), plain[4:](hidden)[:16])


def test_images_that_are_their_own_knockoffs_teach_nothing_and_a_channel_that_matters_gains() -> None:
    model, (x, y) = network(), images()
    pruner = made(Scop, model, knockoffs=x)
    pruner.fakes = lambda count: x[:count]
    functional.cross_entropy(model.train()(x), y).backward()
    torch.testing.assert_close(pruner.beta.grad, torch.zeros(20), atol=1e-6, rtol=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():  # the first two channels see the first input, which the class depends on; the others noise
        model[1].weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        model[3].weight.copy_(torch.tensor([[1.0, -1, 0.5, -0.5], [-1, 1, -0.5, 0.5]]))
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(3))
    y = (x[:, 0] < 0).long()
    evidence = Evidence([(x, y)], functional.cross_entropy, torch.Generator().manual_seed(0))
    pruner = Scop(model, total_steps=30, example_inputs=x[:1], evidence=evidence, density=0.5, factor_lr=0.05)
    (optimizer,) = pruner.optimizers()
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        pruner.step()
    assert pruner.beta[:2].min() > 0.7
    assert pruner.beta[2:].max() < 0.65  # near the half: a mixture of two noises disturbs least
    pruner.finish()
    assert pruner.kept.tolist() == [True, True, False, False]


def test_the_rank_is_the_scale_times_the_distance_of_beta_from_a_half() -> None:
    model = network()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2, 1, 1, 1, 1, 1, 1]))
    pruner = made(Scop, model)
    with torch.no_grad():
        pruner.beta[:3] = torch.tensor([1.0, 0.9, 0.2])
    torch.testing.assert_close(pruner.ranking()[:4], torch.tensor([1.0, 1.6, -0.6, 0.0]).double())


def test_noise_has_the_mean_and_the_covariance_of_the_images() -> None:
    pruner = made(Scop, network())
    seen = torch.cat([images()[0], images(2)[0]]).flatten(1)
    fakes = pruner.fakes(20_000).flatten(1)
    assert (fakes.mean(0) - seen.mean(0)).abs().max() < 0.05
    assert (fakes.T.cov() - seen.T.cov(correction=0)).abs().max() < 0.1
    assert pruner.report()["knockoffs"] == "Gaussian noise with the mean and covariance of 32 training images"
    assert made(Scop, network(), knockoffs=images(4)[0]).report()["knockoffs"] == "16 images given"


def test_knockoffs_of_another_shape_are_told() -> None:
    with pytest.raises(ScoreError, match=r"got \(1, 5, 5\) beside \(1, 6, 6\)"):
        made(Scop, network(), knockoffs=torch.zeros(4, 1, 5, 5))
    with pytest.raises(ScoreError, match="give evidence with batches, or knockoffs=images"):
        made(Scop, network(), evidence=None)
    data = mg.data.load_data("digits")
    task = mg.Task("digits", network, ImageSource(data), CrossEntropy(), CLASSIFICATION, data.train.images[:1] / 255)
    config = methods["scop"].config(density=0.5, knockoffs="digits", score_batches=2, score_batch_size=16)
    found = images_of(task, config)
    assert found is not None
    assert found.shape == (32, *task.example.shape[1:])
    with pytest.raises(MicrogliaError, match="no-such-folder"):
        images_of(task, methods["scop"].config(density=0.5, knockoffs="no-such-folder"))
