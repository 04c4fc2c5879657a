"""The shipped queue: every recipe fits its model, and every row of a table has the same chances."""

from dataclasses import replace
from pathlib import Path

import pytest

from microglia.lab.execute import make_task
from microglia.lab.recipe import method_config
from microglia.methods import methods
from microglia.studies.evidence.files import read_queue, tries
from queues import jobs_of_first_seed

QUEUE = Path(__file__).parents[2] / "recipes" / "evidence" / "queue.yaml"
LAST_CHANGE = 0.6


@pytest.fixture(scope="module")
def queue():
    return read_queue(QUEUE)


@pytest.fixture(scope="module")
def jobs(queue, tmp_path_factory):
    return jobs_of_first_seed(queue, tmp_path_factory.mktemp("nothing"))


def test_every_file_in_the_folder_is_a_part_of_the_queue(queue):
    files = {path.relative_to(QUEUE.parent).with_suffix("").as_posix() for path in QUEUE.parent.glob("*/*.yaml")}
    assert files == set(queue.studies)


def test_every_recipe_fits_its_model(jobs):
    """Layers, pattern and budget meet the model; the digits stand for the images, which only the accuracy depends on.

    Each check of a method runs once for a model and a pattern; the config itself is checked for every recipe.
    """
    checked = set()
    for job in jobs:
        recipe = job.recipe
        config = method_config(recipe)
        check = methods[recipe.method].check
        key = recipe.model, check.__module__, check.__qualname__, recipe.prune["pattern"], repr(recipe.prune.get("exclude"))
        if key not in checked:
            checked.add(key)
            check(task_of(recipe), config)
    assert len(checked) > 9


def task_of(recipe):
    return make_task(replace(recipe, data="digits", image_size=32))


def test_all_rows_have_equal_chances(queue):
    for study in queue.studies.values():
        if study.pilots is None:
            continue
        counts = {name: distinct(study, row) for name, row in study.rows.items() if row.pilots}
        assert len(set(counts.values())) == 1, (study.name, counts)


def distinct(study, row):
    """Number of different pilots: a value that a row has anyway was tried in the first step."""
    total = sum(len(tries(step)) for step in study.pilots.steps)
    for step in row.steps:
        total += sum(any(row.set.get(key, default(row, key)) != value for key, value in one.items()) for one in tries(step))
    return total


def default(row, key):
    chosen = methods[row.set["method"]]
    name = key.removeprefix("prune.")
    return chosen.defaults.get(name, getattr(chosen.config(), name, None))


def test_cells_of_a_study_share_data_order_length_and_controls(queue, jobs):
    for name, study in queue.studies.items():
        cells = [job for job in jobs if job.study == name and job.kind == "cell"]
        fair = [job for job in cells if study.rows[job.row].pilots or study.pilots is None]
        assert len({(epochs(j), j.recipe.train.batch_size, j.recipe.train.weight_decay) for j in fair}) == 1
        assert {(j.recipe.threads, j.recipe.device, j.recipe.train.schedule, j.recipe.train.distill) for j in cells} == {
            (1, "cpu", "cosine", 0)
        }
        assert study.seeds == [0, 1, 2]
        assert any(row.control for row in study.rows.values())


def epochs(job):
    """Epochs of a cell, with those of DDNP's search, which passes over a share of the images."""
    search = job.recipe.prune.get("search_epochs", 0) * job.recipe.prune.get("search_share", 0)
    return job.epochs + round(search)


def test_masks_of_the_searches_are_fixed_at_six_tenths(jobs):
    ends = {}
    for job in jobs:
        if job.study.startswith("smart/") and job.kind == "cell":
            config = method_config(job.recipe)
            ends[job.row] = getattr(config, "span", (0, getattr(config, "end", LAST_CHANGE)))[1]
    assert ends
    assert {row: end for row, end in ends.items() if end != pytest.approx(LAST_CHANGE)} == {}


def test_seeds_share_a_dense_network_over_studies(jobs):
    starts = [job for job in jobs if job.kind == "start" and job.recipe.model == "resnet20" and job.recipe.dense.epochs == 25]
    assert len(starts) == 1
    studies = {job.study for job in jobs if job.start == starts[0].identity and job.kind == "cell"}
    assert studies == {"ftwt/resnet20", "smart/blocks", "smart/channels", "smart/two_four", "structured/resnet20"}
