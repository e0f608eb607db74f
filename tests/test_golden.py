"""Figures that were not computed here: those of the TDPO authors' code, and a case solved by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric_worlds import BACKENDS, gradients, shared_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from tdpo import objectives, ops, score_pairs
from tdpo.objectives import Objective
from tdpo.types import Head, Hidden, PairStats, TokenisedPair

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
LOGITS = Path(__file__).parent / "golden" / "tdpo_logits.json"
STORIES = shared_folder() / "golden" / "tdpo_stories260k_hh6.json"
STORIES_MODEL = shared_folder() / "data" / "models" / "stories260k"


def needs(*paths: Path) -> pytest.MarkDecorator:
    missing = [path.name for path in paths if not path.exists()]
    return pytest.mark.skipif(
        bool(missing),
        reason=f"the authors' figures are not here ({', '.join(missing)}); they live in a folder named shared beside "
        "the repository, or where TDPO_SHARED points",
    )


def cases(path: Path) -> list[Any]:
    """Returns a golden file's objectives as test parameters; one placeholder where the file is absent."""
    if not path.exists():
        return [pytest.param(None, id="absent")]
    return [
        pytest.param(case, id=f"{case['objective']}-{case['beta']}-{case.get('alpha', 'none')}")
        for case in json.loads(path.read_text())["cases"]
    ]


