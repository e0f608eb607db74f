"""The metrics are exact means over pairs, and displacement is noticed when it lasts."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import tiny_trainer

from tdpo import objectives
from tdpo.score import PairScores
from tdpo.train.metrics import METRICS, Sums, displacement, pair_columns, pair_means
from tdpo.types import PackedBatch, PairStats, TokenStats


def scores(logratios: list[list[float]], kls: list[list[float]], tokens: list[list[int]]) -> PairScores:
    """Scores of given ``[P, 2]`` log-ratios, KLs and token counts."""
    ratio, kl, count = torch.tensor(logratios), torch.tensor(kls), torch.tensor(tokens)
    pairs = len(ratio)
    ids = torch.repeat_interleave(torch.arange(2 * pairs), count.flatten())
    none = torch.zeros(0, dtype=torch.int64)
    batch = PackedBatch(none, none, none, none, none, ids, ids, torch.arange(pairs))
    logp = torch.arange(2.0 * pairs).view(-1, 2)
    stats = PairStats(*(side for both in (ratio, kl, logp, count.float()) for side in both.unbind(1)))
    zero = torch.zeros(len(ids))
    outcome, token_stats = objectives.tdpo1(0.5)(stats), TokenStats(zero, zero, zero)
    rewards = outcome.chosen_reward, outcome.rejected_reward
    return PairScores(outcome.loss, *rewards, stats, token_stats, batch)


def test_means_are_over_pairs_and_per_token_values_over_tokens() -> None:
    sums = Sums()
    sums.add(
        pair_columns(
            scores([[1.0, 3.0], [2.0, -2.0]], [[1.0, 2.0], [3.0, 4.0]], [[2, 1], [2, 3]]), objectives.tdpo1(0.5)
        )
    )
    sums.add(pair_columns(scores([[4.0, 0.0]], [[5.0, 0.0]], [[4, 4]]), objectives.tdpo1(0.5)))
    means = pair_means(sums.state())
    assert sorted(means) == sorted(METRICS)
    assert means["implicit_rewards/chosen"] == pytest.approx(0.5 * 7 / 3)
    assert means["implicit_rewards/accuracies"] == pytest.approx(2 / 3)
    assert means["implicit_rewards/margins"] == pytest.approx(0.5 * (-2 + 4 + 4) / 3)
    assert means["rewards/chosen"] == pytest.approx(0.5 * (2 + 5 + 9) / 3)
    assert means["rewards/rejected"] == pytest.approx(0.5 * (5 + 2 + 0) / 3)
    assert means["kl/chosen"] == pytest.approx(3) and means["kl/rejected"] == pytest.approx(2)
    assert means["kl/margin"] == pytest.approx(1)
    assert means["kl_per_token/chosen"] == pytest.approx(9 / 8)
    assert means["kl_per_token/rejected"] == pytest.approx(6 / 8)
    assert means["kl_per_token/margin"] == pytest.approx(3 / 8)
    assert means["logps/chosen"] == pytest.approx((0 + 2 + 0) / 3)
    scored = torch.tensor([0.5 * (2 - 5), 0.5 * (5 - 2), 0.5 * 9])
    assert means["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(scored).mean().item())


def test_a_tie_counts_as_half_an_accurate_pair() -> None:
    tied = scores([[1.0, 1.0], [0.0, 1.0], [2.0, 1.0]], [[0.0, 0.0]] * 3, [[1, 1]] * 3)
    columns = pair_columns(tied, objectives.tdpo1(0.5))
    assert columns["rewards/accuracies"].tolist() == [0.5, 0.0, 1.0]
    assert columns["implicit_rewards/accuracies"].tolist() == [0.5, 0.0, 1.0]


def test_sums_of_several_processes_are_added() -> None:
    parts, whole = (Sums(), Sums()), Sums()
    parts[0].add(pair_columns(scores([[1.0, 3.0]], [[1.0, 2.0]], [[2, 1]]), objectives.tdpo1(0.5)))
    parts[1].add(pair_columns(scores([[2.0, -2.0]], [[3.0, 4.0]], [[2, 3]]), objectives.tdpo1(0.5)))
    whole.add(
        pair_columns(
            scores([[1.0, 3.0], [2.0, -2.0]], [[1.0, 2.0], [3.0, 4.0]], [[2, 1], [2, 3]]), objectives.tdpo1(0.5)
        )
    )
    other = torch.tensor([list(parts[1].state().values())])
    two: Any = SimpleNamespace(device=torch.device("cpu"), gather=lambda own: torch.cat([own, other]))
    summed, expected = pair_means(parts[0].take(two)), pair_means(whole.state())
    names = set(expected) - {"logps/chosen", "logps/rejected"}
    assert {n: summed[n] for n in names} == pytest.approx({n: expected[n] for n in names})
    assert parts[0].state() == {}


def warnings_of(chosen: list[float], rejected: list[float]) -> list[str]:
    """Returns what is reported at each log, with evaluations between them; empty where nothing is."""
    logs: list[dict[str, float]] = [
        {"implicit_rewards/chosen": c, "implicit_rewards/rejected": r} for c, r in zip(chosen, rejected, strict=True)
    ]
    histories = [[part for log in logs[:end] for part in ({"eval_loss": 1.0}, log)] for end in range(1, len(logs) + 1)]
    return [displacement(history, beta=0.1) for history in histories]


def test_displacement_is_reported_after_three_falling_logs() -> None:
    warnings = warnings_of([0.0, -0.05, -0.08, -0.09, -0.3, -0.2], [0.0, -0.5, -0.9, -1.5, -2.0, -2.5])
    assert [bool(warning) for warning in warnings] == [False, False, False, False, True, False]
    assert "chosen and rejected responses both became less likely" in warnings[4]
    assert "-0.3 and -2" in warnings[4]


def test_displacement_is_reported_once_a_run(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path, tokenizer)
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        for fallen in range(1, 8):
            trainer.log({"loss": 0.5, "implicit_rewards/chosen": -fallen, "implicit_rewards/rejected": -2.0 * fallen})
    assert caplog.text.count("likelihood displacement") == 1


def test_a_rising_chosen_side_or_falling_above_zero_is_no_displacement() -> None:
    assert not any(warnings_of([0.0, 0.1, 0.2, 0.3, 0.4], [0.0, -1.0, -2.0, -3.0, -4.0]))
    assert not any(warnings_of([4.0, 3.0, 2.0, 1.0, 0.5], [0.0, -1.0, -2.0, -3.0, -4.0]))
    assert not any(warnings_of([0.0, -0.1, -0.2, -0.1, -0.2, -0.3], [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]))
