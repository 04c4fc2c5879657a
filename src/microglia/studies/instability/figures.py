"""Instability against the parting epoch, and the lines themselves."""

from __future__ import annotations

from dataclasses import replace

from microglia.report.chart import COLORS, DASHES, Axis, Chart, Line, Look, Panel, Rule, look
from microglia.studies.instability.analysis import STABLE
from microglia.studies.instability.result import CopyPair, Instability
from microglia.studies.study import Figure


def figures(told: Instability) -> list[Figure]:
    """Returns instability against k beside the test error along each line.

    Args:
        told: See `microglia.studies.instability.study.sense`.
    """
    rows = [
        {"network": r.network, "density": r.density, "epoch": r.epoch, "seed": r.seed, "pair": r.pair}
        | {"alpha": alpha, "train_error": train, "test_error": test}
        for r in told.rows
        for alpha, train, test in zip(r.alphas, r.error["train"], r.error["test"], strict=True)
    ]
    return [Figure("lines", chart(told), rows, told)]


def _networks(told: Instability) -> list[str]:
    return list(dict.fromkeys(row.network for row in told.summary))


def _places(told: Instability, row: CopyPair) -> tuple[int, int]:
    """Returns which network a line belongs to, its dashes, and which epoch its copies part at, its color."""
    epochs = sorted({each.epoch for each in told.rows})
    return _networks(told).index(row.network), epochs.index(row.epoch)


def chart(told: Instability) -> Chart:
    """Returns instability against the parting epoch, means over seeds, beside the test error along each line."""
    rises = [_rise(told, name, place, split) for place, name in enumerate(_networks(told)) for split in ("test", "train")]
    left = Panel(
        Axis("epoch at which the copies part"),
        Axis("instability: rise of the error (%)", unit=" %"),
        rises,
        [Rule(100 * STABLE, "stable below")],
    )
    paths = [_path(told, row) for row in told.rows]
    right = Panel(Axis("place on the straight line between the copies"), Axis("test error (%)", unit=" %"), paths)
    return Chart(told.task, [left, right], columns=2, size=(12.5, 5.0), legend=0)


def _rise(told: Instability, network: str, place: int, split: str) -> Line:
    own = [row for row in told.summary if row.network == network]
    spreads = [row.instability[split] for row in own]
    return Line(
        f"{network}, {split}",
        [row.epoch for row in own],
        [100 * spread.mean for spread in spreads],
        y_error=[100 * (spread.std or 0.0) for spread in spreads],
        look=replace(look(place), dash="solid" if split == "test" else "dash"),
    )


def _path(told: Instability, row: CopyPair) -> Line:
    network, epoch = _places(told, row)
    return Line(
        f"{row.network}, k = {row.epoch}",
        row.alphas,
        [100 * error for error in row.error["test"]],
        look=Look(COLORS[epoch % len(COLORS)], dash=DASHES[network % len(DASHES)], width=1.2),
        notes=f"seed {row.seed}, pair {row.pair}",
    )