def objective_of(case: dict[str, Any]) -> Objective:
    return objectives.build(case["objective"], beta=case["beta"], alpha=case.get("alpha"))


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("budget", [None, 1], ids=["one_chunk", "row_by_row"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases(LOGITS))
def test_authors_losses_rewards_and_logit_gradients(case: dict[str, Any], backend: ops.BackendName, budget: int | None):
    golden = json.loads(LOGITS.read_text())
    policy, reference = float64(golden["policy_logits"]), float64(golden["reference_logits"])
    targets = torch.tensor(golden["labels"])[:, 1:]
    num_pairs, vocab = len(policy) // 2, policy.shape[-1]
    keep = targets != -100
    identity = Head(torch.eye(vocab, dtype=torch.float64))  # hidden states that are their own logits
    states = policy[:, :-1][keep].requires_grad_()
    tokens = ops.response_stats(
        Hidden(states, identity), Hidden(reference[:, :-1][keep], identity), targets[keep], backend, budget
    )

    sequence = torch.arange(2 * num_pairs)[:, None].expand_as(keep)[keep]
    margin, kl, logp = (
        torch.zeros(2 * num_pairs, dtype=torch.float64).index_add(0, sequence, values)
        for values in (tokens.logp - tokens.ref_logp, tokens.kl, tokens.logp)
    )
    torch.testing.assert_close(margin, float64(golden["margin"]), **TOLERANCE)
    torch.testing.assert_close(kl, float64(golden["kl"]), **TOLERANCE)
    torch.testing.assert_close(logp, float64(golden["policy_logp"]), **TOLERANCE)

    outcome = objective_of(case)(PairStats(margin[:num_pairs], margin[num_pairs:], kl[:num_pairs], kl[num_pairs:]))
    torch.testing.assert_close(outcome.loss, float64(case["loss_per_pair"]), **TOLERANCE)
    torch.testing.assert_close(outcome.chosen_reward, float64(case["chosen_reward"]), **TOLERANCE)
    torch.testing.assert_close(outcome.rejected_reward, float64(case["rejected_reward"]), **TOLERANCE)

    (ours,) = torch.autograd.grad(outcome.loss.mean(), states)
    theirs = float64(case["grad_policy_logits_of_mean_loss"])
    torch.testing.assert_close(ours, theirs[:, :-1][keep], **TOLERANCE)
    everywhere = torch.zeros_like(theirs)
    everywhere[:, :-1][keep] = ours
    torch.testing.assert_close(everywhere, theirs, **TOLERANCE)  # positions left out have no gradient in theirs


@needs(STORIES, STORIES_MODEL)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases(STORIES))
def test_authors_statistics_and_gradient_norms_of_a_real_model(case: dict[str, Any], backend: ops.BackendName):
    golden = json.loads(STORIES.read_text())
    reference = AutoModelForCausalLM.from_pretrained(STORIES_MODEL, dtype=torch.float64).eval()
    policy = AutoModelForCausalLM.from_pretrained(STORIES_MODEL, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter *= golden["policy_scale"]
    pairs = [TokenisedPair(p["prompt_ids"], p["chosen_ids"], p["rejected_ids"], p["row"]) for p in golden["pairs"]]

    scores = score_pairs(policy, reference, pairs, objective_of(case), backend=backend)
    stats = scores.stats
    torch.testing.assert_close(
        torch.cat([stats.chosen_logratio, stats.rejected_logratio]), float64(case["margin"]), **TOLERANCE
    )
    torch.testing.assert_close(torch.cat([stats.chosen_kl, stats.rejected_kl]), float64(case["kl"]), **TOLERANCE)
    torch.testing.assert_close(scores.loss, float64(case["loss_per_pair"]), **TOLERANCE)
    torch.testing.assert_close(scores.loss.mean(), float64(case["mean_loss"]), **TOLERANCE)
    torch.testing.assert_close(scores.chosen_reward, float64(case["chosen_reward"]), **TOLERANCE)
    torch.testing.assert_close(scores.rejected_reward, float64(case["rejected_reward"]), **TOLERANCE)

    ours = gradients(scores.loss.mean(), policy)
    theirs = case["grad_norm_by_parameter"]
    assert ours.keys() == theirs.keys()
    for name, norm in theirs.items():
        assert ours[name].norm().item() == pytest.approx(norm, rel=1e-9), name
    total = math.sqrt(sum(gradient.square().sum().item() for gradient in ours.values()))
    assert total == pytest.approx(case["grad_norm_of_mean_loss"], rel=1e-9)


# Two words; the policy tosses a coin, the reference says (1/4, 3/4). Chosen: word 0. Rejected: word 1, twice.
#   log-ratios: log 2 and 2 log(2/3); KL(reference || policy) = 1/4 log(1/2) + 3/4 log(3/2) at every token.
#   Gradient in the logits of a token: -s (onehot - (1-c) p - c p_ref) if chosen, +s (...) if rejected, with
#   s = beta sigmoid(-u), as fractions of s below.
BETA, ALPHA = 0.5, 0.5
KL = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
MARGIN = math.log(2) - 2 * math.log(2 / 3)
BY_HAND = {
    "dpo": (MARGIN, [-1 / 2, 1 / 2], [-1 / 2, 1 / 2]),
    "tdpo1": (MARGIN - KL, [-3 / 4, 3 / 4], [-1 / 4, 1 / 4]),
    "tdpo2": (MARGIN - ALPHA * KL, [-1 / 2, 1 / 2], [-3 / 8, 3 / 8]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BY_HAND)
def test_two_word_world_solved_by_hand(name: str, backend: ops.BackendName):
    score, chosen_fraction, rejected_fraction = BY_HAND[name]
    states = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    ref_states = float64([[0.0, math.log(3)]]).expand(3, 2)
    identity = torch.eye(2, dtype=torch.float64)
    tokens = ops.token_stats(states, identity, ref_states, identity, torch.tensor([0, 1, 1]), backend=backend)
    torch.testing.assert_close(tokens.logp, float64([math.log(1 / 2)] * 3), rtol=0, atol=1e-14)
    torch.testing.assert_close(tokens.ref_logp, float64([1 / 4, 3 / 4, 3 / 4]).log(), rtol=0, atol=1e-14)
    torch.testing.assert_close(tokens.kl, float64([KL] * 3), rtol=0, atol=1e-14)

    logratio = tokens.logp - tokens.ref_logp
    stats = PairStats(logratio[:1], logratio[1:].sum()[None], tokens.kl[:1], tokens.kl[1:].sum()[None])
    alpha = ALPHA if name == "tdpo2" else None
    outcome = objectives.build(name, beta=BETA, alpha=alpha)(stats)
    assert outcome.loss.item() == pytest.approx(math.log(1 + math.exp(-BETA * score)), abs=1e-14)
    with_kl = 0.0 if name == "dpo" else KL
    assert outcome.chosen_reward.item() == pytest.approx(BETA * (math.log(2) + with_kl), abs=1e-14)
    assert outcome.rejected_reward.item() == pytest.approx(BETA * (2 * math.log(2 / 3) + 2 * with_kl), abs=1e-14)

    (gradient,) = torch.autograd.grad(outcome.loss.sum(), states)
    strength = BETA / (1 + math.exp(BETA * score))
    expected = strength * float64([chosen_fraction, rejected_fraction, rejected_fraction])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
