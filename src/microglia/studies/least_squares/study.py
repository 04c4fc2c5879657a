"""Double descent where it can be computed: the risk of least squares over the number of features, exact and simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from microglia.core.errors import MicrogliaError
from microglia.report.chart import COLORS, Axis, Chart, Line, Look, Panel, Rule
from microglia.storage.run import Progress, Run
from microglia.studies.least_squares.regression import bias_risk, optimal_ridge, simulate, variance_risk
from microglia.studies.least_squares.result import Risk, Risks
from microglia.studies.listed import LISTED
from microglia.studies.options import Option
from microglia.studies.places import under_runs
from microglia.studies.result import Told
from microglia.studies.study import Figure, Study, Work, conduct, register

FEATURES = (5, 10, 20, 30, 35, 38, 40, 42, 45, 50, 60, 80, 120, 160)
Json = dict[str, Any]


@dataclass(frozen=True)
class Regressing:
    """Which data to simulate: y = X b + e with Gaussian X and e.

    Attributes:
        samples: Rows of X.
        features: Columns of X, several numbers of them.
        noise: Variance of e.
        signal: Squared length of b, above 0.
        draws: Data sets for each number of features.
        seed: Root of the draws.
        out: Directory, to which more numbers of features can be added; None for one of its own under ``runs``.
    """

    samples: Annotated[int, Option(least=1)] = 40
    features: Annotated[Sequence[int], Option(least=1)] = FEATURES
    noise: float = 1.0
    signal: float = 1.0
    draws: int = 400
    seed: int = 0
    out: Path | None = None

    @property
    def record(self) -> Json:
        """All that a row depends on beside its number of features."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("features", "out")}
        return {"command": "least-squares", **settings}

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return self.out or under_runs("least-squares", self.record)


def view_least_squares(asked: Regressing) -> Told[Risks]:
    """Simulates least squares without a penalty and with the best one, draws the risks and returns them, JSON-ready.

    The result holds the settings and ``rows``: of each number of ``features`` the simulated ``risk`` with its standard
    ``error``, the ``exact`` risk (None where it is infinite), and ``ridge`` and ``ridge_error`` with the penalty of least risk.

    Source: survey 1.3, item 7; Nakkiran et al. 2021.

    Raises:
        MicrogliaError: A number is out of range.
    """
    return conduct(LEAST_SQUARES, asked)


def _begin(asked: Regressing) -> Work[Json]:
    if min(asked.features, default=0) < 1 or asked.draws < 2 or asked.noise < 0 or not 0 < asked.signal < math.inf:
        raise MicrogliaError(
            f"Least squares takes features of at least 1, draws of at least 2, noise of at least 0 and a signal above 0; got "
            f"{list(asked.features)}, {asked.draws}, {asked.noise} and {asked.signal}."
        )

    def measure(run: Run) -> Json:
        counts = sorted(set(asked.features))
        rows = [run.stage(f"features-{count}", partial(_row, asked, count)) for count in counts]
        return {**asked.record, "rows": rows}

    return Work(measure, asked.record, asked.seed)


def _row(asked: Regressing, features: int, progress: Progress) -> Json:
    settings: Json = {"noise": asked.noise, "signal": asked.signal, "draws": asked.draws, "seed": asked.seed}
    bare = simulate(asked.samples, features, **settings)
    best = simulate(asked.samples, features, ridge=optimal_ridge(features, asked.noise, asked.signal), **settings)
    exact = variance_risk(asked.samples, features, asked.noise) + bias_risk(asked.samples, features, asked.signal)
    return {
        "features": features,
        "risk": bare.total,
        "error": bare.total_error,
        "exact": exact if math.isfinite(exact) else None,
        "ridge": best.total,
        "ridge_error": best.total_error,
    }


def figures(told: Risks) -> list[Figure]:
    """Returns the risks over the number of features."""
    return [Figure("risk", risk_chart(told), told.rows, told)]


def risk_chart(told: Risks) -> Chart:
    """Returns exact and simulated risks on log scales, with the number of samples as an upright rule."""
    rows = told.rows
    places = [row.features for row in rows]
    exact = [math.nan if row.exact is None else row.exact for row in rows]
    lines = [
        Line("exact, without penalty", places, exact, look=Look(COLORS[0])),
        _simulated("simulated, without penalty", rows, ("risk", "error"), Look(COLORS[0], "circle", "")),
        _simulated("simulated, best penalty", rows, ("ridge", "ridge_error"), Look(COLORS[1], "square", "dash")),
    ]
    edge = Rule(told.samples, "samples", upright=True, label="samples")
    title = f"Least squares on {told.samples} samples, noise {told.noise:g}, {told.draws} draws"
    return Chart(title, [Panel(Axis("features", "log"), Axis("risk", "log"), lines, [edge])], legend=2)


def _simulated(name: str, rows: Sequence[Risk], keys: tuple[str, str], look: Look) -> Line:
    risks, errors = ([getattr(row, key) for row in rows] for key in keys)
    return Line(name, [row.features for row in rows], risks, y_error=errors, look=look)


# ----------------------------------------------------------------------------------------------------------- for people
def risk_table(told: Risks) -> Table:
    """Returns the table of all risks."""
    table = Table(title=f"Least squares on {told.samples} samples: risk, {told.draws} draws")
    for name in ("features", "exact", "simulated", "with the best penalty"):
        table.add_column(name, justify="right")
    for row in told.rows:
        exact = "infinite" if row.exact is None else f"{row.exact:.4g}"
        spreads = ((row.risk, row.error), (row.ridge, row.ridge_error))
        table.add_row(f"{row.features:,}", exact, *(f"{mean:.4g} ± {error:.2g}" for mean, error in spreads))
    table.caption = "Risk: squared distance of the estimate from the truth. Spread: standard error of the mean over draws."
    return table


LEAST_SQUARES = register(
    Study(
        "least-squares",
        LISTED["least-squares"].sentence,
        Regressing,
        _begin,
        tables=lambda told: [risk_table(told)],
        figures=figures,
        result=Risks,
        directory=lambda asked: asked.directory,
        example="microglia least-squares --samples 40 --features 10,20,40,80,160",
    )
)
