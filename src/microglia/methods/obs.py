"""Optimal Brain Surgeon (Hassibi, Stork 1992): delete the unit that costs least, change all other weights to compensate.

The algorithm (spec: survey 3.2), on a trained network with all its weights w in one vector:
    until the density is reached:
        H^-1 = (alpha I + sum X X^T / P)^-1
        while a unit Q is cheap:  L_Q = w_Q^T ([H^-1]_QQ)^-1 w_Q / 2 at most a fraction of the loss
            w <- w - H^-1[:, Q] ([H^-1]_QQ)^-1 w_Q;  w_Q = 0
            H^-1 <- H^-1 - H^-1[:, Q] ([H^-1]_QQ)^-1 H^-1[Q, :]
        retrain
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError, ScoreError
from microglia.core.layers import oriented
from microglia.core.masks import enforce, mask
from microglia.core.modes import evaluating
from microglia.core.patterns import Block, Unstructured
from microglia.methods.config import MethodConfig, method, prunable_weights
from microglia.methods.procedure import dense_model, evidence
from microglia.methods.pruner import Pruner
from microglia.methods.quadratic import factor, group_losses, groups_of, taken
from microglia.methods.rounds import rounds
from microglia.methods.what import SAMPLING, PruneConfig, Takes
from microglia.scores import Evidence
from microglia.scores.curvature import curvature_rows, curvatures
from microglia.scores.reading import loss_of, outputs_of
from microglia.storage.run import Run
from microglia.tasks.task import Task

LARGEST = 20_000
"""Weights up to which the exact inverse is made: 20,000 of them take 1.6 GB."""
WIDE = 8192
"""Weights from which on the inverse is in float32."""
SMALLEST = 1e-37
"""Smallest diagonal of the inverse that is divided by."""
SYMMETRIC = 64
"""Removals after which the inverse is made symmetric again."""


@dataclass(frozen=True)
class ObsConfig(MethodConfig):
    """Optimal Brain Surgeon; ``train`` is the training after each round.

    Attributes:
        curvature: ``gauss-newton`` or ``fisher``, the empirical Fisher information.
        alpha: Dampening, added to the diagonal of the Hessian.
        cheap: Largest rise of the loss that one removal may predict, as a fraction of the loss; the others wait for retraining.
        least: Fraction of the remaining weights that a round removes at least, cheap or not.
        together: Units that are removed together, as one group.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("density", "params", "layers", "exclude", "allow_empty", *SAMPLING),
        patterns={Unstructured: "masked", Block: "masked"},
        why={
            "scope": "it compares all weights by what their removal costs",
            "score": "the inverse Hessian ranks the units",
            "reduction": "the inverse Hessian ranks whole units",
            "protect": "it takes exclude, which leaves layers dense and uncounted",
            "nm:N:M": "it removes unit after unit; woodfisher takes it",
            "channel": "the weights of a channel are too many for one group",
        },
    )
    score_batches: int = 4
    curvature: str = "gauss-newton"
    alpha: float = 1e-6
    cheap: float = 0.1
    least: float = 0.2
    together: int = 1

    def check_values(self) -> None:
        """Raises unless the curvature exists and its numbers are in range."""
        curvatures[self.curvature]
        if not 0 < self.least <= 1:
            raise BudgetError(
                f"least is the fraction of the weights that a round removes at least, in (0, 1]; got {self.least}."
            )
        if self.alpha <= 0 or self.cheap < 0 or self.together < 1:
            raise BudgetError(
                "OBS needs alpha > 0, cheap >= 0 and together >= 1; got "
                f"alpha {self.alpha}, cheap {self.cheap}, together {self.together}."
            )

    def own_bytes(self, model: nn.Module) -> int:
        """Returns the bytes of the Hessian, its factor and its inverse, and of a row for each example."""
        weights = prunable_weights(model)
        return 3 * weights**2 * (8 if weights < WIDE else 4) + 8 * self.score_batches * self.score_batch_size * weights


