"""Double descent: the closed form (survey T1.3), the noise in the labels, and cells that are never trained twice."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.core.errors import MicrogliaError, TrainingError
from microglia.data import load_data
from microglia.storage.run import Run
from microglia.studies.descent import double_descent
from microglia.studies.descent.double_descent import (
    DescentConfig,
    descend,
    effective_capacity,
    interpolation_threshold,
    member,
    noisy_labels,
    with_label_noise,
    with_samples,
)
from microglia.studies.descent.study import Descending, view_descent
from microglia.studies.least_squares.regression import bias_risk, optimal_ridge, simulate, variance_risk

QUICK = DescentConfig(steps=60, batch_size=32, lr=0.01)


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


def whole(data, *widths):
    """Returns the cells of some widths on all training images."""
    return [(width, len(data.train)) for width in widths]


# ----------------------------------------------------------------------------------------------------------- least squares
@pytest.mark.parametrize("features", [10, 20, 30, 55, 80, 160])
def test_variance_is_the_closed_form(features):
    """Within 4 standard errors of the mean over 400 draws: one test of 12 such fails by chance less than once in 1000."""
    found = simulate(40, features, noise=0.5, signal=2.0, draws=400, seed=features)
    variance = variance_risk(40, features, 0.5)
    assert abs(found.variance - variance) < 4 * found.variance_error
    assert abs(found.total - variance - bias_risk(40, features, 2.0)) < 4 * found.total_error
    assert found.variance_error < 0.1 * variance  # the tolerance means something


def test_closed_forms_by_hand():
    assert variance_risk(40, 10, 2.0) == pytest.approx(2 * 10 / 29)
    assert variance_risk(40, 160) == pytest.approx(40 / 119)
    assert [variance_risk(40, p) for p in (39, 40, 41)] == [math.inf] * 3
    assert variance_risk(40, 38) == 38
    assert bias_risk(40, 20) == 0
    assert bias_risk(40, 160, 2.0) == 1.5


def test_the_best_ridge_removes_the_peak():
    widths = (10, 30, 40, 50, 160)
    bare = [simulate(40, p, draws=200, seed=1).total for p in widths]
    ridge = [simulate(40, p, draws=200, seed=1, ridge=optimal_ridge(p)).total for p in widths]
    assert bare[2] > 5 * max(bare[0], bare[4])  # the peak where features equal samples
    assert ridge == sorted(ridge)  # none: with a truth of fixed length more features only make it harder
    assert all(one < other for one, other in zip(ridge, bare, strict=True))
    assert max(ridge) < 1  # the risk of estimating 0
    for factor in (0.3, 3.0):  # and it is the best
        other = simulate(40, 40, draws=200, seed=1, ridge=factor * optimal_ridge(40))
        assert other.total > ridge[2]


def test_ridge_is_the_least_squares_of_more_rows():
    """Both Gram matrices against the definition, by the normal equations."""
    for samples, features in ((7, 4), (4, 7)):
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(2, samples, features, generator=generator, dtype=torch.float64)
        errors = torch.randn(2, samples, 1, generator=generator, dtype=torch.float64)
        truth = torch.eye(features, 1, dtype=torch.float64)
        normal = inputs.transpose(1, 2) @ inputs + 0.7 * torch.eye(features, dtype=torch.float64)
        expected = torch.linalg.inv(normal) @ inputs.transpose(1, 2) @ (inputs @ truth + errors) - truth
        found = simulate(samples, features, ridge=0.7, draws=2, seed=5)
        assert found.total == pytest.approx(float(expected.square().sum((1, 2)).mean()))


def test_simulations_that_cannot_be():
    for wrong in ({"samples": 0}, {"features": 0}, {"draws": 1}, {"noise": -1.0}, {"ridge": -1.0}):
        with pytest.raises(MicrogliaError, match="at least"):
            simulate(**({"samples": 4, "features": 3} | wrong))


# -------------------------------------------------------------------------------------------------------------------- data
@given(st.integers(1, 300), st.integers(2, 12), st.floats(0, 1), st.integers(0, 9))
@settings(deadline=None)
def test_exactly_so_many_labels_change_and_each_to_another_class(count, classes, noise, seed):
    labels = torch.arange(count) % classes
    found = noisy_labels(labels, classes, noise, seed)
    assert int((found != labels).sum()) == round(noise * count)
    assert int(found.min()) >= 0
    assert int(found.max()) < classes
    assert torch.equal(found, noisy_labels(labels, classes, noise, seed))


def test_other_classes_are_equally_likely():
    labels = torch.full((9000,), 3)
    counts = noisy_labels(labels, 10, 1.0).bincount(minlength=10)
    assert counts[3] == 0
    expected = 1000
    statistic = float(((counts[counts > 0] - expected).double().square() / expected).sum())
    assert statistic < 26.1  # chi-squared with 8 degrees of freedom, 0.1 %


def test_only_training_labels_are_noisy(data):
    noisy = with_label_noise(data, 0.2, seed=1)
    assert int((noisy.train.labels != data.train.labels).sum()) == round(0.2 * len(data.train))
    assert noisy.train.images is data.train.images
    assert noisy.test is data.test
    assert noisy.validation is data.validation
    assert not torch.equal(noisy.train.labels, with_label_noise(data, 0.2, seed=2).train.labels)


def test_subsets_are_nested(data):
    few, many = with_samples(data, 50, seed=1).train, with_samples(data, 80, seed=1).train
    assert torch.equal(many.images[:50], few.images)
    assert torch.equal(many.labels[:50], few.labels)
    assert len(many) == 80
    for count in (0, len(data.train) + 1):
        with pytest.raises(MicrogliaError, match=f"asked for {count} of them"):
            with_samples(data, count)


# ---------------------------------------------------------------------------------------------------------------- networks
def test_families_grow_with_width():
    sizes = {"mlp": (64 + 1 + 10, 10), "cnn": None, "resnet8": None}
    for family, expected in sizes.items():
        counts = [sum(p.numel() for p in member(family, width, 10, (1, 8, 8)).parameters()) for width in (1, 2, 3)]
        assert counts == sorted(set(counts))
        if expected:
            assert counts == [width * expected[0] + expected[1] for width in (1, 2, 3)]
    assert member("cnn", 2, 7, (3, 5, 9))(torch.zeros(2, 3, 5, 9)).shape == (2, 7)
    one, again, other = (member("cnn", 2, 7, (1, 8, 8), seed=seed).state_dict()["0.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    with pytest.raises(MicrogliaError, match="no option 'width'"):
        member("conv-2", 2, 10, (1, 8, 8))
    with pytest.raises(MicrogliaError, match="at least 1; got 0"):
        member("mlp", 0, 10, (1, 8, 8))
    with pytest.raises(MicrogliaError, match="no model named 'mpl'"):
        member("mpl", 1, 10, (1, 8, 8))


def test_settings_that_cannot_be():
    for wrong in ({"noise": 1.5}, {"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"optimizer": "lbfgs"}, {"schedule": "step"}):
        with pytest.raises(MicrogliaError, match=f"got .*{next(iter(wrong.values()))}"):
            DescentConfig(**wrong)


def test_learning_rates():
    config = DescentConfig(lr=0.1, schedule="root")
    assert [config.rate(step) for step in (0, 511, 512, 1536)] == [0.1, 0.1, pytest.approx(0.1 / math.sqrt(2)), 0.05]
    assert DescentConfig(lr=0.1).rate(9999) == 0.1


# ------------------------------------------------------------------------------------------------------------------- cells
def test_rows_say_what_they_should_and_larger_networks_fit_more(data):
    rows = descend(data, replace(QUICK, steps=150, noise=0.2), whole(data, 1, 64))
    assert [(row["width"], row["samples"], row["parameters"]) for row in rows] == [
        (1, len(data.train), 85),
        (64, len(data.train), 4810),
    ]
    assert set(rows[0]) == {"width", "samples", "parameters", "train_error", "train_loss", "test_error", "test_loss"}
    assert rows[1]["train_error"] < rows[0]["train_error"]
    assert rows[1]["test_error"] < rows[1]["train_error"]  # a fifth of the training labels is wrong, no test label is


def test_sample_wise_rows_and_capacity(data):
    cells = [(6, 8), (6, 20), (6, 600)]
    rows = descend(data, replace(QUICK, steps=200, noise=0.0, optimizer="sgd", lr=0.2, schedule="root"), cells)
    assert [(row["width"], row["samples"]) for row in rows] == cells
    assert rows[0]["train_error"] == 0
    assert rows[2]["train_error"] > 0.01
    assert effective_capacity(rows) in (8, 20)
    made = [{"width": w, "samples": n, "train_error": e} for w, n, e in ((1, 10, 0.0), (2, 20, 0.009), (3, 30, 0.5))]
    assert (effective_capacity(made), effective_capacity(made, 0.5), effective_capacity(made[2:])) == (20, 30, None)
    assert (interpolation_threshold(made), interpolation_threshold(made[2:])) == (1, None)


def test_every_cell_takes_the_same_steps(data, monkeypatch):
    taken = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: taken.append(1) or step(self, *args))
    for samples in (5, 33, 100):
        taken.clear()
        descend(data, replace(QUICK, steps=7), [(2, samples)])
        assert len(taken) == 7


def test_finished_cells_are_not_trained_again_and_more_can_be_added(data, tmp_path, monkeypatch):
    run = Run(tmp_path / "run", {"noise": 0.1})
    first = descend(data, QUICK, whole(data, 1, 2), run)
    run.close()
    monkeypatch.setattr(double_descent, "train", None)
    run = Run(tmp_path / "run", {"noise": 0.1})
    assert descend(data, QUICK, whole(data, 2, 1), run) == first[::-1]
    monkeypatch.undo()
    assert len(descend(data, QUICK, whole(data, 1, 2, 3), run)) == 3
    run.close()


def test_an_interrupted_cell_ends_in_the_same_bits(data, tmp_path, monkeypatch):
    config = replace(QUICK, family="cnn", steps=12, batch_size=20)
    whole = descend(data, config, [(1, 60)])
    monkeypatch.setattr(double_descent, "SAVED", 3)
    rate = DescentConfig.rate

    def killed(self, step):
        if step == 8:
            raise KeyboardInterrupt
        return rate(self, step)

    run = Run(tmp_path / "run")
    monkeypatch.setattr(DescentConfig, "rate", killed)
    with pytest.raises(KeyboardInterrupt):
        descend(data, config, [(1, 60)], run)
    seen = []
    monkeypatch.setattr(DescentConfig, "rate", lambda self, step: seen.append(step) or rate(self, step))
    assert descend(data, config, [(1, 60)], run) == whole
    assert seen == list(range(6, 12))  # from the last epoch that was saved
    run.close()


def test_a_diverging_training_says_so(data):
    with pytest.raises(TrainingError, match="smaller lr than 1e"):
        descend(data, replace(QUICK, optimizer="sgd", lr=1e30), [(4, 100)])


def test_widths_on_a_part_of_the_images(tmp_path):
    told = view_descent(Descending(replace(QUICK, steps=5), widths=(2, 1), samples=(40,), out=tmp_path)).result
    assert told.over == "width"
    assert [(row.width, row.samples) for row in told.rows] == [(1, 40), (2, 40)]


def test_a_part_of_the_images_has_as_many_changed_labels_as_the_whole(data):
    """Labels and parts were once drawn by one permutation: a tenth of the images had nothing but changed labels."""
    noisy = with_label_noise(data, 0.1, seed=0)
    for samples in (100, 300, 600):
        part, true = (with_samples(kind, samples, seed=0).train.labels for kind in (noisy, data))
        assert abs(float((part != true).float().mean()) - 0.1) < 4 * (0.09 / samples) ** 0.5


def test_a_part_that_an_earlier_version_drew_with_the_noise_is_not_taken_over(data, tmp_path):
    run = Run(tmp_path, {})
    run.stage("width-1-samples-40", lambda progress: {"width": 1, "samples": 40, "test_error": 2.0})
    (row,) = descend(data, replace(QUICK, steps=2), [(1, 40)], run)
    assert row["test_error"] <= 1
    run.close()
