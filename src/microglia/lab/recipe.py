"""Recipes: the description of a run as one frozen value, shared by YAML, the command line and Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from microglia.core.errors import MicrogliaError, UnknownNameError
from microglia.lab.recipe_task import settle_task
from microglia.methods import MethodConfig, methods
from microglia.methods.arguments import check_choices
from microglia.methods.what import is_taken, left_out, named
from microglia.runtime.dense.kinds import execution_names
from microglia.storage.plain_yaml import DEEPEST, EXAMPLES, merge, parse_yaml, read_yaml_text
from microglia.storage.validation import adapter_of, brief, problems
from microglia.train.optim import RECOVERY, FitConfig, identity

LATER = ("model_options", "task", "task_options", "track")
"""Fields that recipes of version 0.1.0 lack."""
AFTER_DENSE = ("method", "prune", "train", "measure", "track")
"""Fields that do not reach the training of the dense network."""


class RecipeError(MicrogliaError):
    """A recipe that is not valid; the text names the field."""


@dataclass(frozen=True)
class MeasureConfig:
    """The measurements of the result.

    Attributes:
        latency: Whether to time the dense and the pruned model.
        batch: Examples per timed call.
        rounds: Interleaved rounds.
        executions: Ways to run each model; ``compiled`` takes half a minute to prepare, another engine (``onnxruntime``,
            ``openvino``, ``openvino-int8``) seconds. ``all`` stands for every exact one that is installed.
        accelerate: Whether to choose the pruned model's fastest exact execution, with the same predictions on test images.
        trajectory: Whether to keep the weights after every epoch of the last training, for ``microglia surface --trajectory``.
        split: Images that the metrics of the result are about: ``test``, or ``validation`` for runs among which one is chosen,
            so that the choice does not see the test images.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    latency: bool = True
    batch: int = 1
    rounds: int = 30
    executions: tuple[str, ...] = ("eager", "packed", "compiled")
    accelerate: bool = False
    trajectory: bool = False
    split: Literal["test", "validation"] = "test"

    def __post_init__(self) -> None:
        try:
            execution_names(self.executions)
        except UnknownNameError as error:
            raise ValueError(f"executions: {error}") from None


@dataclass(frozen=True)
class Recipe:
    """One run: its model, data, pruning and trainings.

    Attributes:
        model: A zoo name, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` or ``package.module:function``.
        data: ``digits``, ``cifar10``, ``mnist``, ``hf:NAME`` or a folder.
        checkpoint: Trained weights: a file, or the directory of a run; without it the dense model is trained first.
        normalize: Statistics by name (``imagenet``, ``cifar10`` ...), ``data`` for the data set's own, or ``auto``. ``auto``
            means the data set's own; with a checkpoint the usual statistics that fit the training images best.
        image_size: Side to resize images to, or None for their own.
        label_smoothing: Label smoothing of the training loss, in [0, 1).
        model_options: Options of the model, such as ``{width: 0.25}``; see `microglia.tasks.build`.
        task: The task of the model: a mapping with ``kind`` and the options of that kind, or ``package.module:function``, which
            returns a `microglia.Task`. None means image classification with the five fields above as options.
        task_options: Keywords of the task function.
        method: A name that ``microglia methods`` lists; by default ``channels`` if the budget has ``flops`` or ``ms``.
        prune: The fields of that method's config, except the trainings below.
        dense: Training of the dense model.
        train: Training after (or while) pruning; by default the method's own.
        measure: The measurements.
        seed: Root of every random number.
        device: ``cpu``, ``cuda``, or ``auto``: the device on which the run began; for a new run a GPU if there is one.
        threads: CPU threads, or None for torch's choice.
        track: Trackers that follow the run: ``tensorboard``, ``mlflow``, ``wandb``. They do not belong to its identity.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: str = "conv-2"
    data: str = "digits"
    checkpoint: str | None = None
    normalize: str = "auto"
    image_size: int | None = None
    label_smoothing: float = 0.0
    model_options: dict[str, Any] = field(default_factory=dict)
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
    track: tuple[str, ...] = ()

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
    with named(recipe.method):
        return _validate(adapter_of(chosen.config), fields, f"prune (method {recipe.method!r})")  # type: ignore[no-any-return]


def resolve(source: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with every default of its method filled in, so that it describes the run completely.

    Raises:
        RecipeError: A field is unknown or wrong; the text names it.
    """
    source = settle_task(source)
    defaults = {**as_dict(Recipe()), **_meant(source)}
    name = named_method(source)
    if isinstance(name, str):  # other values are refused below
        defaults["train"] = asdict(methods[name].training)
    recipe: Recipe = _validate(_recipe, merge(defaults, source), "recipe")
    config = method_config(recipe)
    prune = {key: value for key, value in asdict(config).items() if is_setting(type(config), key)}
    return _validate(_recipe, {**asdict(recipe), "prune": prune}, "recipe")  # type: ignore[no-any-return]


def is_setting(config: type[MethodConfig], name: str) -> bool:
    """Tells whether a field of a method's config belongs to ``prune``: taken, and not a training."""
    return is_taken(config, name) and name not in ("dense", "train")