class Obs(Pruner):
    """Removes units one by one, or in groups, at once when it is made unless ``start`` is false; see `Pruner`.

    Raises:
        BudgetError: The layers have more than `LARGEST` weights.
        ScoreError: There are no batches, or no loss.
    """

    Config = ObsConfig

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        *,
        evidence: Evidence | None = None,
        start: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(model, config, evidence=evidence, **settings)
        if self.weights > LARGEST:
            raise BudgetError(
                f"OBS inverts the Hessian of all its weights together, {LARGEST:,} at most, and {len(self.layers)} layers here "
                f"have {self.weights:,}: exclude layers, or take the method woodfisher, whose inverse is in blocks."
            )
        if start:
            self.remove(self.target)

    def remove(self, keep: int, *, limit: float = torch.inf, least: int = 0) -> list[dict[str, Any]]:
        """Removes units until ``keep`` weights are left, and changes the others; one inverse Hessian serves them all.

        Args:
            keep: Weights to keep.
            limit: Largest rise of the loss that one unit may cost.
            least: Weights to remove also above the limit.

        Returns:
            By removal: ``units`` (positions of their first weights), ``kept`` weights, predicted ``loss`` change.
        """
        state = _Removal(self)
        rows: list[dict[str, Any]] = []
        first = state.kept
        while state.kept > keep:
            chosen = state.cheapest(state.kept - keep, limit if first - state.kept >= least else torch.inf)
            if chosen is None:
                break
            rows.append(state.remove(chosen))
        state.write()
        return rows

    @torch.no_grad()
    def mean_loss(self) -> float:
        """Returns the mean loss over the evidence, in evaluation mode."""
        losses, count = 0.0, 0
        with evaluating(self.model):
            for inputs, targets in self.evidence.batches:
                own, outputs = self.evidence.count(targets), outputs_of(self.model, inputs, self.evidence.forward)
                losses += own * float(loss_of(self.evidence.loss, outputs, targets))
                count += own
        if not count:
            raise ScoreError("OBS measures the loss on batches: give batches=[(inputs, targets), ...].")
        return losses / count


