"""Taylor and GDP in rounds, filter norms by two rules, CCP, PFP, DeepHoyer, and least squares for what reads the rest."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
import thinning
from microglia.core.errors import BudgetError, ScoreError, UnknownNameError
from microglia.methods import Amc, Ccp, DeepHoyer, FilterNorms, Pfp, Taylor, methods
from microglia.methods.ccp import collaborative
from microglia.methods.deephoyer import hoyer_square
from microglia.methods.least_squares import solved
from microglia.methods.not_built import NOT_BUILT
from microglia.methods.pfp import order, sensitivity
from thinning import descend, images, network

STEPS = 12
made = partial(thinning.made, steps=STEPS)


# ---------------------------------------------------------------------------------------------------------- taylor, gdp
def test_the_importance_is_the_squared_gradient_of_a_gate_on_each_coupled_channel() -> None:
    model, (x, y) = network().train(), images()
    pruner = made(Taylor, model)
    functional.cross_entropy(model(x), y).backward()
    plain = network().train()
    functional.cross_entropy(plain(x), y).backward()
    norm = plain[1]
    wanted = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad  # the identity of survey 8.6; ReLU keeps it
    torch.testing.assert_close(pruner.factors.grad[:8], wanted.detach(), atol=1e-6, rtol=1e-4)
    pruner.step()
    torch.testing.assert_close(pruner.ranking()[:8], wanted.detach().double().square(), atol=1e-9, rtol=1e-3)
    assert pruner.factors.grad is None


def test_rounds_remove_evenly_and_carry_their_score_on() -> None:
    model = network()
    pruner = made(Taylor, model, every=3, until=0.75, momentum=0.9)  # three rounds: after steps 3, 6 and 9
    descend(model, pruner, 3)
    alive = [int(pruner.alive.sum())]
    first, gone = pruner.score.clone(), ~pruner.alive
    assert (first[gone].max() <= first[~gone]).all()
    descend(model, pruner, 2)
    new = pruner.sums / pruner.batches
    torch.testing.assert_close(pruner.ranking(), 0.9 * first + 0.1 * new)
    descend(model, pruner, 1)
    alive.append(int(pruner.alive.sum()))
    descend(model, pruner, 6)
    alive.append(int(pruner.alive.sum()))
    assert alive == [17, 13, 10]  # 20 channels, 10 of them stay
    assert not pruner.alive[gone].any()  # what went stays away
    assert not model[0].weight[~pruner.alive[:8]].any()
    pruner.finish()
    assert torch.equal(pruner.kept, pruner.alive)
    small = mg.shrink(model, images()[0])
    torch.testing.assert_close(small.eval()(images()[0]), model.eval()(images()[0]))


def test_a_closed_gate_of_gdp_may_open_again_and_its_filter_is_whole() -> None:
    model = network()
    pruner = made(Taylor, model, every=2, dynamic=True, momentum=0.0, until=1.0)
    descend(model, pruner, 2)
    closed = int((~pruner.alive).nonzero()[0])
    assert pruner.factors[closed] == 0
    assert model[0].weight.flatten(1).any(1).all()  # nothing is set to zero
    pruner.sums[closed] += 100.0  # a large gradient at the closed gate
    pruner.batches = 1
    descend(model, pruner, 2)
    assert bool(pruner.alive[closed])
    assert pruner.factors[closed] == 1
    descend(model, pruner, 8)
    pruner.finish()
    assert int(pruner.kept.sum()) == 10
    assert methods["gdp"].defaults["dynamic"] is True


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_choice_of_the_last_round_is_final(dynamic: bool) -> None:
    """Rounds after steps 5 and 10 of 12; the two batches after the last one do not choose again."""
    model = network()
    pruner = made(Taylor, model, every=5, dynamic=dynamic, momentum=0.0, until=1.0)
    descend(model, pruner, 10)
    chosen = pruner.alive.clone()
    descend(model, pruner, 2)
    pruner.sums[~chosen] += 100.0  # large gradients at the closed gates
    pruner.finish()
    assert torch.equal(pruner.kept, chosen)
    assert int(chosen.sum()) == 10


def test_a_loop_that_ends_early_still_meets_the_budget() -> None:
    model = network()
    pruner = made(Taylor, model, every=3)
    descend(model, pruner, 4)
    pruner.finish()
    assert int(pruner.kept.sum()) == 10
    with pytest.raises(BudgetError, match="momentum in"):
        made(Taylor, network(), momentum=1.0)
    with pytest.raises(BudgetError, match="cuts to a budget"):
        Taylor(network(), total_steps=3, example_inputs=images()[0])


# --------------------------------------------------------------------------------------------------------- filter norms
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_greedy_norms_leave_out_what_reads_removed_channels(norm: str) -> None:
    kept = {}
    for rule in ("independent", "greedy"):
        model = network()
        with torch.no_grad():
            model[0].weight[:4] *= 1e-3  # these go
            model[3].weight[5, 4:] = 0.0  # large by what reads them alone
            model[3].weight[5, :4] = 9.0
        pruner = made(FilterNorms, model, rule=rule, norm=norm)
        weight, order = model[3].weight.detach().clone(), 1 if norm == "l1" else 2
        pruner.finish()
        kept[rule] = pruner.kept
        assert pruner.kept[:8].tolist() == [False] * 4 + [True] * 4
        counted = weight if rule == "independent" else weight[:, 4:]
        values = counted.flatten(1).norm(order, dim=1)
        assert torch.equal(pruner.kept[8:], values >= values.sort().values[6])
    assert bool(kept["independent"][8 + 5])
    assert not bool(kept["greedy"][8 + 5])
    with pytest.raises(UnknownNameError, match="rule of filter norms"):
        made(FilterNorms, network(), rule="lazy")


# ------------------------------------------------------------------------------------------------------------------ ccp
def change_of_loss(gradients: Tensor, gone: Tensor) -> float:
    """Returns the approximate change of the loss where channels go, from gradients (examples, channels)."""
    found = gradients[:, gone].sum(1)
    return float(-found.mean() + found.square().mean() / 2)


def test_the_greedy_choice_is_the_best_of_all_and_knows_pairs() -> None:
    gradients = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    gradients[:, 4] = -gradients[:, 1]  # together they cost nothing
    gradients[:, [1, 4]] *= 3  # each alone costs most
    kept = collaborative(gradients - gradients.mean(0), 4)
    centred = gradients - gradients.mean(0)
    costs = {}
    for gone in itertools.combinations(range(6), 2):
        mask = torch.zeros(6, dtype=torch.bool)
        mask[list(gone)] = True
        costs[gone] = change_of_loss(centred, mask)
    assert min(costs, key=costs.get) == (1, 4)
    assert costs[1, 4] == pytest.approx(0)
    assert change_of_loss(centred, ~kept) <= sorted(costs.values())[2]  # greedy begins with the least alone
    better = torch.randn(60, 6, generator=torch.Generator().manual_seed(3)).double()
    best = min(costs, key=lambda gone: change_of_loss(better, torch.zeros(6).index_fill(0, torch.tensor(gone), 1).bool()))
    assert (~collaborative(better, 4)).nonzero().flatten().tolist() == list(best)


class Seen(Ccp):
    """Keeps the gradients before the cut."""

    def gradients(self) -> Tensor:
        self.found = super().gradients()
        return self.found


def test_pairs_are_of_examples_whatever_the_batches() -> None:
    """The mean of their rows is the gradient of the batch's loss in evaluation mode, at the gates of the coupled channels."""
    (x, y), loss = images(), functional.cross_entropy
    whole, halves = [(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])]
    found = [made(Seen, network(), evidence=mg.scores.Evidence(batches, loss)).found for batches in (whole, halves)]
    assert found[0].shape == (len(x), 20)
    torch.testing.assert_close(*found)
    plain = network().eval()
    loss(plain(x), y).backward()
    norm = plain[1]
    wanted = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad  # the identity of survey 8.6
    torch.testing.assert_close(found[0].mean(0)[:8], wanted.detach().double(), atol=1e-6, rtol=1e-4)


