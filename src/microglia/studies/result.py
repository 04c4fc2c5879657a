"""Results of studies: frozen dataclasses, written to JSON and read from it by one base.

A study names the class of its result. Its stages are JSON; `decode` makes the typed result of them once, for tables and charts,
and `encode` writes it. A field is a key.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Place(Row):
    ...     x: float
    >>> place = decode(Place, {"x": 0.5, "loss": 2.0})
    >>> place.x, place.metrics
    (0.5, {'loss': 2.0})
    >>> encode(place)
    {'x': 0.5, 'loss': 2.0}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import core_schema

from microglia.core.errors import MicrogliaError
from microglia.storage.validation import problems

R = TypeVar("R")
Json = dict[str, Any]
Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]
"""A number that may be NaN or infinite, which JSON cannot store; null is stored instead, and read as NaN."""
PICTURES = "pictures"
"""Key of a result's JSON form that holds the paths of its figures."""
_adapters: dict[type, TypeAdapter[Any]] = {}


class ResultError(MicrogliaError):
    """A stored result that is not one of its study; the text names the field."""


class Result:
    """The base of a result and of its parts, which are frozen dataclasses.

    Attributes:
        optional: Fields whose key is left out of the JSON form if they are None.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    optional: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _from_json(cls, content: Any) -> Any:
        return content

    @classmethod
    def _to_json(cls, content: Json) -> Json:
        return {key: value for key, value in content.items() if value is not None or key not in cls.optional}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Returns the schema of the dataclass, with the two functions above around it."""
        schema = handler(source)
        written = core_schema.wrap_serializer_function_ser_schema(lambda one, inner: cls._to_json(inner(one)), schema=schema)
        return core_schema.no_info_before_validator_function(cls._from_json, schema, serialization=written)


@dataclass(frozen=True, kw_only=True)
class Row(Result):
    """A part with metrics, which stand beside its own keys in JSON.

    Attributes:
        metrics: Values by name; None for one that is not finite.
    """

    metrics: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def _from_json(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or "metrics" in content:
            return content
        own = {one.name for one in fields(cls)}
        metrics = {key: value for key, value in content.items() if key not in own}
        return {**{key: value for key, value in content.items() if key in own}, "metrics": metrics}

    @classmethod
    def _to_json(cls, content: Json) -> Json:
        metrics = content.pop("metrics")
        return {**super()._to_json(content), **metrics}


@dataclass(frozen=True)
class MeanStd(Result):
    """Mean and standard deviation; no deviation for one value."""

    mean: float
    std: float | None


class Told(dict[str, Any], Generic[R]):
    """The JSON form of a result, with the typed result beside it.

    Attributes:
        result: The result.
    """

    def __init__(self, result: R, **more: Any) -> None:
        super().__init__({**encode(result), **more})
        self.result = result


def encode(result: Any) -> Json:
    """Returns the JSON form of a result, a part of one, or a mapping."""
    if isinstance(result, Mapping):
        return dict(result)
    return _adapter(type(result)).dump_python(result, mode="json")  # type: ignore[no-any-return]


def decode(kind: type[R], content: Mapping[str, Any]) -> R:
    """Returns the result in a JSON form; the paths of figures in it are left out.

    Args:
        kind: Class of the result.
        content: The JSON form, such as that of ``result.json``.

    Raises:
        ResultError: A field is missing, wrong or unknown; the text names it.
    """
    known = {key: value for key, value in content.items() if key != PICTURES}
    try:
        return _adapter(kind).validate_python(known)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise ResultError(f"The content is no {kind.__name__}: {problems(error, 'result')}.") from None


def _adapter(kind: type) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]
