"""Results: the typed outcome of a run, and the JSON form in its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, ValidationError

from microglia.measure import Bytes, LatencyReport, Macs, Parameters
from microglia.measure.shown import Shown
from microglia.methods import methods  # imports the families, which register their observations  # noqa: F401
from microglia.storage.observations import observations
from microglia.storage.validation import adapter_of

T = TypeVar("T")
DETAILS = {"layers", "nonzero_all", "other"}
"""Keys of a measurement that only the run's own directory holds."""


def _sums(value: Parameters | Macs) -> dict[str, Any]:
    return {key: number for key, number in value.to_dict().items() if key not in DETAILS}


def _named(value: Any) -> Any:
    """Refuses stored times whose best execution was not timed."""
    if isinstance(value, Mapping):
        for model, execution in dict(value.get("best", {})).items():
            if execution not in value.get("timings", {}).get(model, {}):
                raise ValueError(f"latency has no timing of {execution!r} for the {model} model")
    return value


def _positive(value: LatencyReport) -> LatencyReport:
    for model, timings in value.timings.items():
        if not timings or not value.best(model)[1].median > 0:
            raise ValueError(f"the latency of the {model} model is not positive")
    return value


@dataclass(frozen=True)
class Environment:
    """The environment of a run: versions, machine and threads."""

    microglia: str
    torch: str
    python: str
    platform: str
    processor: str
    threads: int
    cores: int | None = None
    gpu: str | None = None


@dataclass(frozen=True)
class Observed:
    """One model at one moment of a run.

    Attributes:
        metrics: Metrics on the test split; None for one that is not finite.
        parameters: Parameters, and those kept.
        macs: Multiply-accumulates of one sample.
        bytes: Size on disk.
    """

    metrics: dict[str, float | None]
    parameters: Annotated[Parameters, PlainSerializer(_sums)]
    macs: Annotated[Macs, PlainSerializer(_sums)]
    bytes: Bytes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a finished run.

    Attributes:
        recipe: The resolved recipe.
        environment: Environment of the run.
        task: Model and data, in words.
        headline: Name of the main metric.
        units: Unit of each metric: ``%`` for a fraction that is shown in per cent; empty if the version did not store it.
        asked: Budget: ``density``, ``params`` and ``flops`` are fractions, ``ms`` is a time; None or missing if not requested.
        dense: The model before pruning.
        pruned: The model at the end.
        before: The pruned model before recovery, if the method has such a moment.
        latency: Measured times of ``dense`` and ``pruned``, if they were measured.
        seconds: Duration of the run.
        densities: Kept fraction of each masked layer.
        observations: Further observations of the method, by name, each of its registered type; see
            `microglia.storage.observations`.
    """

    recipe: dict[str, Any]
    environment: Environment
    task: str
    headline: str
    asked: dict[str, float | None]
    dense: Observed
    pruned: Observed
    before: Observed | None = None
    units: dict[str, str] = field(default_factory=dict)
    latency: Annotated[
        LatencyReport | None,
        BeforeValidator(_named),
        AfterValidator(lambda value: value and _positive(value)),
        PlainSerializer(lambda value: value and value.to_dict()),
    ] = None
    seconds: float = 0.0
    densities: dict[str, float] = field(default_factory=dict)
    observations: dict[str, Any] = field(default_factory=dict)

    def observed(self, kind: type[T]) -> T | None:
        """Returns the observation of a type, or None if the run has none."""
        return next((found for found in self.observations.values() if isinstance(found, kind)), None)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Result(Shown, Outcome, dict[str, Any]):
    """An outcome that is also its JSON form: ``result.pruned.macs.total`` and ``result["pruned"]["macs"]["total"]``.

    As a mapping it holds all keys of ``result.json``, more than the fields; `json.dumps` writes it.
    """

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Result:
        """Returns the result of a JSON form.

        Raises:
            ValueError: A field is missing or wrong; the text names it.
        """
        typed = read(Outcome, content)
        result = cls(**{one.name: getattr(typed, one.name) for one in fields(typed)})
        result.update(content)
        return result


def read(kind: type[T], content: Mapping[str, Any]) -> T:
    """Returns an `Outcome`, or a subclass, from its JSON form, in which observations are beside the other fields.

    Raises:
        ValueError: A field is missing or wrong; the text names it.
    """
    return _parse(kind, {**content, "observations": typed_observations(content)})


def typed_observations(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the observations of a JSON form, by name, each of its registered type.

    Raises:
        ValueError: A field is missing or wrong; the text names it.
    """
    stored = {name: content[name] for name in observations if content.get(name) is not None}
    return {name: _parse(observations[name], value, name) for name, value in stored.items()}


def written(outcome: Outcome) -> dict[str, Any]:
    """Returns the JSON form that `read` takes, only with sums, without the counts of each layer."""
    content: dict[str, Any] = adapter_of(type(outcome)).dump_python(outcome, mode="json")
    told = content.pop("observations")
    return {**content, **dict.fromkeys(observations), **told}


def _parse(kind: type[T], value: Any, *place: str) -> T:
    try:
        typed: T = adapter_of(kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, (*place, *problem["loc"])))
        message = "is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where} {message}".strip()) from None
    return typed