def test_the_loss_of_gates_changes_as_the_greedy_choice_counts_it() -> None:
    model = network()
    pruner = made(Seen, model)
    gradients = pruner.found
    gone = torch.arange(20) % 3 == 0
    moved = (gradients @ (-gone.double())).square().mean() / 2 + (gradients @ (-gone.double())).mean()
    assert change_of_loss(gradients, gone) == pytest.approx(float(moved))
    assert [int(part.sum()) for part in pruner.target.split([8, 12])] == [4, 6]
    with pytest.raises(ScoreError, match="needs batches"):
        made(Ccp, network(), evidence=None)
    boxes = {"index": torch.arange(16), "boxes": torch.zeros(5, 4)}  # five boxes in sixteen images
    evidence = mg.scores.Evidence([(images()[0], boxes)], functional.cross_entropy, count=lambda targets: len(targets["index"]))
    with pytest.raises(ScoreError, match="score_batch_size=1"):
        made(Ccp, network(), evidence=evidence)
    with pytest.raises(ScoreError, match="score_batch_size=1"):
        mg.scores.scores["fisher"](model, mg.core.layers.prunable_layers(model), evidence)


# ------------------------------------------------------------------------------------------------------------------ pfp
def test_no_sampled_output_changes_by_more_than_the_bound() -> None:
    samples = torch.randn(300, 9, generator=torch.Generator().manual_seed(0)).double() * torch.linspace(0.01, 2, 9)
    values = sensitivity(samples)
    assert ((values > 0) & (values <= 1)).all()
    for count in range(1, 9):
        gone = values <= values.sort().values[count - 1]
        error = samples[:, gone].sum(1).abs()
        assert (error <= values[gone].sum() * samples.abs().sum(1) + 1e-12).all()
    assert (sensitivity(torch.tensor([[3.0, -1.0, 0.0, 1.0]])) - torch.tensor([0.75, 1.0, 0.0, 0.25])).abs().max() < 1e-6


