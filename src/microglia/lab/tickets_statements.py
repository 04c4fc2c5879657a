"""What Frankle and Carbin 2019 say of tickets in LeNet (survey 5.1, 5.6), each held against what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ARMS = ("dense", "iterative", "oneshot", "reinit", "shuffle")
"""The whole network; tickets found step by step and at once; of the iterative ones other initial weights and other places."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Statement:
    """That one arm does better than another one at all densities of a range.

    Attributes:
        text: For people.
        arm: Which does better.
        against: Than which, at the same density; or ``dense``.
        least: Smallest density it is said of.
        most: Largest.
        measure: ``accuracy``, on the test split at the end of training, or ``early_stop``, the step of least validation loss,
            where fewer are better.
    """

    text: str
    arm: str
    against: str
    least: float
    most: float
    measure: str


ACCURATE, FAST = "accuracy", "early_stop"
STATEMENTS = (
    Statement("Tickets at 21 % beat other initial weights.", "iterative", "reinit", 0.205, 0.215, ACCURATE),
    Statement("Tickets at 21 % learn faster than other initial weights.", "iterative", "reinit", 0.205, 0.215, FAST),
    Statement("Below 40 % tickets learn faster than other initial weights.", "iterative", "reinit", 0.0, 0.4, FAST),
    Statement("Below 40 % tickets beat random masks of the same layer counts.", "iterative", "shuffle", 0.0, 0.4, ACCURATE),
    Statement(
        "One-shot tickets of 67.5 to 17.6 % learn faster than the dense network.", "oneshot", "dense", 0.176, 0.675, FAST
    ),
    Statement("One-shot tickets of 95 to 5.17 % beat the dense network.", "oneshot", "dense", 0.0517, 0.95, ACCURATE),
    Statement("Below 10 % iterative tickets beat one-shot ones.", "iterative", "oneshot", 0.0, 0.1, ACCURATE),
)


def statements(summary: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Returns each statement with ``text``, ``holds`` (at every level within; None without any) and ``found``, the numbers.

    Args:
        summary: See `microglia.lab.tickets_view.summarize`.
    """
    means: dict[str, dict[float, Mapping[str, Any]]] = {}
    for row in summary:
        means.setdefault(row["arm"], {})[row["density"]] = row
    return [_judge(statement, means) for statement in STATEMENTS]


def _judge(statement: Statement, means: Mapping[str, Mapping[float, Mapping[str, Any]]]) -> Json:
    own, others = means.get(statement.arm, {}), means.get(statement.against, {})
    pairs = []
    for density, row in own.items():
        other = next(iter(others.values()), None) if statement.against == "dense" else others.get(density)
        if statement.least <= density <= statement.most and other is not None:
            pairs.append((density, row[statement.measure]["mean"], other[statement.measure]["mean"]))
    better = [(a > b) if statement.measure == "accuracy" else (a < b) for _, a, b in pairs]
    shown = [(d, 100 * a, 100 * b) for d, a, b in pairs] if statement.measure == "accuracy" else pairs
    cells = [f"{100 * d:.1f} %: {a:.5g} against {b:.5g}" for d, a, b in shown]
    found = f"at {sum(better)} of {len(better)} levels; " + "; ".join(cells[:1] + cells[1:][-1:]) if pairs else ""
    return {"text": statement.text, "holds": all(better) if pairs else None, "found": found}
