"""How sure a figure is: percentile bootstrap over samples (Efron, 1979), the same resamples for both models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # numpy is all that it runs on, and --help reads the constants
    from torch import Tensor

RESAMPLES = 1_000
CONFIDENCE = 0.95
_COUNTS = 1 << 22  # numbers drawn at a time, which bounds memory


class Resampled(NamedTuple):
    """A mean and what it would have been on other samples: `means` float64 [resamples]."""

    value: float
    means: np.ndarray

    def __sub__(self, other: Resampled) -> Resampled:
        """The paired difference: both must come from the same samples, resamples and seed."""
        return Resampled(self.value - other.value, self.means - other.means)

    def interval(self, confidence: float = CONFIDENCE) -> dict[str, float]:
        """{"value", "low", "high"}: the mean and its percentile interval."""
        low, high = np.quantile(self.means, [(1 - confidence) / 2, (1 + confidence) / 2])
        return {"value": self.value, "low": float(low), "high": float(high)}


def resample(values: Mapping[str, Tensor], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Resampled]:
    """The mean of each vector [n] and its means over resamples of the samples with replacement.

    Vectors of equal length are resampled together, and equal lengths and seeds draw equal resamples, so that
    differences of two models over the same samples are paired. Raises ValueError for an empty vector.
    """
    by_length: dict[int, list[str]] = defaultdict(list)
    for name, vector in values.items():
        if not len(vector):
            raise ValueError(f"{name} has no sample to take a mean of")
        by_length[len(vector)].append(name)
    results: dict[str, Resampled] = {}
    for length, names in by_length.items():
        matrix = np.stack([values[name].double().numpy() for name in names])
        means = _resampled_means(matrix, resamples, np.random.default_rng([seed, length]))
        results |= {
            name: Resampled(float(row.mean()), drawn) for name, row, drawn in zip(names, matrix, means, strict=True)
        }
    return {name: results[name] for name in values}


def rule_of_three(
    estimate: Mapping[str, float], samples: int, lowest: float = 0.0, highest: float = 1.0, reach: float = 1.0
) -> dict[str, float]:
    """The estimate of a mean in [lowest, highest] where the bootstrap can tell how sure it is.

    Where all samples agree, every resample does, and an interval of no width would claim more than they show: then at
    most 3 of `samples` others may differ, each by at most `reach` (0.95 confidence; Hanley and Lippman-Hand, 1983).
    """
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if high - low < 1e-12:
        low, high = max(lowest, value - 3 * reach / samples), min(highest, value + 3 * reach / samples)
    return {"value": value, "low": low, "high": high}


def average(parts: list[Resampled]) -> Resampled:
    """The plain mean over several sets of samples, each resampled within itself."""
    return Resampled(float(np.mean([part.value for part in parts])), np.mean([part.means for part in parts], axis=0))


def _resampled_means(matrix: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """[M, n] -> [M, resamples]: how often each sample is drawn is multinomial, so a mean is a product with counts."""
    length = matrix.shape[1]
    shares = np.full(length, 1 / length)
    step = max(1, _COUNTS // length)
    parts = []
    for start in range(0, resamples, step):
        counts = generator.multinomial(length, shares, size=min(step, resamples - start))
        parts.append(matrix @ counts.T.astype(np.float64) / length)
    return np.concatenate(parts, axis=1)
