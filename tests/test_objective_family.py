"""Every objective: hand numbers, TRL's figures, and equality with plain autograd, with token weights and without."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from numeric_worlds import BACKENDS, HeadProblem, budget_for, head_problem, plain_logits, plain_token_stats
from test_fused import LENGTHS, TOKENS, Products
from torch import Tensor

from tdpo import UserError, objectives, ops
from tdpo.objectives import OBJECTIVES, Objective, SumObjective, parameter, preference_loss
from tdpo.ops.fused import kl_ratios
from tdpo.types import PairLoss, PairStats, PairTokens

FAMILY = [
    objectives.dpo(0.3),
    objectives.tdpo1(0.3),
    objectives.tdpo2(0.3, 0.7),
    objectives.fdpo(0.3),
    objectives.fdpo(0.3, "js"),
    objectives.fdpo(0.3, "alpha", 0.25),
    objectives.ipo(0.3),
    objectives.robust(0.3, 0.2),
    objectives.dpop(0.3, 5.0),
    objectives.cal_dpo(0.3),
    objectives.simpo(2.0, 0.5),
    objectives.tbpo(0.3),
]
every_objective = pytest.mark.parametrize("objective", FAMILY, ids=str)
PAIRS = len(LENGTHS) // 2


@dataclass(frozen=True)
class Squared(SumObjective):
    """An objective whose ratio of derivatives depends on the sums, so that no pass can know its direction before."""

    name: ClassVar[str] = ""
    beta: float = parameter(0.1, "Scale.", above=0)

    def __call__(self, stats: PairStats) -> PairLoss:
        chosen = self.beta * (stats.chosen_logratio + stats.chosen_kl**2)
        rejected = self.beta * (stats.rejected_logratio + stats.rejected_kl**2)
        return PairLoss(preference_loss(chosen - rejected), chosen.detach(), rejected.detach())


def random_weights(seed: int = 3) -> Tensor:
    """Draws weights ``[2, N]``: some 0 on the log-probability alone, some on the KL alone, one on both."""
    weights = 2 * torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights[0, [1, 9, 17]] = 0
    weights[1, [2, 9, 12]] = 0
    return weights


def sigmoid_loss(score: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-score))


def plain_loss(objective: Objective, logp: Tensor, ref_logp: Tensor, kl: Tensor, weights: Tensor) -> Tensor:
    """Computes the loss of each pair from the papers' formulas, one pair and one token at a time."""
    name, p = objective.name, dict(objective.parameters)
    beta, losses = p["beta"], []
    w, v = weights
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    for pair in range(PAIRS):
        sides = [slice(starts[i], starts[i] + LENGTHS[i]) for i in (2 * pair, 2 * pair + 1)]
        r = [(w[s] * (logp[s] - ref_logp[s])).sum() for s in sides]
        k = [(v[s] * kl[s]).sum() for s in sides]
        n = [LENGTHS[2 * pair], LENGTHS[2 * pair + 1]]
        if name in ("dpo", "robust"):
            u = beta * (r[0] - r[1])
            e = p.get("epsilon", 0.0)
            loss = ((1 - e) * sigmoid_loss(u) - e * sigmoid_loss(-u)) / (1 - 2 * e)
        elif name == "tdpo1":
            loss = sigmoid_loss(beta * ((r[0] - r[1]) - (k[1] - k[0])))
        elif name == "tdpo2":
            loss = sigmoid_loss(beta * ((r[0] - r[1]) - p["alpha"] * (k[1] - k[0].detach())))
        elif name == "fdpo" and p["divergence"] == "forward_kl":
            loss = sigmoid_loss(beta * (torch.exp(-r[1]) - torch.exp(-r[0])))
        elif name == "fdpo" and p["divergence"] == "js":
            f = [torch.log(2 * torch.exp(x) / (1 + torch.exp(x))) for x in r]
            loss = sigmoid_loss(beta * (f[0] - f[1]))
        elif name == "fdpo":
            f = [(torch.exp(x) ** (p["alpha"] - 1) - 1) / (p["alpha"] - 1) for x in r]
            loss = sigmoid_loss(beta * (f[0] - f[1]))
        elif name == "ipo":
            loss = (r[0] / n[0] - r[1] / n[1] - 1 / (2 * beta)) ** 2
        elif name == "dpop":
            loss = sigmoid_loss(beta * (r[0] - r[1] - p["penalty"] * torch.relu(-r[0])))
        elif name == "cal_dpo":
            loss = sigmoid_loss(r[0] - r[1]) + (r[0] - 0.5 / beta) ** 2 + (r[1] + 0.5 / beta) ** 2
        elif name == "simpo":
            mean = [(w[s] * logp[s]).sum() / size for s, size in zip(sides, n, strict=True)]
            loss = sigmoid_loss(beta * (mean[0] - mean[1]) - p["gamma"])
        else:
            shared = min(n)
            advantage = [(w[s] * (logp[s] - ref_logp[s]) + v[s] * kl[s])[:shared] for s in sides]
            loss = sigmoid_loss(beta * (advantage[0] - advantage[1])).mean()
        losses.append(loss)
    return torch.stack(losses)