def completed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe, as plain values, with the fields that its method does not take, at their defaults; without ``track``.

    Version 0.1 wrote these fields. With them a run's identity does not depend on the version that wrote its recipe.
    """
    recipe = {key: value for key, value in recipe.items() if key != "track"}
    prune, name = recipe.get("prune"), recipe.get("method")
    if not isinstance(prune, Mapping) or not isinstance(name, str) or name not in methods:
        return dict(recipe)
    usual = adapter_of(dict[str, Any]).dump_python(left_out(methods[name].config), mode="json")
    return {**recipe, "prune": {**usual, **prune}}


def named_method(source: Mapping[str, Any]) -> Any:
    """Returns the name of a recipe's method: as given, or as its budget implies."""
    return source.get("method", _meant(source).get("method", Recipe.method))


def _meant(source: Mapping[str, Any]) -> dict[str, str]:
    """Returns the method that follows from a budget: only removed channels save operations and time."""
    prune = source.get("prune")
    if not isinstance(prune, Mapping) or (prune.get("flops") is None and prune.get("ms") is None):
        return {}
    return {"method": "channels"} if prune.get("pattern", "channel") == "channel" else {}


def begun(recipe: Recipe, directory: Path | None) -> Recipe:
    """Returns the recipe with the device on which a run directory began, if the recipe's device is ``auto``.

    A run resumes on the device where it began: another device would give other bits. Before ``auto`` the default was ``cpu``.
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
    """Returns a recipe as plain JSON values, the identity of a run.

    Later fields are included only if they differ from their defaults, so that runs of earlier versions resume.
    """
    found = as_whole_dict(recipe)
    changed = {name: identity(found[name]) for name in ("dense", "train")}
    changed["measure"] = {key: value for key, value in found["measure"].items() if (key, value) != ("split", "test")}
    changed["prune"] = (methods[recipe.method].config if recipe.method in methods else MethodConfig).identity(found["prune"])
    return {key: changed.get(key, value) for key, value in found.items() if value or key not in LATER}


def identity_of(recipe: Recipe) -> str:
    """Returns the identity of a recipe: equal for all recipes that end in the same bits and are measured equally."""
    return hashlib.sha256(json.dumps(completed(as_dict(recipe)), sort_keys=True).encode()).hexdigest()[:16]


def start_of(recipe: Mapping[str, Any]) -> str:
    """Returns the name of a recipe's start: recipes with the same one have the same dense network, bit for bit.

    All counts but what happens to the dense network afterwards: the method with its settings, its training, measurements.
    """
    start = {key: value for key, value in recipe.items() if key not in AFTER_DENSE}
    return hashlib.sha256(json.dumps(start, sort_keys=True).encode()).hexdigest()[:16]


def as_whole_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns a recipe as plain JSON values, with every field."""
    return _recipe.dump_python(recipe, mode="json")  # type: ignore[no-any-return]


def schema(method: str | None = None) -> dict[str, Any]:
    """Returns the JSON schema of a recipe, with ``prune`` spelled out for a method if one is named."""
    found = _recipe.json_schema()
    if method is not None:
        config = methods[method].config
        prune = adapter_of(config).json_schema()
        prune["properties"] = {key: value for key, value in prune["properties"].items() if is_setting(config, key)}
        prune["properties"]["pattern"]["description"] = f"{config.takes.forms}."
        found["properties"]["prune"] = prune
    return found


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """Returns the mapping in a YAML file.

    Args:
        path: The file.
        what: Noun for the content, in errors.

    Raises:
        RecipeError: The file is missing or does not hold a mapping.
    """
    try:
        content = read_yaml_text(path)
    except OSError as error:
        raise RecipeError(f"Cannot read the {what} {path}: {error.strerror}.") from error
    except ValueError as error:
        raise RecipeError(f"The {what} {path} is not valid YAML: {error}.") from error
    if not isinstance(content, dict):
        raise RecipeError(f"A {what} is a mapping such as {EXAMPLES[what]}; {path} holds a {type(content).__name__}.")
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
            raise RecipeError(f"The value in {brief(assignment)} is not valid YAML; quote it, as in 'key=\"[text\"'.") from None
        result = put(result, key, value)
    return result


def put(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Returns a copy of a nested mapping with the value at a dotted key."""
    if key.count(".") > DEEPEST:
        raise RecipeError(f"The key {brief(key)} has {key.count('.'):,} dots; a recipe has at most {DEEPEST} levels.")
    first, _, rest = key.partition(".")
    if rest:
        below = tree.get(first) or {}
        if not isinstance(below, Mapping):
            raise RecipeError(f"{first!r} holds {below!r}, so {key!r} cannot be set below it.")
        value = put(below, rest, value)
    return {**tree, first: value}


def _validate(adapter: TypeAdapter[Any], fields: Mapping[str, Any], what: str) -> Any:
    try:
        return adapter.validate_python(dict(fields))
    except ValidationError as error:
        raise RecipeError(f"The {what} is not valid: {problems(error, what)}") from None