def test_a_channel_stays_from_as_many_draws_on_as_are_expected_to_hit_its_rank() -> None:
    values = torch.tensor([0.2, 0.9, 0.0, 0.05, 0.4], dtype=torch.float64)
    found = order(values)
    assert found.argsort(descending=True).tolist() == values.argsort(descending=True).tolist()
    assert found[2] == 0
    for rank, channel in enumerate((1, 4, 0, 3)):
        draws = values.sum() / found[channel]
        assert float((1 - (1 - values / values.sum()) ** draws).sum()) == pytest.approx(rank + 0.5)


def test_one_epsilon_leaves_equal_fractions_of_groups_of_equal_sensitivities() -> None:
    """A wide group has smaller shares, which alone would remove it first."""
    wide, narrow = order(torch.full((64,), 0.25)), order(torch.full((8,), 0.25))
    assert int((wide >= narrow.median()).sum()) == pytest.approx(64 * 4.5 / 8, abs=4)  # of rank 5
    small = order(torch.full((64,), 0.1))
    assert 0 < int((small >= narrow.median()).sum()) < int((wide >= narrow.median()).sum())


def test_channels_that_nothing_rests_on_go_over_the_whole_network() -> None:
    model = network().eval()
    with torch.no_grad():
        model[1].weight[[1, 2, 5]] = 0
        model[1].bias[[1, 2, 5]] = -1  # maps of zeros
    pruner = made(Pfp, model, density=0.7)
    assert not pruner.values[[1, 2, 5]].any()
    pruner.finish()
    assert not pruner.kept[[1, 2, 5]].any()
    assert int(pruner.kept.sum()) == 14


