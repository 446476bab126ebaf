"""95 % confidence intervals of means and proportions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

DRAWS = 1000  # of a bootstrap


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean (Student's t); None for fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def bootstrap_interval(values: np.ndarray, draws: int = DRAWS) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of independent values (N,); always the same for the same values.

    The values are drawn N times with replacement, `draws` times; the interval leaves out 2.5 % of the means at each end.
    """
    import numpy as np

    random = np.random.default_rng(0)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def share_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, also valid near 0 and 100.

    `share` is in %, measured on `count` independent images. Returns (low, high) in %.
    """
    z, p = 1.959964, share / 100
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)
