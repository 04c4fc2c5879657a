"""Recipes: what to run, as one frozen value that YAML, the command line and Python share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from microglia.core.errors import MicrogliaError, UnknownNameError
from microglia.lab.recipe_task import settle_task
from microglia.methods import MethodConfig, methods
from microglia.methods.arguments import check_choices
from microglia.methods.what import is_taken, left_out
from microglia.runtime.dense.kinds import execution_names
from microglia.storage.plain_yaml import DEEPEST, parse_yaml, read_yaml_text
from microglia.train.optim import RECOVERY, FitConfig, identity

LATER = ("task", "task_options")
"""Fields that recipes of version 0.1.0 do not have."""
MOST, LONGEST = 20, 200
"""Problems of a recipe that are told at once, and characters of each value in them."""


class RecipeError(MicrogliaError):
    """A recipe that is not valid; the text names the field."""


@dataclass(frozen=True)
class MeasureConfig:
    """What to measure of the result.

    Attributes:
        latency: Whether to time dense and pruned, eager, packed and compiled.
        batch: Examples per timed call.
        rounds: Interleaved rounds.
        executions: Ways to run each model; ``compiled`` takes half a minute to prepare, another engine (``onnxruntime``,
            ``openvino``, ``openvino-int8``) seconds. ``all`` stands for every exact one that is installed.
        accelerate: Whether to choose the fastest exact execution of the pruned model by timing (CPU), and to prove on the
            test images that no prediction changed.
        trajectory: Whether to keep the weights after every epoch of the last training, for ``microglia surface --trajectory``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    latency: bool = True
    batch: int = 1
    rounds: int = 30
    executions: tuple[str, ...] = ("eager", "packed", "compiled")
    accelerate: bool = False
    trajectory: bool = False

    def __post_init__(self) -> None:
        try:
            execution_names(self.executions)
        except UnknownNameError as error:
            raise ValueError(f"executions: {error}") from None


@dataclass(frozen=True)
class Recipe:
    """One run: which model, on which data, pruned how, trained how.

    Attributes:
        model: A zoo name, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` or ``package.module:function``.
        data: ``digits``, ``cifar10``, ``mnist``, ``hf:NAME`` or a folder.
        checkpoint: File with trained weights; without one the dense model is trained first.
        normalize: Statistics by name (``imagenet``, ``cifar10`` ...), ``data`` for the data set's own, or ``auto``: the data
            set's own, or with a checkpoint those among the usual ones under which it fits the training images best.
        image_size: Side to resize images to, or None for their own.
        label_smoothing: In [0, 1), of the training loss.
        task: What the model is for: a mapping with ``kind`` and the options of that kind, or ``package.module:function``, which
            returns a `microglia.Task`. None for image classification with the four fields above, which are its options.
        task_options: Keywords of that function.
        method: A name that ``microglia methods`` lists; ``channels`` by default where the budget has ``flops`` or ``ms``.
        prune: The fields of that method's config, except the trainings below.
        dense: Training of the dense model.
        train: Training after (or while) pruning; by default the method's own.
        measure: What to measure.
        seed: Root of every random number.
        device: ``cpu``, ``cuda``, or ``auto``: what the run began on, and for a new run a GPU where there is one.
        threads: CPU threads, or None for torch's choice.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str = "conv-2"
    data: str = "digits"
    checkpoint: str | None = None
    normalize: str = "auto"
    image_size: int | None = None
    label_smoothing: float = 0.0
    task: str | dict[str, Any] | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    method: str = "magnitude"
    prune: dict[str, Any] = field(default_factory=dict)
    dense: FitConfig = field(default_factory=FitConfig)
    train: FitConfig = RECOVERY
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    seed: int = 0
    device: Literal["cpu", "cuda", "auto"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is at least 1; got {self.threads}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is at least 0 and below 2^31; got {self.seed}")


_recipe = TypeAdapter(Recipe)


def method_config(recipe: Recipe) -> MethodConfig:
    """Returns the validated config of the recipe's method.

    Raises:
        RecipeError: A field is unknown or wrong; the text names it.
    """
    chosen = methods[recipe.method]
    fields = {**chosen.defaults, **recipe.prune, "dense": asdict(recipe.dense), "train": asdict(recipe.train)}
    check_choices(fields, chosen.config)
    return _validate(TypeAdapter(chosen.config), fields, f"prune (method {recipe.method!r})")  # type: ignore[no-any-return]


def resolve(source: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with every default of its method filled in, so that it says all that happens, and nothing else.

    Raises:
        RecipeError: A field is unknown or wrong; the text names it.
    """
    source = settle_task(source)
    defaults = {**as_dict(Recipe()), **_meant(source)}
    name = source.get("method", defaults["method"])
    if isinstance(name, str):  # anything else is refused below
        defaults["train"] = asdict(methods[name].training)
    recipe: Recipe = _validate(_recipe, merge(defaults, source), "recipe")
    config = method_config(recipe)
    prune = {key: value for key, value in asdict(config).items() if is_setting(type(config), key)}
    return _validate(_recipe, {**asdict(recipe), "prune": prune}, "recipe")  # type: ignore[no-any-return]


