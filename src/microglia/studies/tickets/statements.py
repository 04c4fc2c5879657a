"""Statements of Frankle and Carbin 2019 on tickets in LeNet (survey 5.1, 5.6), each held against what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ARMS = ("dense", "iterative", "oneshot", "reinit", "shuffle")
"""The whole network; tickets found step by step and at once; of the iterative ones other initial weights and other places."""
NAMES = {
    "dense": "dense",
    "iterative": "winning tickets, iterative",
    "oneshot": "winning tickets, one-shot",
    "reinit": "iterative mask, other initial weights",
    "shuffle": "random mask, same layer counts",
}
"""Each arm for people."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Statement:
    """That one arm does better than another one at all densities of a range.

    Attributes:
        text: The statement for people.
        arm: The arm that does better.
        against: The arm that does worse at the same density; or ``dense``.
        least: Smallest density of the statement.
        most: Largest density.
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
    """Returns each statement with ``text``, ``holds`` and ``found``, the numbers.

    A statement holds where it does at every level within, by more than one pooled standard error of the difference; ``holds``
    is None without any such level, and where one run of each arm leaves the error unknown.

    Args:
        summary: See `microglia.studies.tickets.study.summarize`.
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
            pairs.append((density, row, other))
    verdicts = [_better(statement.measure, row, other) for _, row, other in pairs]
    factor = 100 if statement.measure == ACCURATE else 1
    cells = []
    for density, *ends in pairs:
        a, b = (factor * row[statement.measure]["mean"] for row in ends)
        error = _pooled_error(*(row[statement.measure] | {"n": row["n"]} for row in ends))
        spread = "" if error is None else f" (standard error {factor * error:.2g})"
        cells.append(f"{100 * density:.1f} %: {a:.5g} against {b:.5g}{spread}")
    found = f"at {verdicts.count(True)} of {len(pairs)} levels; " + "; ".join(cells[:1] + cells[1:][-1:]) if pairs else ""
    if found and None in verdicts:
        found += "; one run an arm has no standard error"
    decided = bool(pairs) and None not in verdicts
    return {"text": statement.text, "holds": all(verdicts) if decided else None, "found": found}


def _better(measure: str, row: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    """Returns whether one arm is better than another one by more than a pooled standard error; None where there is none."""
    gain = row[measure]["mean"] - other[measure]["mean"]
    error = _pooled_error(row[measure] | {"n": row["n"]}, other[measure] | {"n": other["n"]})
    return None if error is None else (gain if measure == ACCURATE else -gain) > error


def _pooled_error(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Returns the pooled standard error of a difference of two means, s sqrt(1/n + 1/m); None of one run each.

    s^2 is the mean of the two sample variances weighted with n - 1 and m - 1.
    """
    freedom = one["n"] + other["n"] - 2
    if freedom < 1:
        return None
    squares = sum((arm["n"] - 1) * (arm["std"] or 0.0) ** 2 for arm in (one, other))
    return math.sqrt(squares / freedom * (1 / one["n"] + 1 / other["n"]))
