"""Claim: the codebook of 25 million weights takes seconds, at least 20 times less than scikit-learn's k-means.

Both sides share the linear initial centroids, and stop when no weight moves or after the same number of rounds. scikit-learn
runs on a sample, and its time is scaled by the number of weights, which favours it: larger arrays leave the cache. The sorting
and the coding of every weight count on our side. Run with the number of weights, or without for 25 million.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
from sklearn.cluster import KMeans

from microglia.compress.codebook import kmeans, nearest

TOTAL, SAMPLE, CLUSTERS, REPEATS = 25_000_000, 50_000, 256, 3
ROUNDS = 100


def seconds_ours(values: np.ndarray) -> tuple[float, float, int]:
    began = time.perf_counter()
    found = kmeans(values, CLUSTERS, rounds=ROUNDS)
    middle = time.perf_counter()
    nearest(values, found.centroids.astype(values.dtype))
    return middle - began, time.perf_counter() - middle, len(found.errors)


def seconds_theirs(values: np.ndarray) -> tuple[float, int]:
    start = np.linspace(values.min(), values.max(), CLUSTERS)[:, None].astype(values.dtype)
    began = time.perf_counter()
    model = KMeans(CLUSTERS, init=start, n_init=1, max_iter=ROUNDS, tol=0).fit(values[:, None])
    return time.perf_counter() - began, int(model.n_iter_)


def main() -> None:
    total = int(sys.argv[1]) if len(sys.argv) > 1 else TOTAL
    values = np.random.default_rng(0).laplace(size=total).astype(np.float32)  # trained weights have heavy tails
    sample = values[: min(SAMPLE, total)]
    ours, theirs = [], []
    for _ in range(REPEATS):
        ours.append(seconds_ours(values))
        theirs.append(seconds_theirs(sample))
    found, coded, rounds = (statistics.median(column) for column in zip(*ours, strict=True))
    their_time, their_rounds = (statistics.median(column) for column in zip(*theirs, strict=True))
    scaled = their_time * total / sample.size
    print(f"ours: {total:,} weights, {CLUSTERS} centroids: {found:.2f} s in {rounds:.0f} rounds, {coded:.2f} s for the codes")
    print(f"scikit-learn: {sample.size:,} weights: {their_time:.2f} s in {their_rounds:.0f} rounds, {scaled:.1f} s scaled")
    print(f"ratio: {scaled / (found + coded):.2f}")


if __name__ == "__main__":
    main()
