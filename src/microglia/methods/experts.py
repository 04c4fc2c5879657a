"""Expert pruning of a mixture of experts: those leave whose share in the outputs on calibration data is least.

For the tokens T_j that the router sends to expert j, with weight g_j(x) and output f_j(x):

    frequency    |T_j|
    weighted     sum over T_j of g_j(x)
    contribution sum over T_j of g_j(x) * |f_j(x)|_2
    reap         the mean of the same over T_j, equation 9 of REAP (Lasby et al. 2025, arXiv 2510.13999)
    random       the control
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call
from microglia.core.errors import BudgetError, MicrogliaError, SelectorError
from microglia.core.modes import evaluating, without_cache
from microglia.core.registry import Registry
from microglia.graph.blocks import counted_positions
from microglia.graph.experts import ExpertLayer, Routing, expert_layers, keep_experts, verify_experts
from microglia.scores.reading import outputs_of


@dataclass
class Tally:
    """Sums over the calibration tokens of one layer, float64 (experts,) each.

    Attributes:
        number: Number of the layer among those with experts.
        tokens: Number of tokens.
        frequency: Number of tokens of each expert.
        weighted: Sum of their routing weights.
        contribution: Sum of weight times norm of the expert's output; zero unless the score runs the experts.
        output: Sum of the norms of its outputs; zero unless the score runs the experts.
    """

    number: int
    experts: int
    tokens: int = 0
    frequency: Tensor = field(init=False)
    weighted: Tensor = field(init=False)
    contribution: Tensor = field(init=False)
    output: Tensor = field(init=False)

    def __post_init__(self) -> None:
        for name in ("frequency", "weighted", "contribution", "output"):
            setattr(self, name, torch.zeros(self.experts, dtype=torch.float64))

    def add(self, routing: Routing, norms: Callable[[int, Tensor], Tensor] | None) -> None:
        """Adds tokens; ``norms`` returns the norms of an expert's outputs (tokens,), or is None."""
        self.tokens += len(routing.hidden)
        for expert in torch.unique(routing.index).tolist():
            rows, places = torch.where(routing.index == expert)
            weights = routing.weights[rows, places].double()
            self.frequency[expert] += len(rows)
            self.weighted[expert] += weights.sum().cpu()
            if norms is not None:
                found = norms(expert, routing.hidden[rows]).double()
                self.output[expert] += found.sum().cpu()
                self.contribution[expert] += (weights * found).sum().cpu()


@dataclass(frozen=True)
class ExpertScore:
    """A score of experts; higher stays.

    Attributes:
        of: Returns the scores of a layer's experts, (experts,), from its tally.
        runs: Whether it reads outputs of experts, which are then run once more.
    """

    of: Callable[[Tally], Tensor]
    runs: bool = False


expert_scores: Registry[ExpertScore] = Registry("score of experts")
"""Scores by name; `Registry.add` registers one."""

expert_scores.add("frequency")(ExpertScore(lambda tally: tally.frequency))
expert_scores.add("weighted")(ExpertScore(lambda tally: tally.weighted))
expert_scores.add("contribution")(ExpertScore(lambda tally: tally.contribution, runs=True))
expert_scores.add("reap")(ExpertScore(lambda tally: tally.contribution / tally.frequency.clamp_min(1), runs=True))
expert_scores.add("random")(
    ExpertScore(lambda tally: torch.rand(tally.experts, generator=torch.Generator().manual_seed(tally.number)))
)


@torch.no_grad()
def tally_experts(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    runs: bool = False,
    forward: Callable[[nn.Module, Any], Any] = call,
) -> dict[str, Tally]:
    """Returns what each layer of experts did with calibration data, by its path; the model stays as it is.

    Args:
        model: A model with layers of experts; see `microglia.graph.experts.expert_layers`.
        batches: Inputs, batch by batch; padding by an ``attention_mask`` does not count.
        runs: Whether the norms of the experts' outputs are summed, too.
        forward: (model, inputs) -> outputs.

    Raises:
        SelectorError: There are no such layers, or a layer routes in an unknown way.
        MicrogliaError: There are no batches.
    """
    layers = expert_layers(model)
    found = {layer.path: Tally(number, layer.count) for number, layer in enumerate(layers)}
    counted: list[Tensor | None] = [None]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(without_cache(model))
        for layer in layers:
            stack.callback(_watch(model, layer, found[layer.path], counted, runs=runs).remove)
        for batch in batches:
            counted[0] = counted_positions(batch)
            outputs_of(model, batch, forward)
    if idle := [path for path, tally in found.items() if not tally.tokens]:
        raise MicrogliaError(f"No token reached the experts of {idle[0]}: give at least one batch of inputs.")
    return found


