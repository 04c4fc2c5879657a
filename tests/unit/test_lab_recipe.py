"""Recipes: one value for YAML, command line and Python; defaults, overrides, errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from microglia.core.errors import UnknownNameError
from microglia.lab.recipe import Recipe, RecipeError, as_dict, method_config, override, put, read_yaml, resolve, schema
from microglia.methods import methods
from microglia.storage.plain_yaml import merge
from microglia.tasks.task import Task
from microglia.train.optim import learning_rate
from microglia.zoo import build

KEYS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3).map(".".join)


def test_resolution_fills_in_everything_and_is_stable() -> None:
    recipe = resolve({"method": "gradient", "prune": {"density": 0.3}, "train": {"epochs": 2}})
    assert recipe.prune["score"] == "gradient"
    assert (recipe.train.epochs, recipe.train.lr) == (2, resolve({"prune": {"density": 0.3}}).train.lr)
    plain = as_dict(recipe)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert as_dict(resolve(plain)) == plain


@pytest.mark.parametrize("name", list(methods))
def test_every_method_resolves_and_has_a_schema(name: str) -> None:
    term = "density" if "density" in methods[name].config.takes.fields else "flops"  # of DDNP and FTWT
    config = method_config(resolve({"method": name, "prune": {term: 0.5}}))
    assert isinstance(config, methods[name].config)
    for field, value in methods[name].defaults.items():
        assert getattr(config, field) == value
    assert term in schema(name)["properties"]["prune"]["properties"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"train": {"epochz": 3}}, r"train\.epochz: there is no such field; got 3"),
        ({"prune": {"densitty": 0.1}}, "densitty: there is no such field"),
        ({"train": {"epochs": "many"}}, r"train\.epochs: .*got 'many'"),
        ({"train": {"optimizer": "lion"}}, r"train\.optimizer: .*'sgd', 'adam' or 'adamw'"),
        ({"prune": {"density": "abc"}}, r"density: .*got 'abc'"),
        ({"device": "tpu"}, "device"),
        ({"modle": "conv-2"}, "modle: there is no such field"),
        ({"train": 3}, "train"),
    ],
)
def test_a_wrong_field_is_named(source: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        resolve(source)


def test_an_unknown_method_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'gradual'"):
        resolve({"method": "gradul"})


def test_overrides_are_yaml_values_at_dotted_keys() -> None:
    source = override({"train": {"lr": 1}}, ["train.epochs=3", "prune.exclude=[fc, '!a']", "checkpoint=null", "a.b.c=x=y"])
    assert source == {
        "train": {"lr": 1, "epochs": 3},
        "prune": {"exclude": ["fc", "!a"]},
        "checkpoint": None,
        "a": {"b": {"c": "x=y"}},
    }
    for wrong in ("train.epochs", "=3"):
        with pytest.raises(RecipeError, match="key=value"):
            override({}, [wrong])
    with pytest.raises(RecipeError, match="cannot be set below it"):
        override({"model": "conv-2"}, ["model.name=x"])


@given(key=KEYS, value=st.integers())
def test_put_sets_one_key_and_leaves_its_argument(key: str, value: int) -> None:
    tree: dict[str, Any] = {"z": {"y": 1}}
    result: Any = put(tree, key, value)
    assert tree == {"z": {"y": 1}}
    assert result["z"] == {"y": 1}
    for part in key.split("."):
        result = result[part]
    assert result == value


@given(st.dictionaries(st.text("ab", min_size=1, max_size=2), st.integers()))
def test_merge_prefers_what_is_given(given_: dict[str, int]) -> None:
    merged = merge({"n": {"a": 0, "k": 0}}, {"n": given_})
    assert merged == {"n": {"a": 0, "k": 0, **given_}}


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Cannot read the recipe"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match=r"A recipe is a mapping such as .*holds a list"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/*.yaml")), ids=lambda p: p.name)
def test_the_recipes_we_ship_are_valid(path: Path) -> None:
    content = read_yaml(path)
    if "grid" in content:
        from microglia.lab.sweep_grid import read_sweep

        assert len(read_sweep(path).cells) > 1
    else:
        resolve(content)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes" / "smart").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_smart_are_valid_and_say_what_the_paper_says(path: Path) -> None:
    recipe = resolve(read_yaml(path))
    published = {  # SMART, table 5: batch, epochs, optimizer, rate, decay; first and last temperature
        "resnet50_imagenet": (256, 100, "adamw", 1e-4, 0.025, 10, 1e-4),
        "resnet50_imagenet_pdp": (256, 100, "adamw", 1e-5, 0.025),
        "resnet50_imagenet_pas": (128, 100, "adamw", 1e-5, 0.025),
        "resnet50_imagenet_awg": (128, 100, "adamw", 1e-4, 0.025),
        "resnet50_imagenet_acdc": (256, 100, "adamw", 1e-4, 0.025),
        "yolov5m_coco": (16, 100, "sgd", 1e-4, 5e-4, 10, 1e-4),
        "yolov5m_coco_pdp": (32, 100, "sgd", 1e-4, 5e-4),
        "yolov5m_coco_pas": (16, 100, "sgd", 1e-4, 5e-4),
        "yolov5m_coco_awg": (16, 100, "sgd", 1e-4, 5e-4),
        "yolov5m_coco_acdc": (32, 100, "sgd", 1e-4, 5e-4),
        "bisenetv2_cityscapes": (16, 135, "sgd", 5e-4, 0, 10, 1e-4),
        **{f"bisenetv2_cityscapes_{name}": (16, 135, "sgd", 5e-4, 0) for name in ("awg", "acdc", "pas", "pdp")},
        "vit_imagenet": (64, 150, "adamw", 1e-5, 0.3, 1e-4, 1e-5),
        **{f"vit_imagenet_{name}": (64, 150, "adamw", 1e-5, 0.3) for name in ("awg", "acdc", "pas", "pdp")},
        "swin_imagenet": (128, 200, "adamw", 5e-6, 0.05, 10, 1e-5),
        **{f"swin_imagenet_{name}": (128, 200, "adamw", 5e-6, 0.05) for name in ("awg", "acdc", "pas", "pdp")},
    }
    train, prune = recipe.train, recipe.prune
    said = (train.batch_size, train.epochs, train.optimizer, train.lr, train.weight_decay)
    said += (prune["init_temp"], prune["final_temp"]) if recipe.method == "smart" else ()
    assert path.stem.startswith("cifar10") or said == published[path.stem]
    if path.stem.startswith("cifar10"):
        methods["smart"].check(_small_task(recipe), method_config(recipe))


def test_the_searches_of_smarts_table_have_the_published_lengths() -> None:
    """Table 5: epochs of search, cycles of AC/DC, steps of AWG, all as parts of the training."""
    folder = Path(__file__).parents[2] / "recipes" / "smart"
    found = {path.stem: resolve(read_yaml(path)) for path in folder.glob("*_*.yaml") if not path.stem.startswith("cifar10")}
    searched = {name: r.prune["search"] * r.train.epochs for name, r in found.items() if r.method in ("smart", "pdp")}
    published = {
        **{f"bisenetv2_cityscapes{end}": epochs for end, epochs in (("", 9.42), ("_pdp", 62.2))},
        **{f"vit_imagenet{end}": epochs for end, epochs in (("", 5), ("_pdp", 20))},
        **{f"swin_imagenet{end}": 20 for end in ("", "_pdp")},
    }
    assert {name: searched[name] for name in published} == pytest.approx(published, rel=0.01)
    cycles = {"resnet50_imagenet_acdc": (8, 5), "bisenetv2_cityscapes_acdc": (8, 6.73)}
    cycles |= {"vit_imagenet_acdc": (2, 1), "swin_imagenet_acdc": (5, 2)}
    for name, (count, epochs) in cycles.items():
        prune, whole = found[name].prune, found[name].train.epochs
        dense = [whole * (up - down) for down, up in zip(prune["compress"], prune["decompress"], strict=False)]
        packed = [whole * (down - up) for up, down in zip(prune["decompress"], prune["compress"][1:], strict=True)]
        assert len(dense) == count
        assert [*dense, *packed] == pytest.approx([epochs] * 2 * count, rel=0.01)
    assert found["swin_imagenet_awg"].prune["updates"] == 5
    assert found["swin_imagenet_awg"].prune["search"] * 200 == pytest.approx(25)


def test_the_networks_of_smarts_table_have_their_tasks_and_schedules() -> None:
    folder = Path(__file__).parents[2] / "recipes" / "smart"
    found = [path.stem for path in folder.glob("*.yaml") if not path.stem.startswith(("cifar10", "yolov5"))]
    assert len(found) == 4 * 5  # four networks, five methods
    for path in [*folder.glob("vit_*.yaml"), *folder.glob("swin_*.yaml")]:
        recipe = resolve(read_yaml(path))
        assert recipe.prune["pattern"] == "nm:2:4"
        assert methods[recipe.method].outcome("nm:2:4") == "masked"
        assert (recipe.task or {})["kind"] == "images"
    for path in folder.glob("bisenetv2_*.yaml"):
        recipe, steps = resolve(read_yaml(path)), -(-2975 // 16)
        assert (recipe.task or {})["kind"] == "segmentation"
        assert (recipe.task or {})["model_options"] == {"pool": "average-resize"}
        rates = [learning_rate(recipe.train, step, steps) for step in (0, 500, 1001, 135 * steps - 1)]
        # WarmupPolyLR: 0.1^(1 - t), then (1 - t)^0.9.
        assert rates[:3] == pytest.approx([5e-5, 5e-4 * 0.1**0.5, 5e-4], rel=0.01)
        assert rates[3] < 1e-7


SCALINGS = [
    ("mobilenet_v1", 2),
    ("mobilenet_v1_static", 1),
    ("mobilenet_v2", 1),
    ("mobilenet_v2_static", 1),
    ("resnet20_paper", 6),
    ("resnet20_rates", 27),
    ("resnet20_rates_static", 9),
]


@pytest.mark.parametrize(("name", "count"), SCALINGS)
def test_the_scalings_of_ftwt_are_valid_sweeps(name: str, count: int) -> None:
    """Those of the rates are pilots on validation images, as many for the static baseline as for each start of heads."""
    from microglia.lab.sweep_grid import read_sweep

    cells = read_sweep(Path(__file__).parents[2] / "recipes" / "ftwt" / "scaled" / f"{name}.yaml").cells
    assert len({cell.name for cell in cells}) == len(cells) == count
    assert {cell.recipe.measure.split for cell in cells} == {"validation" if "rates" in name or "pilots" in name else "test"}
    modes = {cell.recipe.prune["mode"]: cell.recipe for cell in cells}
    for recipe in modes.values():
        methods["ftwt"].check(_small_task(recipe), method_config(recipe))
    if name.endswith("paper"):
        prune, train = modes["joint"].prune, modes["joint"].train
        assert (prune["r"], prune["softmax"], prune["cooldown"], prune["head_lr"]) == (0.8, True, 0.5, 0.1)
        assert (train.epochs, train.lr, train.weight_decay) == (15, 0.01, 5e-4)
        assert modes.keys() == {"decoupled", "joint", "static"}


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes" / "ftwt").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_ftwt_are_valid_and_say_what_the_paper_says(path: Path) -> None:
    recipe = resolve(read_yaml(path))
    published = {  # spec, 7.11: r and mode; 7.10: epochs, rates, decay
        "cifar10_vgg16bn": (0.92, "decoupled"),
        "cifar10_vgg16bn_joint": (0.92, "joint"),
        "cifar10_resnet56": (0.8, "decoupled"),
        "cifar10_resnet56_joint": (0.88, "joint"),
        "cifar10_mobilenetv1": (1.0, "decoupled"),
    }
    methods["ftwt"].check(_small_task(recipe), method_config(recipe))
    if path.stem in published:
        assert (recipe.prune["r"], recipe.prune["mode"]) == published[path.stem]
        train, prune = recipe.train, recipe.prune
        assert (train.epochs, train.lr, train.weight_decay, train.batch_size) == (200, 0.01, 5e-4, 128)
        assert (prune["head_lr"], prune["cooldown"], prune["softmax"], prune["rule"]) == (0.1, 0.5, True, "prefix_le")
        steps = [learning_rate(train, epoch, 1) for epoch in (80, 81, 121, 122, 150, 151)]
        assert steps == pytest.approx([1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5])


def _small_task(recipe: Recipe) -> Task:
    side = recipe.image_size or 32
    model = build(recipe.model, classes=10, shape=(3, side, side))
    return Task(recipe.model, lambda: model, SimpleNamespace(), lambda o, t: o, {}, torch.zeros(1, 3, side, side))
