"""The studies of this library: where each is, and the sentence that lists it, so that a list imports none of them."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Where a study is.

    Attributes:
        folder: Folder of this package; its module ``study`` registers the study.
        sentence: One line that says what the study shows.
    """

    folder: str
    sentence: str


LISTED = {
    "sensitivity": Place(
        "sensitivity", "Show what each layer alone can lose: accuracy by layer and density, without retraining."
    ),
    "routes": Place("routes", "Show which filters each input uses in a dynamically pruned network: tables and pictures."),
    "shifts": Place(
        "shifts", "Compare accuracy and operations on clean and on noisy, blurred, compressed and pale test images."
    ),
    "connect": Place(
        "connect",
        "Connect two trained networks: how high is the loss on the straight line, and on a curve trained between them?",
    ),
    "dropout-path": Place(
        "dropout_paths",
        "Build a path of low loss between two trained networks without training: each drops half of its units on the way.",
    ),
    "fast-ensemble": Place(
        "fast_ensemble",
        "Train a network on in cycles of its learning rate, and average the networks it passes: fast geometric ensembling.",
    ),
    "surface": Place("surface", "Picture the loss around a network: a plane of contours and a line, filter-normalized."),
    "descent": Place(
        "descent",
        "Train networks of growing width, or on growing data, with noisy labels: does the test error rise and fall again?",
    ),
    "least-squares": Place(
        "least_squares",
        "Compute double descent exactly: the risk of least squares over the number of features, beside a simulation.",
    ),
    "instability": Place(
        "instability",
        "Train two copies from each of some epochs on with other noise, and walk the straight line between them.",
    ),
    "tickets": Place(
        "tickets",
        "Find lottery tickets and train their controls: iterative, one-shot, other initial weights, random masks.",
    ),
}
"""One line for each study."""