# ------------------------------------------------------------------------------------------------------------ deephoyer
def test_the_measure_knows_no_scale_and_counts_equal_channels() -> None:
    norms = torch.rand(7, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    value = hoyer_square(norms.square())
    torch.testing.assert_close(value, norms.sum().square() / norms.square().sum())
    torch.testing.assert_close(hoyer_square((5 * norms).square()), value)
    torch.testing.assert_close(hoyer_square(torch.full((7,), 0.3)), torch.tensor(7.0))
    torch.testing.assert_close(hoyer_square(torch.tensor([0.0, 2.0, 0.0])), torch.tensor(1.0))
    (slope,) = torch.autograd.grad(value, norms)
    total, squares = norms.sum(), norms.square().sum()
    torch.testing.assert_close(slope, 2 * total / squares * (1 - norms * total / squares))  # equation 3 of the paper
    model = network()
    pruner = made(DeepHoyer, model, strength=0.1)
    parts = torch.split(pruner.squares(), [8, 12])
    torch.testing.assert_close(pruner.penalty(), 0.1 * (hoyer_square(parts[0]) + hoyer_square(parts[1])))


# -------------------------------------------------------------------------------------------------------- least squares
def test_the_solution_is_the_least_squares_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)).double()
    weight, stay = torch.randn(3, 6, generator=generator).double(), torch.tensor([True, False, True, True, False, True])
    found = solved(weight, x.T @ x / 200, stay)
    wanted = torch.linalg.lstsq(x[:, stay], x @ weight.T).solution.T
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def amc(model: nn.Module, **settings: Any) -> Any:
    return made(Amc, model, episodes=4, warmup=2, round_to=1, **settings)


@pytest.mark.parametrize("which", ["1x1", "all"])
def test_candidates_with_solved_weights_answer_nearer_to_the_dense_network(which: str) -> None:
    x, _ = images()
    dense, errors = network().eval()(x), {}
    for reconstruct in ("none", which):
        model = network().eval()
        pruner = amc(model, reconstruct=reconstruct, density=0.6)
        pruner.values_of_channels = pruner.ranking()
        widths = (5, 7)
        small = pruner.candidate(widths)
        assert [small[0].out_channels, small[3].out_channels] == [5, 7]
        errors[reconstruct] = float((small.eval()(x) - dense).detach().square().mean())
        assert all(torch.equal(value, network().state_dict()[name]) for name, value in model.state_dict().items())
    assert errors[which] < errors["none"]


def test_the_result_of_a_search_has_the_weights_of_its_best_candidate() -> None:
    model, (x, _) = network().eval(), images()
    seen: dict[Any, Tensor] = {}

    def measure(small: nn.Module) -> float:
        seen[small[0].out_channels, small[3].out_channels] = small.eval()(x).detach()
        return -float(small[0].out_channels)

    pruner = amc(model, reconstruct="all", density=0.6)
    pruner.search(measure, seed=0)
    pruner.finish()
    small = mg.shrink(model, x)
    torch.testing.assert_close(small.eval()(x), seen[small[0].out_channels, small[3].out_channels], atol=1e-5, rtol=1e-4)
    with pytest.raises(ScoreError, match="looks at what layers read"):
        amc(network(), reconstruct="all", evidence=None)
    with pytest.raises(UnknownNameError, match="named 'some'"):
        amc(network(), reconstruct="some")


# ------------------------------------------------------------------------------------------------------------ documents
def test_every_method_that_removes_channels_is_in_the_table_and_names_not_built_are_answered() -> None:
    table = (Path(__file__).parents[2] / "docs" / "structured.md").read_text()
    elsewhere = {"acdc", "awg", "ftwt", "pas", "pdp", "smart"}  # of blocks as well, or for each input
    removing = {name for name, method in methods.items() if method.outcome("channel") == "shrunk"} - elsewhere
    assert {name for name in removing if f"`{name}`" not in table} == set()
    for name in NOT_BUILT:
        assert f"| `{name}` |" in table
        with pytest.raises(UnknownNameError, match=f"The method '{name}' is known and not built: "):
            methods[name]