def _watch(model: nn.Module, layer: ExpertLayer, tally: Tally, counted: list[Tensor | None], *, runs: bool) -> Any:
    """Returns the handle of a hook that adds the tokens of every call of a layer."""
    module = model.get_submodule(layer.path)
    experts = module.get_submodule(layer.experts)

    def norms(expert: int, hidden: Tensor) -> Tensor:
        outputs = layer.kind.run(experts, expert, hidden).float()
        return outputs.square().sum(-1).sqrt()

    def watch(part: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        routing = layer.kind.routing(module, [*args, *kwargs.values()], outputs)
        if routing is None:
            raise SelectorError(
                f"{layer.path}, a {type(module).__name__}, routes in a way that is not known here: its experts need "
                "tokens, their expert numbers and weights, or a router that returns logits of all experts."
            )
        keep = counted[0]
        if keep is not None and keep.numel() == len(routing.hidden):
            rows = keep.flatten().to(routing.hidden.device)
            routing = Routing(routing.hidden[rows], routing.index[rows], routing.weights[rows])
        tally.add(routing, norms if runs else None)

    return module.get_submodule(getattr(layer, layer.kind.observed)).register_forward_hook(watch, with_kwargs=True)


def drop_experts(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    keep: int,
    score: str | Mapping[str, Tensor] = "reap",
    forward: Callable[[nn.Module, Any], Any] = call,
) -> nn.Module:
    """Returns a copy of a model whose every layer of experts keeps those of highest score; see `microglia.graph.keep_experts`.

    The cut is compared with the masked model, layer by layer, on the first batch. A router that chooses groups of experts
    first keeps equally many of each group.

    Args:
        model: A model with layers of experts, such as Mixtral, Qwen-MoE, OLMoE or DeepSeek of transformers.
        batches: Inputs, batch by batch; padding by an ``attention_mask`` does not count.
        keep: Number of experts of every layer that stay.
        score: A name in `expert_scores`; or given scores (experts,) by path of the layer.
        forward: (model, inputs) -> outputs.

    Raises:
        BudgetError: ``keep`` is above the number of experts, or below the number that a token is routed to.
        SelectorError: The model has no layer of experts, or one that cannot be cut.
        MicrogliaError: There are no batches, or a layer uses the numbers of experts in an unknown way.
    """
    layers = expert_layers(model)
    if not 1 <= keep <= layers[0].count:
        raise BudgetError(f"keep is the number of experts that stay, 1 to {layers[0].count} here; got {keep}.")
    for layer in layers:  # refused before the model runs
        layer.check(_best(layer, torch.zeros(layer.count), keep))
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise MicrogliaError("Experts are scored on batches of inputs: give at least one.")
    if isinstance(score, str):
        chosen = expert_scores[score]
        tallies = tally_experts(model, chain([first], rest), runs=chosen.runs, forward=forward)
        score = {path: chosen.of(tally) for path, tally in tallies.items()}
    kept = {layer.path: _best(layer, _given(layer, score), keep) for layer in layers}
    small = keep_experts(model, kept)
    verify_experts(model, small, kept, first, forward)
    return small


def _given(layer: ExpertLayer, scores: Mapping[str, Tensor]) -> Tensor:
    found = scores.get(layer.path)
    if found is None or found.shape != (layer.count,) or not bool(found.isfinite().all()):
        shape = "none" if found is None else tuple(found.shape)
        raise SelectorError(f"Scores of the experts of {layer.path} are {layer.count} finite numbers; got {shape}.")
    return found


def _best(layer: ExpertLayer, scores: Tensor, keep: int) -> list[int]:
    """Returns the experts of highest score in rising order, equally many of each group; the first of equal ones."""
    each = layer.count // layer.groups
    own = keep // layer.groups if keep % layer.groups == 0 else keep  # an uneven number is refused by the layer
    rows = scores.view(layer.groups, each) if own != keep else scores[None]
    order = rows.argsort(dim=1, descending=True, stable=True)[:, :own]
    return sorted(int(row * each + k) for row, chosen in enumerate(order) for k in chosen)
