"""Double descent where it can be computed: least squares with as many features as one likes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from microglia.core.errors import MicrogliaError


@dataclass(frozen=True)
class Risk:
    """The risk of a simulated regression, means over draws.

    Attributes:
        total: Squared distance of the estimate from the truth, which is the excess test error with isotropic features.
        total_error: Standard error of that mean.
        variance: The part that the noise in the targets makes.
        variance_error: Standard error of that mean.
    """

    total: float
    total_error: float
    variance: float
    variance_error: float


def variance_risk(samples: int, features: int, noise: float = 1.0) -> float:
    """Returns the variance part of the risk of min-norm least squares, exactly, for isotropic Gaussian features.

    noise p / (n - p - 1) for p < n - 1 and noise n / (p - n - 1) for p > n + 1; infinite in between, where the expectation
    does not exist.

    Args:
        samples: n.
        features: p.
        noise: Variance of the noise in the targets.

    Source: survey 1.3, item 7; the trace of an inverse Wishart matrix.
    """
    low, high = min(samples, features), max(samples, features)
    return noise * low / (high - low - 1) if high - low > 1 else math.inf


def bias_risk(samples: int, features: int, signal: float = 1.0) -> float:
    """Returns the other part: what of the truth, of squared length ``signal``, min-norm least squares cannot see."""
    return signal * max(0.0, 1 - samples / features)


def optimal_ridge(features: int, noise: float = 1.0, signal: float = 1.0) -> float:
    """Returns the penalty with the least risk, noise p / signal: with it no estimate is worse than 0.

    Source: the posterior mean of a Gaussian truth; Nakkiran et al. 2021, "Optimal regularization can mitigate double
    descent", shows that with it the risk falls with every sample.
    """
    return noise * features / signal


@torch.no_grad()
def simulate(
    samples: int,
    features: int,
    *,
    noise: float = 1.0,
    signal: float = 1.0,
    ridge: float = 0.0,
    draws: int = 400,
    seed: int = 0,
) -> Risk:
    """Returns the risk of (ridge) least squares on drawn data: y = X b + e, X (n, p) and e Gaussian.

    Without a penalty it is the solution of least norm where there are more features than samples.

    Args:
        samples: n, at least 1.
        features: p, at least 1.
        noise: Variance of e.
        signal: Squared length of b.
        ridge: Penalty on the squared length of the estimate.
        draws: Data sets, at least 2.
        seed: Root of the draws.

    Raises:
        MicrogliaError: A number is out of range.
    """
    if min(samples, features) < 1 or draws < 2 or min(noise, signal, ridge) < 0:
        raise MicrogliaError(
            f"A simulation takes samples and features of at least 1, draws of at least 2, and noise, signal and ridge of at "
            f"least 0; got {samples}, {features}, {draws}, {noise}, {signal} and {ridge}."
        )
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(features, 1, dtype=torch.float64)
    truth[0] = math.sqrt(signal)  # any direction: the features are isotropic
    inputs = torch.randn(draws, samples, features, generator=generator, dtype=torch.float64)
    errors = math.sqrt(noise) * torch.randn(draws, samples, 1, generator=generator, dtype=torch.float64)
    found = _solve(inputs, torch.cat([inputs @ truth + errors, errors], dim=2), ridge)
    total = (found[:, :, :1] - truth).square().sum((1, 2))
    variance = found[:, :, 1:].square().sum((1, 2))
    means = [(float(values.mean()), float(values.std()) / math.sqrt(draws)) for values in (total, variance)]
    return Risk(*means[0], *means[1])


def _solve(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Returns the estimates (draws, features, targets), through the smaller of the two Gram matrices."""
    transposed = inputs.transpose(1, 2)
    wide = inputs.shape[2] >= inputs.shape[1]
    gram = inputs @ transposed if wide else transposed @ inputs
    gram = gram + ridge * torch.eye(gram.shape[1], dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(gram, targets if wide else transposed @ targets)
    return transposed @ found if wide else found