def is_setting(config: type[MethodConfig], name: str) -> bool:
    """Tells whether a field of a method's config is one of ``prune``: taken, and no training."""
    return is_taken(config, name) and name not in ("dense", "train")


def completed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe, as plain values, with the fields that its method does not take, at the defaults they stay at.

    Version 0.1 wrote these out. With them a run has the same identity whichever version wrote its recipe.
    """
    prune, name = recipe.get("prune"), recipe.get("method")
    if not isinstance(prune, Mapping) or not isinstance(name, str) or name not in methods:
        return dict(recipe)
    usual = TypeAdapter(dict[str, Any]).dump_python(left_out(methods[name].config), mode="json")
    return {**recipe, "prune": {**usual, **prune}}


def _meant(source: Mapping[str, Any]) -> dict[str, str]:
    """Returns the method that a budget alone can mean: only removed channels save operations and time."""
    prune = source.get("prune")
    if not isinstance(prune, Mapping) or (prune.get("flops") is None and prune.get("ms") is None):
        return {}
    return {"method": "channels"} if prune.get("pattern", "channel") == "channel" else {}


def begun(recipe: Recipe, directory: Path | None) -> Recipe:
    """Returns the recipe with the device that a run directory began on, where the recipe leaves the device to the house.

    A run goes on where it began: another device would give other bits, and ``cpu`` was the default before ``auto`` was.
    """
    if recipe.device != "auto" or directory is None:
        return recipe
    try:
        stored = read_yaml(directory / "recipe.yaml")
    except RecipeError:  # a new run, or a file that the run itself refuses
        return recipe
    device = stored.get("recipe", stored).get("device") if isinstance(stored.get("recipe", stored), Mapping) else None
    return replace(recipe, device=device) if device in ("cpu", "cuda") else recipe


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns a recipe as plain JSON values: what a run is known by.

    Fields that came later are there where they differ from their defaults, so that runs of earlier versions go on.
    """
    found = as_whole_dict(recipe)
    trainings = {name: identity(found[name]) for name in ("dense", "train")}
    return {key: trainings.get(key, value) for key, value in found.items() if value or key not in LATER}


def as_whole_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns a recipe as plain JSON values, every field of it."""
    return _recipe.dump_python(recipe, mode="json")  # type: ignore[no-any-return]


def schema(method: str | None = None) -> dict[str, Any]:
    """Returns the JSON schema of a recipe, with ``prune`` spelled out for a method if one is named."""
    found = _recipe.json_schema()
    if method is not None:
        config = methods[method].config
        prune = TypeAdapter(config).json_schema()
        prune["properties"] = {key: value for key, value in prune["properties"].items() if is_setting(config, key)}
        prune["properties"]["pattern"]["description"] = f"{config.takes.forms}."
        found["properties"]["prune"] = prune
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Raises:
        RecipeError: The file is missing or holds something else.
    """
    try:
        content = read_yaml_text(path)
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not valid YAML for a recipe: {error}.") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} should hold a mapping such as 'model: resnet20'; it holds {type(content).__name__}.")
    return content


def override(source: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Returns a nested mapping with ``key=value`` assignments applied, such as ``train.epochs=3``; values are YAML."""
    result: dict[str, Any] = {**source}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise RecipeError(f"Overrides look like key=value, such as train.epochs=3; got {assignment!r}.")
        try:
            value = parse_yaml(text)
        except ValueError:
            raise RecipeError(
                f"The value in {_brief(assignment)} is not valid YAML; quote it, as in 'key=\"[text\"'."
            ) from None
        result = put(result, key, value)
    return result


def put(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Returns a copy of a nested mapping with the value at a dotted key."""
    if key.count(".") > DEEPEST:
        raise RecipeError(f"The key {_brief(key)} has {key.count('.'):,} dots; no recipe is as deep.")
    first, _, rest = key.partition(".")
    if rest:
        below = tree.get(first) or {}
        if not isinstance(below, Mapping):
            raise RecipeError(f"{first!r} holds {below!r}, so {key!r} cannot be set below it.")
        value = put(below, rest, value)
    return {**tree, first: value}


def merge(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested defaults with what is given put over them, so that ``train.epochs`` alone keeps the default rate."""
    result = dict(defaults)
    for key, value in given.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def _validate(adapter: TypeAdapter[Any], fields: Mapping[str, Any], what: str) -> Any:
    try:
        return adapter.validate_python(dict(fields))
    except ValidationError as error:
        lines = []
        problems = error.errors()
        for problem in problems[:MOST]:
            place = ".".join(str(part) for part in problem["loc"]) or what
            whole = problem["type"] == "missing" or isinstance(problem["input"], Mapping)
            given = "" if whole else f"; got {_brief(problem['input'])}"
            message = "there is no such field" if problem["type"].endswith("unexpected_keyword_argument") else problem["msg"]
            lines.append(f"{place}: {message}{given}")
        lines += [f"and {len(problems) - MOST} more"] if len(problems) > MOST else []
        raise RecipeError(f"The {what} is not valid: " + " | ".join(lines)) from None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
