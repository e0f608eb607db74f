"""Means with standard errors and intervals: bootstrap over prompts, Student t over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over independent units: prompts, where several samples of one prompt were averaged first, or seeds.

    Attributes:
        mean: The mean over units.
        standard_error: Of the mean: sample standard deviation over the root of ``count``; NaN for one unit.
        low: Lower end of the 95% interval over units: by bootstrap (percentiles of 2000 resampled means) from
            :meth:`of`, by Student's t from :meth:`over_seeds`; NaN for one unit.
        high: Its upper end.
        count: Units.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    count: int

    def __format__(self, spec: str) -> str:
        """Formats mean and standard error.

        Examples:
            >>> f"{Estimate(0.2849, 0.0204, 0.24, 0.33, 256):.2f}"
            '0.28±0.02'
        """
        return f"{self.mean:{spec}}±{self.standard_error:{spec}}"

    @classmethod
    def of(cls, values: Tensor | Sequence[float]) -> Estimate:
        """Computes mean, standard error and interval of ``[P]`` values, or of ``[P, S]`` values averaged by row.

        Examples:
            >>> found = Estimate.of([1.0, 2.0, 3.0, 6.0])
            >>> found.mean, found.standard_error, found.count
            (3.0, 1.0801234497346435, 4)
        """
        wide = torch.as_tensor(values, dtype=torch.float64)
        units = wide.reshape(wide.shape[0], -1).mean(1)
        error = units.std().item() / math.sqrt(units.numel()) if units.numel() > 1 else math.nan
        return cls(units.mean().item(), error, *bootstrap_interval(units.numpy()), units.numel())

    @classmethod
    def over_seeds(cls, values: Sequence[float]) -> Estimate:
        """Computes mean, standard error and Student-t interval of one value a seed; no bootstrap, as seeds are few.

        Examples:
            >>> found = Estimate.over_seeds([1.0, 2.0, 3.0])
            >>> found.mean, round(found.low, 4), round(found.high, 4)
            (2.0, -0.4841, 4.4841)
        """
        count, mean = len(values), float(np.mean(values))
        if count < 2:
            return cls(mean, math.nan, math.nan, math.nan, count)
        error = float(np.std(values, ddof=1)) / math.sqrt(count)
        half = float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
        return cls(mean, error, mean - half, mean + half, count)

    @property
    def half(self) -> float:
        """Half of the interval's width; NaN without an interval."""
        return (self.high - self.low) / 2

    def columns(self, name: str) -> dict[str, float]:
        """Returns the estimate as flat columns: ``name``, and with several units ``name_se``, ``_low``, ``_high``."""
        spread = {f"{name}_se": self.standard_error, f"{name}_low": self.low, f"{name}_high": self.high}
        return {name: self.mean, **(spread if self.count > 1 else {})}


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Computes the percentile bootstrap interval of the mean of ``[P]`` values; NaNs for fewer than two.

    Resamples are drawn with a fixed seed, so equal values give equal intervals.
    """
    if len(values) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[drawn].mean(1), [tail, 1 - tail])
    return float(low), float(high)
