"""DPO and TDPO as functions of pair statistics: hand numbers, symmetries, KL ratios, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from numeric_worlds import OBJECTIVE_PARAMETERS, plain_pair_loss
from torch import Tensor

from tdpo import UserError, objectives
from tdpo.objectives import SumObjective
from tdpo.ops.fused import kl_ratios
from tdpo.types import PairStats

ROUNDING = {"rtol": 1e-13, "atol": 0}
every_objective = pytest.mark.parametrize(("name", "parameters"), OBJECTIVE_PARAMETERS)


def random_stats(seed: int = 0, pairs: int = 6, requires_grad: bool = False) -> PairStats:
    generator = torch.Generator().manual_seed(seed)
    logratios = 4 * torch.randn(2, pairs, generator=generator, dtype=torch.float64)
    kls = 3 * torch.rand(2, pairs, generator=generator, dtype=torch.float64)
    return PairStats(*(column.clone().requires_grad_(requires_grad) for column in (*logratios, *kls)))


def columns(stats: PairStats) -> list[Tensor]:
    return [stats.chosen_logratio, stats.rejected_logratio, stats.chosen_kl, stats.rejected_kl]


def swapped(stats: PairStats) -> PairStats:
    return PairStats(stats.rejected_logratio, stats.chosen_logratio, stats.rejected_kl, stats.chosen_kl)


def score_of(loss: Tensor) -> Tensor:
    """Returns the score u that ``loss = -log sigmoid(u)`` was made of."""
    return -torch.log(torch.expm1(loss))


def derivatives(objective: SumObjective, stats: PairStats) -> list[Tensor]:
    grads = torch.autograd.grad(objective(stats).loss.sum(), columns(stats), allow_unused=True)
    return [torch.zeros_like(stats.chosen_kl) if grad is None else grad for grad in grads]


@pytest.mark.parametrize(
    ("objective", "score", "chosen_reward", "rejected_reward"),
    [
        # log-ratios 3 and -1, sequential KLs 0.5 and 2
        (objectives.dpo(beta=0.5), 0.5 * 4, 1.5, -0.5),
        (objectives.tdpo1(beta=0.5), 0.5 * (4 - 1.5), 1.75, 0.5),
        (objectives.tdpo2(beta=0.5, alpha=0.2), 0.5 * (4 - 0.3), 1.75, 0.5),
    ],
    ids=["dpo", "tdpo1", "tdpo2"],
)
def test_loss_and_rewards_are_the_formulas(objective, score, chosen_reward, rejected_reward):
    outcome = objective(PairStats(*torch.tensor([[3.0], [-1.0], [0.5], [2.0]], dtype=torch.float64)))
    assert outcome.loss.item() == pytest.approx(math.log(1 + math.exp(-score)), abs=1e-14)
    assert outcome.chosen_reward.item() == pytest.approx(chosen_reward, abs=1e-14)
    assert outcome.rejected_reward.item() == pytest.approx(rejected_reward, abs=1e-14)


@every_objective
def test_random_statistics_give_the_papers_losses_and_derivatives(name, parameters):
    stats = random_stats(requires_grad=True)
    ours = objectives.build(name, **parameters)(stats).loss
    theirs = plain_pair_loss(name, stats, **parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), columns(stats), allow_unused=True),
        torch.autograd.grad(theirs.sum(), columns(stats), allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@every_objective
def test_equal_sides_cost_log_two(name, parameters):
    stats = random_stats()
    equal = PairStats(stats.chosen_logratio, stats.chosen_logratio, stats.chosen_kl, stats.chosen_kl)
    outcome = objectives.build(name, **parameters)(equal)
    torch.testing.assert_close(outcome.loss, torch.full_like(outcome.loss, math.log(2)), rtol=0, atol=1e-15)
    assert torch.equal(outcome.chosen_reward, outcome.rejected_reward)


@every_objective
def test_swapping_the_pair_negates_the_score_and_exchanges_the_rewards(name, parameters):
    objective, stats = objectives.build(name, **parameters), random_stats()
    outcome, mirrored = objective(stats), objective(swapped(stats))
    torch.testing.assert_close(score_of(mirrored.loss), -score_of(outcome.loss), rtol=1e-9, atol=1e-12)
    assert torch.equal(mirrored.chosen_reward, outcome.rejected_reward)
    assert torch.equal(mirrored.rejected_reward, outcome.chosen_reward)
    assert score_of(outcome.loss).abs().min() > 0.01


@every_objective
def test_kl_ratios_are_those_of_autograd_at_any_point(name, parameters):
    objective = objectives.build(name, **parameters)
    chosen_r, rejected_r, chosen_k, rejected_k = derivatives(objective, random_stats(requires_grad=True))
    of_chosen, of_rejected = kl_ratios(objective)
    torch.testing.assert_close(chosen_k / chosen_r, torch.full_like(chosen_r, of_chosen), rtol=0, atol=1e-12)
    torch.testing.assert_close(rejected_k / rejected_r, torch.full_like(rejected_r, of_rejected), rtol=0, atol=1e-12)


def test_kl_ratios_by_name():
    """c_w and c_l of the design: DPO ignores the KL, TDPO1 takes all of it, TDPO2 alpha on the rejected side alone."""
    ratios = {
        str(objective): kl_ratios(objective)
        for objective in (objectives.dpo(0.1), objectives.tdpo1(0.1), objectives.tdpo2(0.1, 0.3))
    }
    assert ratios == {"dpo(beta=0.1)": (0, 0), "tdpo1(beta=0.1)": (1, 1), "tdpo2(beta=0.1, alpha=0.3)": (0, 0.3)}


def test_gradients_push_the_right_way():
    """Descent raises the chosen log-ratio and lowers the rejected one; the rejected KL is pulled down."""
    for name, parameters in OBJECTIVE_PARAMETERS:
        stats = random_stats(requires_grad=True)
        chosen_r, rejected_r, _, rejected_k = derivatives(objectives.build(name, **parameters), stats)
        assert (chosen_r < 0).all() and (rejected_r > 0).all(), name
        assert (rejected_k > 0).all() if name != "dpo" else (rejected_k == 0).all(), name


def test_tdpo2_stops_the_gradient_of_the_chosen_kl_but_not_its_value():
    objective, stats = objectives.tdpo2(beta=0.3, alpha=0.7), random_stats(requires_grad=True)
    assert (derivatives(objective, stats)[2] == 0).all()
    raised = PairStats(stats.chosen_logratio, stats.rejected_logratio, stats.chosen_kl + 1, stats.rejected_kl)
    torch.testing.assert_close(
        score_of(objective(raised).loss) - score_of(objective(stats).loss),
        torch.full_like(stats.chosen_kl, 0.3 * 0.7),
        rtol=1e-9,
        atol=1e-12,
    )


def test_tdpo2_at_full_weight_has_tdpo1s_value_and_another_gradient():
    stats = random_stats(requires_grad=True)
    first, second = objectives.tdpo1(beta=0.3), objectives.tdpo2(beta=0.3, alpha=1.0)
    torch.testing.assert_close(first(stats).loss, second(stats).loss, rtol=1e-15, atol=0)
    ours, theirs = derivatives(first, stats), derivatives(second, stats)
    for side in (0, 1, 3):
        torch.testing.assert_close(ours[side], theirs[side], rtol=1e-14, atol=0)
    assert (ours[2] < 0).all() and (theirs[2] == 0).all()


@pytest.mark.parametrize("objective", [objectives.tdpo1(0.3), objectives.tdpo2(0.3, 0.7)], ids=str)
def test_without_kl_tdpo_is_dpo(objective):
    stats = random_stats()
    none = torch.zeros_like(stats.chosen_kl)
    flat = PairStats(stats.chosen_logratio, stats.rejected_logratio, none, none)
    dpo = objectives.dpo(0.3)(flat)
    ours = objective(flat)
    torch.testing.assert_close(ours.loss, dpo.loss, **ROUNDING)
    torch.testing.assert_close(ours.chosen_reward, dpo.chosen_reward, **ROUNDING)
    torch.testing.assert_close(ours.rejected_reward, dpo.rejected_reward, **ROUNDING)


def test_tdpo2_with_zero_alpha_has_dpos_loss_and_gradient():
    stats = random_stats(requires_grad=True)
    ours, dpo = objectives.tdpo2(beta=0.3, alpha=0.0), objectives.dpo(beta=0.3)
    torch.testing.assert_close(ours(stats).loss, dpo(stats).loss, **ROUNDING)
    for a, b in zip(derivatives(ours, stats), derivatives(dpo, stats), strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)


@every_objective
def test_rewards_carry_no_gradient_and_the_loss_does(name, parameters):
    outcome = objectives.build(name, **parameters)(random_stats(requires_grad=True))
    assert outcome.loss.requires_grad
    assert not outcome.chosen_reward.requires_grad and not outcome.rejected_reward.requires_grad


@every_objective
def test_extreme_scores_stay_finite(name, parameters):
    """A pair the policy gets wrong by 10,000 nats costs beta times that, and its gradient is beta."""
    far = PairStats(*(torch.tensor([value], requires_grad=True) for value in (-1e4, 0.0, 0.0, 0.0)))
    objective = objectives.build(name, **parameters)
    assert objective(far).loss.item() == pytest.approx(0.3 * 1e4)
    assert derivatives(objective, far)[0].item() == pytest.approx(-0.3)
    assert objective(swapped(far)).loss.item() == 0.0


def test_build_keeps_defaults_and_names_its_parameters():
    built = objectives.build("tdpo2", beta=None, alpha=None)
    assert (built.name, dict(built.parameters)) == ("tdpo2", {"beta": 0.1, "alpha": 0.5})
    assert dict(objectives.build("tdpo1", beta=0.25, alpha=None).parameters) == {"beta": 0.25}


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("dpo", {"beta": 0.1, "alpha": 0.5}, ["--alpha 0.5", "--objective dpo", "tdpo2"]),
        ("tdpo1", {"alpha": 0.5}, ["--alpha 0.5", "--objective tdpo1", "tdpo2"]),
        ("dpo", {"gamma": 0.5}, ["--gamma", "dpo has no gamma"]),
        ("tdpo3", {}, ["'tdpo3'", "dpo, tdpo1, tdpo2", "Did you mean 'tdpo"]),
        ("kto", {"beta": 0.1}, ["'kto'", "dpo, tdpo1, tdpo2"]),
        ("tdpo2", {"beta": -0.1}, ["tdpo2: beta", "positive", "-0.1"]),
        ("tdpo2", {"beta": 0.0}, ["tdpo2: beta", "positive"]),
        ("tdpo2", {"beta": 0.1, "alpha": -1.0}, ["tdpo2: alpha", "non-negative", "-1"]),
        ("dpo", {"beta": math.nan}, ["dpo: beta", "nan"]),
        ("tdpo2", {"alpha": math.inf}, ["tdpo2: alpha", "inf"]),
    ],
    ids=str,
)
def test_build_refuses_with_words_the_user_can_act_on(name, parameters, words):
    with pytest.raises(UserError) as caught:
        objectives.build(name, **parameters)
    for word in words:
        assert word in str(caught.value)


def test_zero_alpha_is_allowed():
    assert kl_ratios(objectives.build("tdpo2", alpha=0.0)) == (0.0, 0.0)