def problem_of(objective: Objective, spread: float = 0.7, **options: Any) -> HeadProblem:
    return head_problem(tokens=TOKENS, spread=spread, **options)


def test_the_family_is_the_registry() -> None:
    assert {objective.name for objective in FAMILY} == set(OBJECTIVES)


@every_objective
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("rows", [0, 8, 16, 1000])
@pytest.mark.parametrize("head_trained", [True, False], ids=["head", "frozen"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_plain_autograd(backend, head_trained, rows, weighted, objective) -> None:
    problem = problem_of(objective)
    problem.policy.head.weight.requires_grad_(head_trained)
    leaves = [leaf for leaf in problem.leaves if leaf.requires_grad]
    weights = random_weights() if weighted else None
    reference = problem.reference if objective.uses_reference else None
    total, outcome, stats, _ = ops.pair_loss(
        problem.policy, reference, problem.labels, LENGTHS, objective, budget_for(rows, 11), backend, weights
    )
    tokens = plain_token_stats(plain_logits(problem.policy), plain_logits(problem.reference), problem.labels)
    expected = plain_loss(objective, *tokens, torch.ones(2, TOKENS) if weights is None else weights)
    torch.testing.assert_close(outcome.loss, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(total, leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert ((ours - theirs).abs().max() / theirs.abs().max()) < 1e-9
    kl = torch.stack([part.sum() for part in tokens[2].split(LENGTHS)])
    if objective.uses_reference:
        torch.testing.assert_close(stats.chosen_kl, kl[::2].detach(), rtol=1e-9, atol=1e-12)  # never weighted
    else:
        assert stats.chosen_kl.isnan().all() and not stats.chosen_logp.isnan().any()


@every_objective
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_head_products_are_the_fewest(weighted, objective) -> None:
    """4 with a trained head and 3 with a frozen one; without a reference one less."""
    problem = problem_of(objective).cast(torch.float32)
    reference = problem.reference if objective.uses_reference else None
    weights = random_weights() if weighted else None
    counts = []
    for trained in (True, False):
        problem.policy.head.weight.requires_grad_(trained)
        with Products(problem.policy.head.vocab_size) as counted:
            ops.pair_loss(problem.policy, reference, problem.labels, LENGTHS, objective, weights=weights)[0].backward()
        counts.append(counted.count)
    assert counts == ([4, 3] if objective.uses_reference else [3, 2])


@every_objective
def test_weights_of_one_change_no_bit(objective) -> None:
    results = []
    for weights in (None, torch.ones(2, TOKENS)):
        problem = problem_of(objective).cast(torch.float32)
        total, outcome, stats, _ = ops.pair_loss(
            problem.policy, problem.reference, problem.labels, LENGTHS, objective, weights=weights
        )
        results.append([outcome.loss, *vars(stats).values(), *torch.autograd.grad(total, problem.leaves)])
    for plain, weighted in zip(*results, strict=True):
        assert torch.equal(plain, weighted)


@every_objective
@pytest.mark.parametrize("rows", [0, 1000])
def test_a_token_of_weight_zero_has_no_gradient(rows, objective) -> None:
    problem = problem_of(objective)
    weights = random_weights()
    total = ops.pair_loss(
        problem.policy, problem.reference, problem.labels, LENGTHS, objective, budget_for(rows, 11), weights=weights
    )[0]
    (gradient,) = torch.autograd.grad(total, problem.policy.states)
    assert not gradient[9].any()
    assert gradient[8].any()


def test_a_token_of_weight_zero_on_its_log_probability_keeps_the_gradient_of_its_kl() -> None:
    problem, weights = problem_of(objectives.tdpo1(0.3)), random_weights()
    total = ops.pair_loss(
        problem.policy, problem.reference, problem.labels, LENGTHS, objectives.tdpo1(0.3), weights=weights
    )[0]
    (gradient,) = torch.autograd.grad(total, problem.policy.states)
    assert gradient[1].abs().max() > 1e-3 and gradient[17].abs().max() > 1e-3


def test_kl_ratios_of_the_family() -> None:
    ratios = {str(objective): kl_ratios(objective) for objective in FAMILY}
    weighed = {name: ratio for name, ratio in ratios.items() if ratio != (0.0, 0.0)}
    assert weighed == {"tdpo1(beta=0.3)": (1, 1), "tdpo2(beta=0.3, alpha=0.7)": (0, 0.7), "tbpo(beta=0.3)": (1, 1)}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_objective_without_constant_ratios_takes_two_passes_with_the_same_values(backend, weighted) -> None:
    objective, weights = Squared(0.3), random_weights() if weighted else None
    assert kl_ratios(objective) is None
    problem = problem_of(objective)
    total, outcome, _, _ = ops.pair_loss(
        problem.policy, problem.reference, problem.labels, LENGTHS, objective, budget_for(8, 11), backend, weights
    )
    logp, ref_logp, kl = plain_token_stats(
        plain_logits(problem.policy), plain_logits(problem.reference), problem.labels
    )
    w, v = torch.ones(2, TOKENS) if weights is None else weights
    r = torch.stack([part.sum() for part in (w * (logp - ref_logp)).split(LENGTHS)])
    k = torch.stack([part.sum() for part in (v * kl).split(LENGTHS)])
    score = 0.3 * (r + k**2)
    expected = sigmoid_loss(score[::2] - score[1::2])
    torch.testing.assert_close(outcome.loss, expected, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(total, problem.leaves), torch.autograd.grad(expected.sum(), problem.leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


HAND = [
    # log-ratios 3 and -1 nats, KL 0.5 and 2, log-probabilities -6 and -10, 3 and 5 tokens
    (objectives.fdpo(0.5), 0.5 * ((1 - math.exp(-3)) - (1 - math.exp(1)))),
    (objectives.fdpo(0.5, "js"), 0.5 * (math.log(2 / (1 + math.exp(-3))) - math.log(2 / (1 + math.exp(1))))),
    (objectives.fdpo(0.5, "alpha"), 0.5 * 2 * ((1 - math.exp(-1.5)) - (1 - math.exp(0.5)))),
    (objectives.dpop(0.5, 10.0), 0.5 * 4),
    (objectives.simpo(2.0, 0.5), 2 * (-6 / 3 + 10 / 5) - 0.5),
]


def hand_stats() -> PairStats:
    columns = [3.0, -1.0, 0.5, 2.0, -6.0, -10.0, 3.0, 5.0]
    return PairStats(*(torch.tensor([value], dtype=torch.float64) for value in columns))


@pytest.mark.parametrize(
    ("objective", "score"), HAND, ids=lambda value: str(value) if isinstance(value, Objective) else ""
)
def test_scores_by_hand(objective, score) -> None:
    assert objective(hand_stats()).loss.item() == pytest.approx(math.log(1 + math.exp(-score)), abs=1e-13)


def test_losses_by_hand_that_are_no_logistic_function_of_a_score() -> None:
    stats = hand_stats()
    assert objectives.ipo(0.5)(stats).loss.item() == pytest.approx((3 / 3 + 1 / 5 - 1) ** 2, abs=1e-13)
    log_sigmoid = math.log(1 + math.exp(-4))
    assert objectives.cal_dpo(0.5)(stats).loss.item() == pytest.approx(log_sigmoid + (3 - 1) ** 2 + 0, abs=1e-13)
    flipped = math.log(1 + math.exp(2))
    kept = math.log(1 + math.exp(-2))
    robust = objectives.robust(0.5, 0.1)(stats).loss.item()
    assert robust == pytest.approx((0.9 * kept - 0.1 * flipped) / 0.8, abs=1e-13)


def test_dpop_penalises_a_chosen_response_that_got_less_likely() -> None:
    stats = PairStats(*(torch.tensor([value], dtype=torch.float64) for value in (-0.4, -1.0, 0.0, 0.0)))
    score = 0.5 * (-0.4 + 1.0 - 10 * 0.4)
    assert objectives.dpop(0.5, 10.0)(stats).loss.item() == pytest.approx(math.log(1 + math.exp(-score)), abs=1e-13)


def test_tbpo_by_hand() -> None:
    """Advantages 2, 1, 5 of the chosen tokens against 0, 3 of the rejected: the last has no counterpart."""
    tokens = PairTokens(
        torch.tensor([1.5, 1.0, 4.0, 0.0, 2.0], dtype=torch.float64), torch.tensor([0.5, 0.0, 1.0, 0.0, 1.0]),
        torch.zeros(5), torch.tensor([0, 0, 0, 1, 1]), 1,
    )  # fmt: skip
    outcome = objectives.tbpo(0.5).pair_loss(tokens)
    expected = (math.log(1 + math.exp(-0.5 * 2)) + math.log(1 + math.exp(-0.5 * -2))) / 2
    assert outcome.loss.item() == pytest.approx(expected, abs=1e-13)
    assert (outcome.chosen_reward.item(), outcome.rejected_reward.item()) == (4.0, 1.5)


def test_objectives_that_need_lengths_say_so() -> None:
    zero = torch.zeros(1)
    for objective in (objectives.ipo(), objectives.simpo()):
        with pytest.raises(ValueError, match="needs the log-probabilities and lengths"):
            objective(PairStats(zero, zero, zero, zero))


def test_forward_kl_stays_finite_where_a_response_became_impossible() -> None:
    far = PairStats(*(torch.tensor([value]) for value in (-500.0, 0.0, 0.0, 0.0)))
    assert objectives.fdpo(0.1)(far).loss.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("robust", {"epsilon": 0.5}, r"robust: epsilon must be a non-negative and below 0\.5 number, got 0\.5"),
        ("fdpo", {"divergence": "kl"}, "fdpo: divergence must be one of forward_kl, js, alpha, got 'kl'"),
        ("fdpo", {"alpha": 0.3}, r"fdpo: alpha 0\.3 has no effect with divergence forward_kl"),
        ("simpo", {"gamma": -1}, "simpo: gamma must be a non-negative number, got -1"),
        ("dpo", {"gamma": 1}, r"--gamma 1 contradicts --objective dpo: dpo has no gamma \(simpo does\)"),
        ("dpo", {"alpha": 1}, r"dpo has no alpha \(tdpo2, fdpo do\)"),
        ("os:path", {}, "--objective os:path: it must be a frozen dataclass that inherits"),
        ("nonsuch_module:X", {}, "--objective nonsuch_module:X: importing nonsuch_module failed: ModuleNotFoundError"),
        ("os:Nonsuch", {}, "--objective os:Nonsuch: .*has no Nonsuch"),
    ],
)
def test_parameters_out_of_range_are_refused(name, parameters, message) -> None:
    with pytest.raises(UserError, match=message):
        objectives.build(name, **parameters)


def test_an_objective_of_ones_own_is_built_by_its_path() -> None:
    built = objectives.build("test_objective_family:Squared", beta=0.2)
    assert str(built) == "test_objective_family:Squared(beta=0.2)"
    with pytest.raises(UserError, match="test_objective_family:Squared: beta must be a positive number"):
        objectives.build("test_objective_family:Squared", beta=0)


@dataclass(frozen=True)
class _Hinge(SumObjective):
    """A hinge on TDPO1's score, which is met at both points of ``kl_ratios`` for a low target."""

    target: float = -1.0

    def __call__(self, stats: PairStats) -> PairLoss:
        score = stats.chosen_logratio + stats.chosen_kl - stats.rejected_logratio - stats.rejected_kl
        loss = (self.target - score).relu()
        return PairLoss(loss, loss.detach(), loss.detach())


@dataclass(frozen=True)
class _Undefined(_Hinge):
    """NaN wherever it is asked."""

    def __call__(self, stats: PairStats) -> PairLoss:
        loss = (-1 - stats.chosen_kl.abs()).sqrt() + stats.rejected_logratio * torch.nan
        return PairLoss(loss, loss.detach(), loss.detach())


@pytest.mark.parametrize("objective", [_Hinge(-1.0), _Hinge(-100.0), _Undefined()], ids=repr)
def test_a_ratio_that_two_points_do_not_show_is_unknown(objective) -> None:
    assert kl_ratios(objective) is None


def test_a_subclass_of_a_registered_objective_has_its_own_spelling() -> None:
    @dataclass(frozen=True)
    class Mine(objectives.DPO):
        pass

    assert Mine.spelling() == f"{__name__}:{Mine.__qualname__}" and objectives.DPO.spelling() == "dpo"


@dataclass(frozen=True)
class _FarKink(SumObjective):
    """TDPO1 near the points of ``kl_ratios``; beyond a sequential KL of 5 nats its ratio is another."""

    one_pass: ClassVar[bool] = True

    def __call__(self, stats: PairStats) -> PairLoss:
        kl = stats.rejected_kl + 3 * (stats.rejected_kl - 5).relu()
        loss = preference_loss(stats.chosen_logratio + stats.chosen_kl - stats.rejected_logratio - kl)
        return PairLoss(loss, loss.detach(), loss.detach())


@dataclass(frozen=True)
class _FarKinkInTwoPasses(_FarKink):
    one_pass: ClassVar[bool] = False


def test_a_ratio_that_changes_far_away_is_noticed_in_the_step() -> None:
    problem = problem_of(objectives.tdpo1(), spread=2.0)
    arguments = problem.policy, problem.reference, problem.labels, LENGTHS
    assert kl_ratios(_FarKink()) == (1.0, 1.0)
    with pytest.raises(ValueError, match="changes with the statistics; set one_pass = False"):
        ops.pair_loss(*arguments, _FarKink())
    total = ops.pair_loss(*arguments, _FarKinkInTwoPasses())[0]
    naive = ops.pair_loss(*arguments, _FarKink(), backend="naive")[0]
    for ours, theirs in zip(
        torch.autograd.grad(total, problem.leaves), torch.autograd.grad(naive, problem.leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class Undecorated(objectives.DPO):
    pass


def test_a_class_that_is_no_dataclass_is_refused() -> None:
    with pytest.raises(UserError, match="must be a frozen dataclass"):
        objectives.build("test_objective_family:Undecorated")
