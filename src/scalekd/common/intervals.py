"""95 % confidence intervals of means and proportions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean (Student's t); None for fewer than two values."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def share_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, also valid near 0 and 100.

    `share` is in %, measured on `count` independent images. Returns (low, high) in %.
    """
    z, p = 1.959964, share / 100
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)