class _Removal:
    """All weights of a model as one vector, the inverse Hessian, and the units that are left."""

    def __init__(self, pruner: Obs) -> None:
        self.pruner, config = pruner, cast(ObsConfig, pruner.config)
        self.together, self.layers = config.together, pruner.layers
        weights = oriented(self.layers, {name: layer.weight.detach() for name, layer in self.layers.items()})
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        dtype = torch.float64 if pruner.weights < WIDE else torch.float32
        self.weight = torch.cat([weight.flatten() for weight in weights.values()]).to(dtype)
        self.units, self.owner = self._units()
        attached = oriented(self.layers, dict(pruner.masks.items()))
        self.stays = torch.cat([attached[name].flatten() for name in weights]).to(self.weight.device)
        alive = taken(self.stays.to(dtype), self.units) > 0
        self.left = alive.any(1)
        self.kept = int(self.stays.sum())
        self.last = not pruner.config.allow_empty
        self.inverse = self._inverse(config, dtype)
        self.removals = 0

    def _units(self) -> tuple[Tensor, Tensor]:
        """Returns the positions of each unit, (units, width), and the number of its layer."""
        found, first = [], 0
        for shape in self.shapes.values():
            own = groups_of(self.pruner.pattern, shape)
            found.append(torch.where(own < 0, own, own + first))
            first += torch.Size(shape).numel()
        width = max(own.shape[1] for own in found)
        padded = [nn.functional.pad(own, (0, width - own.shape[1]), value=-1) for own in found]
        owner = torch.cat([torch.full((len(own),), i) for i, own in enumerate(found)])
        return torch.cat(padded).to(self.weight.device), owner.to(self.weight.device)

    def _inverse(self, config: ObsConfig, dtype: torch.dtype) -> Tensor:
        """Returns the inverse Hessian; weights that were removed before have zero rows and columns."""
        pruner = self.pruner
        rows = curvature_rows(config.curvature, pruner.model, self.layers, pruner.evidence)
        flat = torch.cat([rows.values[name].flatten(1) for name in self.shapes], dim=1).to(dtype) * self.stays
        hessian = (flat.T @ flat).div_(rows.count)
        del rows, flat
        hessian.diagonal().add_(config.alpha)
        inverse = torch.cholesky_inverse(factor(hessian))
        return inverse.mul_(self.stays).mul_(self.stays[:, None])

    def costs(self) -> Tensor:
        """Returns what the removal of each unit costs, infinite for units that are gone or the last of their layers."""
        places = self.units.clamp_min(0)
        weight, held = taken(self.weight, self.units), self.units >= 0
        if self.units.shape[1] == 1:
            found = weight[:, 0].square() / (2 * self.inverse.diagonal()[places[:, 0]].clamp_min(SMALLEST))
        else:
            own = self.inverse[places[:, :, None], places[:, None]]
            absent = ~(held & self.stays[places])
            own = own.masked_fill(absent[:, :, None] | absent[:, None], 0.0) + torch.diag_embed(absent.to(own))
            found = group_losses(weight, own)
        found = found.masked_fill(~self.left, torch.inf)
        if self.last:
            counts = self.left.new_zeros(len(self.shapes), dtype=torch.int64).index_add_(0, self.owner, self.left.long())
            found = found.masked_fill((counts <= 1)[self.owner], torch.inf)
        return found

    def cheapest(self, most: int, limit: float) -> Tensor | None:
        """Returns the units to remove next, at least one, with about ``most`` weights at the most; None if none is in reach."""
        costs = self.costs()
        order = costs.argsort(stable=True)[: self.together]
        chosen = order[costs[order] < torch.inf]
        chosen = chosen[: max(1, int((costs[chosen] <= limit).sum()))]
        if not len(chosen) or float(costs[chosen[0]]) > limit:
            return None
        if self.last and len(chosen) > 1:
            chosen = self._leave_one(chosen)
        sizes = (taken(self.stays.to(self.weight), self.units[chosen]) > 0).sum(1)
        fitting = sizes.cumsum(0) - sizes.div(2, rounding_mode="floor") <= most
        chosen = chosen[fitting]
        return chosen if len(chosen) else None

    def _leave_one(self, chosen: Tensor) -> Tensor:
        """Returns the units without those that would empty a layer."""
        counts = self.left.new_zeros(len(self.shapes), dtype=torch.int64).index_add_(0, self.owner, self.left.long())
        owners = self.owner[chosen]
        ranks = torch.stack([(owners[:i] == owner).sum() for i, owner in enumerate(owners)])
        return chosen[ranks < counts[owners] - 1]

    def remove(self, chosen: Tensor) -> dict[str, Any]:
        """Removes units as one group: the change of the others, and the inverse without them."""
        positions = self.units[chosen].flatten()
        positions = positions[positions >= 0]
        positions = positions[self.stays[positions]]
        columns = self.inverse[:, positions]
        factors = torch.linalg.solve(columns[positions], torch.cat([self.weight[positions, None], columns.T], dim=1))
        loss = float(self.weight[positions] @ factors[:, 0]) / 2
        self.weight -= columns @ factors[:, 0]
        self.inverse -= columns @ factors[:, 1:]
        self.weight[positions], self.stays[positions], self.left[chosen] = 0.0, False, False
        self.inverse[positions], self.inverse[:, positions] = 0.0, 0.0
        self.removals += 1
        if self.removals % SYMMETRIC == 0:
            self.inverse = (self.inverse + self.inverse.T) / 2
        self.kept -= len(positions)
        return {"units": self.units[chosen, 0].tolist(), "kept": self.kept, "loss": loss}

    @torch.no_grad()
    def write(self) -> None:
        """Writes weights and masks into the model."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        weights: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for name, weight, stays in zip(
            self.shapes, torch.split(self.weight, sizes), torch.split(self.stays, sizes), strict=True
        ):
            weights[name], masks[name] = weight.view(self.shapes[name]), stays.view(self.shapes[name])
        weights, masks = oriented(self.layers, weights), oriented(self.layers, masks)
        for name, layer in self.layers.items():
            layer.raw.copy_(weights[name])
        mask(self.pruner.model, masks)
        enforce(self.pruner.model)


def fits(task: Task, config: ObsConfig) -> None:
    """Raises unless layers, pattern and budget fit the task's model, and its weights are few enough."""
    Obs(task.build(), config, start=False)


@method("obs", ObsConfig, check=fits, paper="Hassibi, Stork 1993", purpose="small networks, full second order")
def obs(task: Task, run: Run, config: ObsConfig) -> nn.Module:
    """OBS: delete what costs least by the exact inverse Hessian, the others compensate; retrain when nothing is cheap."""
    model = dense_model(task, run, config.dense)

    def work() -> dict[str, Any]:
        pruner = Obs(model, config, evidence=evidence(task, run, config), start=False)
        before, loss = pruner.masks.kept, pruner.mean_loss()
        rows = pruner.remove(pruner.target, limit=config.cheap * loss, least=max(1, int(config.least * before)))
        kept = pruner.masks.kept
        predicted = sum(row["loss"] for row in rows)
        return {"kept": kept, "loss": loss, "predicted": predicted, "done": kept <= pruner.target or kept == before}

    run.observations["rounds"] = rounds(task, run, model, config, work)
    return model
