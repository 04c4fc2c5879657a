"""The commands `prune`, `shrink`, `eval`, `measure`, `report`, `methods` and `recipe`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml
from rich.table import Table

from microglia.cli.app import command
from microglia.cli.options import Checkpoint, Data, Json, Shown, SplitName, Target, given_recipe
from microglia.cli.own_options import OwnOptionsCommand, own_settings
from microglia.core.errors import MicrogliaError
from microglia.core.patterns import PATTERN_FORMS
from microglia.lab.accelerating import accelerated
from microglia.lab.execute import execute
from microglia.lab.recipe import (
    Recipe,
    RecipeError,
    as_dict,
    as_whole_dict,
    completed,
    is_setting,
    override,
    put,
    read_yaml,
    resolve,
    schema,
)
from microglia.lab.recipe_task import spelled
from microglia.lab.shrinking import Shrinking, shrink_saved
from microglia.lab.target import open_target
from microglia.measure import measure as measure_model
from microglia.methods import MethodConfig
from microglia.methods import methods as known_methods
from microglia.methods.advice import advice, advice_table
from microglia.report.acceleration import acceleration_tables
from microglia.report.memory import before_run
from microglia.report.removed import PICTURE, draw_removed, removal_table
from microglia.report.summary import comparison_table, measurement_table, result_table
from microglia.report.write import collect
from microglia.report.write import export as export_records
from microglia.report.write import report as write_report
from microglia.runtime.dense.kinds import execution_names
from microglia.scores import scores
from microglia.storage.archive import original, saved_bytes
from microglia.storage.changes import changes_of
from microglia.tasks.task import SEEN, Split
from microglia.train.evaluate import evaluate

EXAMPLE = "microglia prune resnet20 --data cifar10 --method magnitude --density 0.2 --epochs 3"
MODELS = "A name of the zoo, timm:NAME, torchvision:NAME, hf:NAME or mypackage.module:function; then settings of the recipe."


def _under(panel: str) -> Callable[..., Any]:
    """Returns `typer.Option` with a heading for the help."""
    return partial(typer.Option, rich_help_panel=panel)


kept, trained, ran = _under("What to keep"), _under("Training"), _under("Run")


def prune(
    ctx: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [KEY=VALUE]...", help=MODELS)] = None,
    data: Data = None,
    checkpoint: Checkpoint = None,
    task: Annotated[str | None, typer.Option(help="Kind of task; by default the model's own. See docs/tasks.md.")] = None,
    method: Annotated[str | None, kept(help="See `microglia methods`.")] = None,
    pattern: Annotated[str | None, kept(help=", ".join(PATTERN_FORMS))] = None,
    scope: Annotated[str | None, kept(help="global, layer, row, erk, sensitivity:FILE; of channels: uniform, global.")] = None,
    density: Annotated[float | None, kept(help="Fraction of the prunable weights to keep, in (0, 1].")] = None,
    params: Annotated[float | None, kept(help="Fraction of all parameters to keep, in (0, 1].")] = None,
    flops: Annotated[float | None, kept(help="Fraction of the operations to keep: removes channels.")] = None,
    ms: Annotated[float | None, kept(help="Milliseconds per example, measured here: removes channels.")] = None,
    layers: Annotated[list[str] | None, kept(help="Layers to prune (name globs, type:Conv2d, role:classifier, !not).")] = None,
    exclude: Annotated[list[str] | None, kept(help="Layers neither pruned nor counted.")] = None,
    protect: Annotated[list[str] | None, kept(help="Layers kept dense but counted.")] = None,
    epochs: Annotated[int | None, trained(help="Epochs of training after (or while) pruning.")] = None,
    lr: Annotated[float | None, trained(help="Peak learning rate of that training.")] = None,
    accelerate: Annotated[bool | None, ran("--accelerate", help="Time its fastest execution, layer by layer.")] = None,
    seed: Annotated[int | None, ran(help="Root of every random number.")] = None,
    device: Annotated[str | None, ran(help="cpu, cuda, or auto (the default): a GPU if there is one.")] = None,
    recipe: Annotated[Path | None, ran(help="YAML recipe; options and KEY=VALUE override it.")] = None,
    out: Annotated[Path | None, ran(help="Run directory; the same command resumes there.")] = None,
    starts: Annotated[Path | None, ran(help="Directory in which runs share their dense networks.")] = None,
    track: Annotated[list[str] | None, ran(help="Trackers that follow the run: tensorboard, mlflow, wandb.")] = None,
    dry_run: Annotated[bool, ran("--dry-run", help="Check everything, say how much memory it needs, and run nothing.")] = False,
    json_: Json = False,
) -> Shown:
    """Prune a model on data: load or train it, prune, recover, measure, save.

    With `--method NAME` or `--task KIND`, this help lists the options of that method or task. Every other setting is a
    KEY=VALUE, such as `train.batch_size=64`; `microglia recipe` prints them all.
    """
    words = list(words or [])
    given = {
        "model": _taken_model(words), "track": track,
        "data": data, "checkpoint": checkpoint, "task.kind": task, "method": method, "seed": seed,
        "device": device, "train.epochs": epochs, "train.lr": lr, "prune.pattern": pattern, "prune.scope": scope,
        "prune.density": density, "prune.params": params, "prune.flops": flops, "prune.ms": ms, "prune.layers": layers,
        "prune.exclude": exclude, "prune.protect": protect, "measure.accelerate": accelerate, **own_settings(ctx),
    }  # fmt: skip
    source: dict[str, Any] = spelled(read_yaml(recipe)) if recipe is not None else {}
    for key, value in given.items():
        if value is not None and value != []:
            source = put(source, key, value)
    asked = given_recipe(source, words, recipe, typed=given)
    if "model" not in asked and not isinstance(asked.get("task"), str):  # a user's own task brings its model
        raise RecipeError(f"Which model is to be pruned? Name one, such as `{EXAMPLE}`, or give a --recipe that names one.")
    resolved = resolve(asked)
    directory = out if out is not None else _own_directory(resolved)
    if dry_run:
        return before_run(resolved, directory)
    result = execute(resolved, directory, starts=starts)
    shown: list[Any] = [f"Run: {directory}\nModel: {directory / 'model'}"]
    if result.get("accelerated"):
        shown = [*acceleration_tables(result["accelerated"]), *shown]
    if result.get("removed"):
        picture = draw_removed(result["removed"], f"{result['task']}: {resolved.method}", directory / PICTURE)
        shown = [removal_table(result["removed"]), *([f"Picture: {picture}"] if picture else []), *shown]
    return result, [result_table(result), *shown]


def _taken_model(words: list[str]) -> str | None:
    """Returns the name of the model that begins the words of a command, and takes it from them.

    Raises:
        RecipeError: A run or a saved model stands in its place.
    """
    if not words or "=" in words[0]:
        return None
    model = words.pop(0)
    if any((Path(model) / name).is_file() for name in ("recipe.yaml", "plan.json")):
        raise RecipeError(
            f"{model} is a directory, not a model. To start from its weights, name its model and give the directory as "
            f"the checkpoint: microglia prune MODEL --checkpoint {model}."
        )
    return model


command(prune, example=EXAMPLE, kind=OwnOptionsCommand)


@command
def shrink(
    target: Annotated[Path, typer.Argument(help="A run directory or a saved model's, masked by channels.")],
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the smaller model; default RUN/shrunk.")] = None,
    keep_class: Annotated[bool, typer.Option("--keep-class", help="Remove only what the model's own classes allow.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Zero biases of masked channels, so that all are removed.")] = False,
    latency: Annotated[bool, typer.Option(help="Whether to time the dense, masked and shrunk models.")] = True,
    json_: Json = False,
) -> Shown:
    """Remove masked channels physically: a smaller model, proved equal, saved beside the masked one."""
    asked = Shrinking(target, out, data, keep_class=keep_class, clear=clear, latency=latency)
    result = shrink_saved(asked)
    columns = {name: result[name] for name in ("dense", "masked", "shrunk")}
    caption = f"The outputs on test inputs differ from the masked model's by {result['difference']:.1e} at most."
    caption += " Biases and shifts of masked channels were set to zero first." if clear else ""
    table = comparison_table(columns, result["latency"], title=f"{result['task']}: shrunk", caption=caption)
    title = f"{result['task']}: channels before and after"
    picture = draw_removed(result["removed"], title, asked.directory / PICTURE)
    where = (f"Picture: {picture}\n" if picture else "") + f"Model: {asked.directory}"
    return result, [removal_table(result["removed"]), table, where]


@command
def eval(
    target: Target,
    data: Data = None,
    checkpoint: Checkpoint = None,
    split: SplitName = "test",
    json_: Json = False,
) -> Shown:
    """Evaluate a run, a saved model or a checkpoint."""
    model, task = open_target(target, data, checkpoint)
    metrics = evaluate(model, task, _split(split))
    seen = SEEN if split != "test" and task.pretrained else None
    table = Table("metric", split, title=task.name, caption=seen)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    return metrics, [table]


@command
def measure(
    target: Target,
    data: Data = None,
    checkpoint: Checkpoint = None,
    latency: Annotated[bool, typer.Option(help="Whether to time it.")] = True,
    accelerate: Annotated[bool, typer.Option("--accelerate", help="Choose its fastest execution, layer by layer.")] = False,
    precision: Annotated[str, typer.Option(help="Precision when accelerated: float32, or bf16, which rounds.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Examples per timed call.")] = 1,
    executions: Annotated[
        str | None,
        typer.Option(help="Ways to run it: torch, all (installed), or names with commas; default all, torch for --accelerate."),
    ] = None,
    json_: Json = False,
) -> Shown:
    """Measure a run, a saved model or a network: parameters, MACs, latency, bytes."""
    if precision != "float32" and not accelerate:
        raise MicrogliaError(f"--precision {precision} applies to the accelerated model: give it together with --accelerate.")
    kinds = None if executions is None else execution_names(executions.split(","))
    model, task = open_target(target, data, checkpoint)
    example = task.example_batch(batch)
    measured = {
        **measure_model(model, example, latency=latency, executions=kinds or "all").to_dict(),
        "saved": saved_bytes(target),
    }
    shown: list[Any] = []
    if accelerate:
        measured["accelerated"] = accelerated(model, task, batch, against=kinds or "torch", precision=precision)[1]
        shown = acceleration_tables(measured["accelerated"])
    for done in changes_of(original(model)).values():
        measured.update(done.kind.measured(done.value))
    return measured, [measurement_table(task.name, measured), *shown]


@command
def report(
    paths: Annotated[list[Path], typer.Argument(help="Run directories, or results/*.json.")],
    out: Annotated[Path, typer.Option(help="Directory of the tables, figures and page.")] = Path("report"),
    export: Annotated[Path | None, typer.Option(help="Also write the results, without layers, to one JSON file.")] = None,
    json_: Json = False,
) -> Shown:
    """Collect runs into Markdown tables, figures and one interactive HTML page."""
    written = write_report(paths, out)
    if export is not None:
        export_records(collect(paths), export)
    return written.to_dict(), [written.sentence]


@command
def methods(
    goal: Annotated[str | None, typer.Option("--for", metavar="GOAL", help=f"Say which one: {', '.join(advice)}.")] = None,
    json_: Json = False,
) -> Shown:
    """List the methods and scores: what each is for, its paper, its defaults."""
    if goal is not None:
        return {goal: asdict(advice[goal])}, [advice_table(goal)]
    rows: dict[str, dict[str, Any]] = {
        m.name: {
            **m.about,
            "defaults": {**_defaults(m.config), **m.defaults},
            "patterns": m.config.takes.forms,
        }
        for _, m in known_methods.items()
    }
    table = Table("method", "what it does", "for", "paper", "its own settings")
    common = _defaults(known_methods["oneshot"].config)
    for name, m in known_methods.items():
        own = {k: v for k, v in rows[name]["defaults"].items() if common.get(k) != v or k in m.defaults}
        table.add_row(name, *m.about.values(), ", ".join(f"{k}={v}" for k, v in own.items()))
    found = {"methods": rows, "scores": list(scores), "patterns": list(PATTERN_FORMS)}
    found["goals"] = {name: asdict(one) for name, one in advice.items()}
    return found, [
        table,
        f"Which one: microglia methods --for GOAL, of {', '.join(advice)}.",
        f"scores: {', '.join(scores)}",
        f"patterns: {', '.join(PATTERN_FORMS)}",
    ]


@command
def recipe(
    words: Annotated[list[str] | None, typer.Argument(metavar="[FILE] [KEY=VALUE]...")] = None,
    schema_: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead.")] = False,
    json_: Json = False,
) -> Shown:
    """Print a recipe with every default filled in, or the JSON schema of recipes."""
    words = list(words or [])
    source = read_yaml(Path(words.pop(0))) if words and "=" not in words[0] else {}
    source = override(source, words)
    if schema_:
        found = schema(source.get("method"))
        return found, [json.dumps(found, indent=2)]
    resolved = as_whole_dict(resolve(source))
    return resolved, [yaml.safe_dump(resolved, sort_keys=False)]


def _split(name: str) -> Split:
    for split in get_args(Split):
        if split == name:
            return split  # type: ignore[no-any-return]
    raise RecipeError(f"The split is train, validation or test; got {name!r}.")


def _defaults(config: type[MethodConfig]) -> dict[str, Any]:
    """Returns the default settings of a method; of a training among them, what differs from the usual training."""
    example = config()
    found = {f.name: getattr(example, f.name) for f in fields(config) if is_setting(config, f.name)}
    return {name: _unusual(value) if is_dataclass(value) else value for name, value in found.items()}


def _unusual(value: Any) -> dict[str, Any]:
    usual = type(value)()
    return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != getattr(usual, f.name)}


def _own_directory(recipe: Recipe) -> Path:
    """Returns the directory of a recipe under runs/; equal recipes, also those from before ``auto``, share one."""
    told = {**completed(as_dict(recipe)), "device": "cpu" if recipe.device == "auto" else recipe.device}
    mark = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=3).hexdigest()
    data = "" if recipe.data == recipe.model else f"-{recipe.data}"  # a user's own task brings both
    name = f"{recipe.model}{data}-{recipe.method}-{mark}"
    return Path("runs") / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
