"""Win rates: intervals against scipy, the rate at equal length against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest

from tdpo.evaluate.win_rate import Outcome, WinRate, length_controlled, wilson_interval


@pytest.mark.parametrize(("wins", "trials"), [(0, 5), (1, 5), (5, 5), (37, 80), (79, 80), (500, 1000)])
def test_wilson_is_that_of_scipy_for_whole_counts(wins, trials):
    interval = binomtest(wins, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(wins / trials, trials) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_counts_ties_as_half_and_leaves_out_what_has_no_verdict():
    found = WinRate.of([Outcome(str(n), score) for n, score in enumerate([1.0, 1.0, 0.5, 0.0, None, 0.5])])
    assert (found.wins, found.ties, found.losses, found.unparsed) == (2, 2, 1, 1)
    assert found.rate is not None and found.rate.mean == pytest.approx(3 / 5) and found.rate.count == 5
    assert found.wilson == wilson_interval(3 / 5, 5)
    assert found.columns()["pairs"] == 6


def test_samples_of_one_prompt_are_one_unit():
    """A thousand copies of three prompts do not make the intervals narrower."""
    scores = {"p": 1.0, "q": 0.0, "r": 0.5}
    once = WinRate.of([Outcome(prompt, score) for prompt, score in scores.items()])
    often = WinRate.of([Outcome(prompt, score) for prompt, score in scores.items() for _ in range(1000)])
    assert often.rate == once.rate and often.wilson == once.wilson
    unequal = WinRate.of([Outcome("p", 1.0), Outcome("p", 0.0), Outcome("p", 1.0), Outcome("q", 0.0)])
    assert unequal.rate is not None and unequal.rate.mean == pytest.approx((2 / 3 + 0) / 2)


def test_nothing_judged_has_no_rate():
    columns = WinRate.of([Outcome("p", None)]).columns()
    names = ("win_rate", "win_rate_ci", "win_rate_bootstrap_ci", "win_rate_se", "length_controlled_win_rate")
    assert [columns[name] for name in names] == [None] * 5
    assert columns["unparsed"] == columns["pairs"] == 1
    one = WinRate.of([Outcome("p", 1.0)]).columns()
    assert (one["win_rate_bootstrap_ci"], one["win_rate_se"]) == (None, None)  # no NaN in JSON


def simulated(count: int, theta: float, slope: float, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(0)
    differences = np.round(draws.normal(40, 100, count))
    chances = 1 / (1 + np.exp(-(theta + slope * differences / 100)))
    scores = (draws.random(count) < chances).astype(float)
    if ties:
        scores[::5] = 0.5
    return scores, differences


@pytest.mark.parametrize("ties", [False, True])
def test_rate_at_equal_length_is_that_of_brute_force(ties):
    scores, differences = simulated(200, -0.3, 1.2, ties)

    def loss(weights: np.ndarray) -> float:
        chances = 1 / (1 + np.exp(-(weights[0] + weights[1] * differences / 50)))
        return -(scores * np.log(chances) + (1 - scores) * np.log(1 - chances)).sum()

    best = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}).x
    found = length_controlled(scores, differences)
    assert found is not None
    assert found.rate == pytest.approx(1 / (1 + math.exp(-best[0])), abs=1e-6)
    assert found.slope == pytest.approx(best[1] * math.sqrt((differences**2).mean()) / 50, rel=1e-5)
    # Scaling the lengths changes nothing; swapping the sides mirrors it.
    scaled, swapped = length_controlled(scores, differences * 7), length_controlled(1 - scores, -differences)
    assert scaled is not None and scaled.rate == pytest.approx(found.rate, abs=1e-9)
    assert swapped is not None and (swapped.rate, swapped.high) == pytest.approx((1 - found.rate, 1 - found.low))


def test_length_that_explains_the_preference_is_taken_out():
    """The true rate at equal length is sigmoid(-0.3) = 0.426, the raw one is above it since A is longer."""
    scores, differences = simulated(4000, -0.3, 1.2, False)
    found = length_controlled(scores, differences)
    assert found is not None
    assert scores.mean() > 0.49 and found.rate == pytest.approx(0.4256, abs=0.02)
    assert found.low < 0.4256 < found.high and found.high - found.low == pytest.approx(0.036, abs=0.006)


def test_standard_error_is_that_of_the_information_matrix():
    scores, differences = simulated(300, 0.2, 0.8, False)
    found = length_controlled(scores, differences)
    assert found is not None
    scale = math.sqrt((differences**2).mean())
    theta = math.log(found.rate / (1 - found.rate))
    chances = 1 / (1 + np.exp(-(theta + found.slope * differences / scale)))
    weights = chances * (1 - chances)
    a, b, c = weights.sum(), (weights * differences).sum(), (weights * differences**2).sum()
    error = math.sqrt(c / (a * c - b * b))
    assert math.log(found.high / (1 - found.high)) == pytest.approx(theta + 1.959964 * error, abs=1e-5)


def test_where_the_rate_at_equal_length_is_not_identified():
    def controlled(scores: list[float], differences: list[float]) -> float | None:
        found = length_controlled(np.array(scores), np.array(differences))
        return None if found is None else found.rate

    assert controlled([1, 1, 0], [3, 2, -1]) is None  # the longer one always wins
    assert controlled([0, 0, 1], [3, 2, -1]) is None
    assert controlled([1, 0, 1], [4, 4, 4]) is None  # one difference, which is not 0
    assert controlled([1, 0.5, 0], [2, 2, 1]) is None and controlled([0, 0.5, 1], [2, 2, 1]) is None
    assert controlled([1, 0, 1, 1], [0, 0, 0, 0]) == 0.75
    assert controlled([1, 1], [5, -3]) == 1
    assert controlled([0.5, 0.5, 0.5], [1, -2, 4]) == pytest.approx(0.5)
    assert controlled([], []) is None
