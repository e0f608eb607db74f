"""Win rates of pairwise comparisons: counts, intervals, and the rate at equal length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from tdpo.evaluate.estimates import CONFIDENCE, Estimate

QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""1.96: half of an interval in standard errors."""


@dataclass(frozen=True)
class Outcome:
    """The result of comparing one response of A with one of B.

    Attributes:
        prompt: Identifies the prompt; comparisons of one prompt are not independent.
        score: 1 if A won, 0 if B did, 1/2 for a tie; None if there was no verdict.
        length_difference: Characters of A's response minus those of B's.
    """

    prompt: str
    score: float | None
    length_difference: int = 0


@dataclass(frozen=True)
class LengthControlled:
    """The win rate that a logistic regression predicts for responses of equal length.

    Attributes:
        rate: sigmoid(intercept).
        low: Lower end of its 95% interval, from the standard error of the intercept.
        high: Its upper end.
        slope: Change of the log-odds with one standard deviation of the length difference.
    """

    rate: float
    low: float
    high: float
    slope: float


@dataclass(frozen=True)
class WinRate:
    """The win rate of A, where a tie counts one half.

    Attributes:
        wins: Comparisons that A won.
        losses: Comparisons that B won.
        ties: Comparisons without a winner.
        unparsed: Comparisons without a verdict; they count in no rate.
        rate: Mean score over prompts, with a bootstrap interval over prompts; None without a verdict.
        wilson: Wilson's 95% interval of that mean, with a trial for each prompt.
        length_controlled: The rate at equal length; None where it is not identified.
    """

    wins: int
    losses: int
    ties: int
    unparsed: int
    rate: Estimate | None
    wilson: tuple[float, float]
    length_controlled: LengthControlled | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> WinRate:
        """Computes counts, rates and intervals.

        Examples:
            >>> found = WinRate.of([Outcome("p", 1.0), Outcome("q", 0.5), Outcome("r", 0.0), Outcome("s", 1.0)])
            >>> found.rate.mean, found.wins, found.ties, [round(end, 3) for end in found.wilson]
            (0.625, 2, 1, [0.219, 0.908])
        """
        judged = [outcome for outcome in outcomes if outcome.score is not None]
        by_prompt: dict[str, list[float]] = {}
        for outcome in judged:
            by_prompt.setdefault(outcome.prompt, []).append(float(outcome.score or 0.0))
        scores = [sum(values) / len(values) for values in by_prompt.values()]
        rate = Estimate.of(scores) if scores else None
        flat = np.array([float(outcome.score or 0.0) for outcome in judged])
        return cls(
            wins=int((flat == 1).sum()),
            losses=int((flat == 0).sum()),
            ties=int((flat == 0.5).sum()),
            unparsed=len(outcomes) - len(judged),
            rate=rate,
            wilson=wilson_interval(rate.mean, rate.count) if rate else (math.nan, math.nan),
            length_controlled=length_controlled(flat, np.array([o.length_difference for o in judged], dtype=float)),
        )

    def columns(self) -> dict[str, Any]:
        """Returns the figures under the names of the JSON output; what is not defined is None."""
        rate, controlled = self.rate, self.length_controlled
        bootstrap = None if rate is None or math.isnan(rate.low) else [rate.low, rate.high]
        return {
            "win_rate": None if rate is None else rate.mean,
            "win_rate_ci": None if rate is None else list(self.wilson),
            "win_rate_bootstrap_ci": bootstrap,
            "win_rate_se": None if rate is None or math.isnan(rate.standard_error) else rate.standard_error,
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "unparsed": self.unparsed,
            "pairs": self.wins + self.losses + self.ties + self.unparsed,
            "prompts": 0 if rate is None else rate.count,
            "length_controlled_win_rate": None if controlled is None else controlled.rate,
            "length_controlled_win_rate_ci": None if controlled is None else [controlled.low, controlled.high],
        }


def wilson_interval(rate: float, trials: int) -> tuple[float, float]:
    """Computes Wilson's 95% score interval of a mean of ``trials`` scores in [0, 1].

    With wins and losses alone it is the binomial interval of ``scipy.stats.binomtest``, which takes whole counts only.
    Ties make the scores vary less than a binomial variable of the same mean, so with ties it is conservative. Unlike a
    bootstrap interval it has a width at rates of 0 and 1.

    Source: Wilson 1927, doi.org/10.1080/01621459.1927.10502953.

    Examples:
        >>> [round(end, 4) for end in wilson_interval(1.0, 10)]
        [0.7225, 1.0]
    """
    square = QUANTILE**2
    middle = rate + square / (2 * trials)
    half = QUANTILE * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials**2))
    scale = 1 + square / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def length_controlled(scores: np.ndarray, differences: np.ndarray) -> LengthControlled | None:
    r"""Computes the win rate at equal length by maximum likelihood.

    .. math:: P(A \text{ wins}) = \sigma(\theta + \gamma \, d / s)

    where d is the length difference and s its root mean square. A score of 1/2 is half a win and half a loss. The rate
    is sigma(theta), the prediction at d = 0; it does not depend on the scale s. The interval takes each comparison as
    independent.

    Args:
        scores: 1, 0 or 1/2 for each comparison, ``[n]``.
        differences: Length of A's response minus that of B's, ``[n]``.

    Returns:
        The rate; that of the scores if all lengths are equal or all scores are 1 or all 0; None without scores, or if
        lengths separate wins from losses, where the likelihood has no maximum.

    Source: the idea of length control in AlpacaEval 2, Dubois et al. 2024 (arXiv 2404.04475), without its term for the
    difficulty of an instruction and without the hyperbolic tangent of d / s.
    """
    if not len(scores):
        return None
    if not differences.any() or scores.min() == scores.max() != 0.5:
        rate = float(scores.mean())
        return LengthControlled(rate, *wilson_interval(rate, len(scores)), slope=0.0)
    if _separated(scores, differences):
        return None
    scaled = differences / math.sqrt((differences**2).mean())
    design = np.stack((np.ones(len(scores)), scaled), axis=1)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ weights
        return float((np.logaddexp(0, logits) - scores * logits).sum()), design.T @ (expit(logits) - scores)

    def hessian(weights: np.ndarray) -> np.ndarray:
        chance = expit(design @ weights)
        return design.T @ (design * (chance * (1 - chance))[:, None])

    theta, slope = minimize(loss, np.zeros(2), jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9}).x
    error = math.sqrt(np.linalg.inv(hessian(np.array([theta, slope])))[0, 0])
    low, rate, high = (float(expit(theta + step * QUANTILE * error)) for step in (-1, 0, 1))
    return LengthControlled(rate, low, high, float(slope))


def _separated(scores: np.ndarray, differences: np.ndarray) -> bool:
    """Returns whether a threshold of the difference divides (parts of) wins from (parts of) losses."""
    won, lost = differences[scores > 0], differences[scores < 1]
    return bool(won.max() <= lost.min() or lost.max() <= won.min())
