"""The per-token operation: every backend equals the definitions, in values and gradients, in every precision."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from numeric_worlds import BACKENDS, HeadProblem, budget_for, head_problem, plain_logits, plain_token_stats
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tdpo import UserError, objectives, ops
from tdpo.ops import BackendName
from tdpo.ops import rows as rows_module
from tdpo.ops.chunked import LOGP_BUFFERS
from tdpo.ops.fused import kl_ratios
from tdpo.ops.heads import chunk_rows, default_logits_budget
from tdpo.ops.numerics import kl_terms
from tdpo.types import Head, Hidden, PairStats, TokenStats

every_backend = pytest.mark.parametrize("backend", BACKENDS)

SHAPES = {
    "plain": {},
    "one_row": {"tokens": 1},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "soft_cap": {"soft_cap": 1.5},
    "bias_scale_and_soft_cap": {"bias": True, "scale": 1.7, "soft_cap": 2.0},
    "another_reference_width": {"ref_width": 3, "bias": True},
    "two_words": {"vocab": 2},
    "near_reference": {"closeness": 1e-3},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def stats_of(problem: HeadProblem, backend: BackendName = "naive", budget: int | None = None) -> TokenStats:
    return ops.response_stats(problem.policy, problem.reference, problem.labels, backend, budget)


def upstream(problem: HeadProblem, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Draws arbitrary weights of each token's log-probability and KL in a loss."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, len(problem.labels), generator=generator, dtype=torch.float64).unbind()


def gradients_of(problem: HeadProblem, backend: BackendName = "naive", budget: int | None = None) -> list[Tensor]:
    a, b = upstream(problem)
    stats = stats_of(problem, backend, budget)
    return list(torch.autograd.grad((a.to(stats.logp) * stats.logp + b.to(stats.kl) * stats.kl).sum(), problem.leaves))


def true_stats(problem: HeadProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the definitions in float64 on the problem's (rounded) numbers."""
    exact = problem.cast(torch.float64)
    return plain_token_stats(plain_logits(exact.policy), plain_logits(exact.reference), problem.labels)


def true_gradients(problem: HeadProblem) -> list[Tensor]:
    exact = problem.cast(torch.float64)
    a, b = upstream(problem)
    logp, _, kl = plain_token_stats(plain_logits(exact.policy), plain_logits(exact.reference), problem.labels)
    return list(torch.autograd.grad((a * logp + b * kl).sum(), exact.leaves))


def largest_error(ours: Tensor, truth: Tensor) -> float:
    """Returns the largest difference, relative to the largest true entry."""
    return ((ours.double() - truth).abs().max() / truth.abs().max()).item()


# --- values and gradients -------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("budget", [None, 1, budget_for(3, 11)], ids=["one_chunk", "row_by_row", "three_rows"])
@every_backend
def test_float64_equals_the_definitions(shape: dict[str, Any], budget: int | None, backend: BackendName):
    problem = head_problem(**shape)
    stats = stats_of(problem, backend, budget)
    for ours, truth in zip((stats.logp, stats.ref_logp, stats.kl), true_stats(problem), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)
    for ours, truth in zip(gradients_of(problem, backend, budget), true_gradients(problem), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@every_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_chunked_equals_naive(shape: dict[str, Any], dtype: torch.dtype):
    problem = head_problem(dtype=dtype, **({"tokens": 37, "vocab": 23} | shape))
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 2e-6)
    budget = budget_for(5, 23, dtype)
    naive, chunked = stats_of(problem), stats_of(problem, "chunked", budget)
    for a, b in zip((chunked.logp, chunked.ref_logp, chunked.kl), (naive.logp, naive.ref_logp, naive.kl), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    for a, b in zip(gradients_of(problem, "chunked", budget), gradients_of(problem), strict=True):
        assert a.dtype == b.dtype == dtype
        assert largest_error(a, b.double()) < rtol


def test_the_chunk_size_leaves_values_and_gradients_alone():
    problem = head_problem(tokens=40, bias=True, soft_cap=2.0)
    whole, whole_gradients = stats_of(problem, "chunked"), gradients_of(problem, "chunked")
    for rows in (1, 7, 39, 40, 1000):
        budget = budget_for(rows, 11, buffers=3)
        assert chunk_rows(problem.policy.head, torch.float64, budget) == rows
        stats = stats_of(problem, "chunked", budget)
        torch.testing.assert_close(stats.logp, whole.logp, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(stats.kl, whole.kl, rtol=1e-13, atol=1e-14)
        for a, b in zip(gradients_of(problem, "chunked", budget), whole_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_auto_is_one_of_the_named_backends():
    problem = head_problem(dtype=torch.float32)
    auto = stats_of(problem, "auto")
    assert any(torch.equal(auto.kl, stats_of(problem, backend).kl) for backend in BACKENDS)


@every_backend
def test_token_stats_takes_bare_tensors(backend: BackendName):
    problem = head_problem(bias=True, ref_width=3)
    policy, reference = problem.policy, problem.reference
    bare = ops.token_stats(
        policy.states,
        policy.head.weight,
        reference.states,
        reference.head.weight,
        problem.labels,
        bias=policy.head.bias,
        ref_bias=reference.head.bias,
        backend=backend,
    )
    whole = stats_of(problem, backend)
    assert torch.equal(bare.logp, whole.logp) and torch.equal(bare.ref_logp, whole.ref_logp)
    assert torch.equal(bare.kl, whole.kl)


@every_backend
@pytest.mark.parametrize("shape", [{}, {"bias": True, "scale": 0.6, "soft_cap": 2.5}], ids=["plain", "capped"])
def test_gradcheck(shape: dict[str, Any], backend: BackendName):
    problem = head_problem(tokens=4, vocab=6, width=3, **shape)

    def values(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        policy = Hidden(states, replace(problem.policy.head, weight=weight, bias=bias))
        stats = ops.response_stats(policy, problem.reference, problem.labels, backend, 1)
        return stats.logp, stats.kl

    assert torch.autograd.gradcheck(values, problem.leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


@every_backend
@pytest.mark.parametrize("used", ["logp", "kl"])
def test_one_statistic_alone_has_its_own_gradient(used: str, backend: BackendName):
    """d logp / d logits = onehot - p and d KL / d logits = p - p_ref, each without the other."""
    problem = head_problem(vocab=6, width=6)
    policy, reference = problem.policy.states, problem.reference.states
    identity = torch.eye(6, dtype=torch.float64)
    stats = ops.token_stats(policy, identity, reference, identity, problem.labels, backend=backend)
    (ours,) = torch.autograd.grad(getattr(stats, used).sum(), policy)
    p, p_ref = policy.detach().softmax(-1), reference.softmax(-1)
    expected = F.one_hot(problem.labels, 6) - p if used == "logp" else p - p_ref
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@every_backend
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2), (0, 1)], ids=str)
def test_frozen_tensors_get_no_gradient_and_the_others_keep_theirs(frozen: tuple[int, ...], backend: BackendName):
    problem = head_problem(bias=True)
    expected = gradients_of(problem)
    for index in frozen:
        problem.leaves[index].requires_grad_(False)
    a, b = upstream(problem)
    stats = stats_of(problem, backend)
    (a * stats.logp + b * stats.kl).sum().backward()
    for index, leaf in enumerate(problem.leaves):
        if index in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[index], rtol=1e-11, atol=1e-13)


@every_backend
def test_without_gradients_the_values_are_the_same_and_nothing_is_kept(backend: BackendName):
    problem = head_problem(bias=True)
    wanted = stats_of(problem, backend)
    assert wanted.logp.requires_grad and wanted.kl.requires_grad and not wanted.ref_logp.requires_grad
    with torch.no_grad():
        stats = stats_of(problem, backend)
    assert not stats.logp.requires_grad and not stats.kl.requires_grad
    assert torch.equal(stats.logp, wanted.logp) and torch.equal(stats.kl, wanted.kl)


@every_backend
def test_the_reference_never_receives_a_gradient(backend: BackendName):
    problem = head_problem(bias=True)
    theirs = [problem.reference.states, problem.reference.head.weight, problem.reference.head.bias]
    for tensor in theirs:
        assert tensor is not None
        tensor.requires_grad_()
    stats = stats_of(problem, backend)
    assert not stats.ref_logp.requires_grad
    (stats.logp.sum() + stats.kl.sum()).backward()
    assert all(tensor is not None and tensor.grad is None for tensor in theirs)
    assert problem.leaves[0].grad is not None and problem.leaves[0].grad.abs().max() > 0.01


@every_backend
def test_one_tied_weight_collects_both_sides_only_from_the_policy(backend: BackendName):
    """Policy and reference share one head tensor (an adapter with its base): the reference's use adds nothing."""
    problem = head_problem()
    shared = problem.policy.head
    tied = HeadProblem(problem.policy, Hidden(problem.reference.states, shared), problem.labels)
    apart = Hidden(problem.reference.states, Head(shared.weight.detach().clone()))
    untied = HeadProblem(problem.policy, apart, problem.labels)
    for a, b in zip(gradients_of(tied, backend), true_gradients(untied), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@every_backend
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_tdpo2_gradient_equals_plain_autograd(alpha: float, backend: BackendName):
    """Finite differences see through the stop-gradient, so the comparison is with autograd of the definition."""
    problem = head_problem(tokens=8)
    chosen = torch.arange(8) < 3

    def loss(logp: Tensor, ref_logp: Tensor, kl: Tensor, ours: bool) -> Tensor:
        ratio = logp - ref_logp
        sums = [value[side].sum()[None] for value in (ratio, kl) for side in (chosen, ~chosen)]
        if ours:
            return objectives.tdpo2(beta=0.4, alpha=alpha)(PairStats(*sums)).loss.sum()
        score = (sums[0] - sums[1]) - alpha * (sums[3] - sums[2].detach())
        return -F.logsigmoid(0.4 * score).sum()

    stats = stats_of(problem, backend, 1)
    ours = torch.autograd.grad(loss(stats.logp, stats.ref_logp, stats.kl, True), problem.leaves)
    plain = plain_token_stats(plain_logits(problem.policy), plain_logits(problem.reference), problem.labels)
    theirs = torch.autograd.grad(loss(*plain, False), problem.leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@every_backend
@pytest.mark.parametrize(
    "objective",
    [objectives.dpo(0.4), objectives.tdpo1(0.4), objectives.tdpo2(0.4, 0.3), objectives.tdpo2(0.4, 1.0)],
    ids=str,
)
def test_the_declared_ratios_give_the_direction_of_the_logit_gradient(
    objective: objectives.Objective, backend: BackendName
):
    """Per token the gradient is one scalar a sequence times onehot - (1 - c) p - c p_ref, with opposite signs."""
    problem = head_problem(tokens=8, vocab=6, width=6)
    policy, reference = problem.policy.states, problem.reference.states
    identity = torch.eye(6, dtype=torch.float64)
    chosen = torch.arange(8) < 3
    tokens = ops.token_stats(policy, identity, reference, identity, problem.labels, backend=backend)
    ratio = tokens.logp - tokens.ref_logp
    stats = PairStats(*(value[side].sum()[None] for value in (ratio, tokens.kl) for side in (chosen, ~chosen)))
    loss = objective(stats).loss
    (ours,) = torch.autograd.grad(loss.sum(), policy)
    strength = 0.4 * (1 - torch.exp(-loss.detach()))  # beta sigmoid(-u)
    onehot, p, p_ref = F.one_hot(problem.labels, 6), policy.detach().softmax(-1), reference.softmax(-1)
    for side, sign, c in ((chosen, -1, kl_ratios(objective)[0]), (~chosen, 1, kl_ratios(objective)[1])):
        direction = (onehot - (1 - c) * p - c * p_ref)[side]
        torch.testing.assert_close(ours[side], sign * strength * direction, rtol=1e-10, atol=1e-12)


# --- the divergence -------------------------------------------------------------------------------------------------


@every_backend
def test_the_divergence_is_kl_of_reference_from_policy_and_not_the_reverse(backend: BackendName):
    problem = head_problem(spread=1.5)
    kl = stats_of(problem, backend).kl
    policy, reference = (
        torch.distributions.Categorical(logits=plain_logits(side).detach())
        for side in (problem.policy, problem.reference)
    )
    forward = torch.distributions.kl_divergence(reference, policy)
    reverse = torch.distributions.kl_divergence(policy, reference)
    torch.testing.assert_close(kl, forward, rtol=1e-11, atol=1e-13)
    assert ((forward - reverse).abs() / forward).min() > 0.05


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_models_have_exactly_no_divergence(dtype: torch.dtype, backend: BackendName):
    policy = head_problem(tokens=50, vocab=300, width=16, bias=True, soft_cap=20.0, spread=2.0, dtype=dtype).policy
    labels = torch.arange(50)
    stats = ops.response_stats(policy, policy, labels, backend)
    assert (stats.kl == 0).all()
    assert torch.equal(stats.logp, stats.ref_logp)
    (gradient,) = torch.autograd.grad(stats.kl.sum(), policy.states)
    assert gradient.abs().max() < 1e-6


@every_backend
@pytest.mark.parametrize("closeness", [2e-4, 5e-4, 1e-3, 3e-3, 1e-2])
def test_tiny_divergences_keep_their_relative_accuracy_in_float32(closeness: float, backend: BackendName):
    problem = head_problem(tokens=60, vocab=4000, width=8, closeness=closeness, spread=1.0, seed=3, dtype=torch.float32)
    truth = true_stats(problem)[2]
    assert 1e-7 < truth.median() < 3e-3
    assert ((stats_of(problem, backend).kl.double() - truth).abs() / truth)[truth > 1e-7].max() < 0.01


def test_the_textbook_sum_would_lose_the_tiny_divergences():
    """Why the series: sum p_ref (log p_ref - log p) in float32 is wrong by more than its value, also in sign."""
    problem = head_problem(tokens=60, vocab=4000, width=8, closeness=1e-4, seed=3, dtype=torch.float32)
    truth = true_stats(problem)[2]
    textbook = plain_token_stats(plain_logits(problem.policy), plain_logits(problem.reference), problem.labels)[2]
    assert textbook.min() < 0
    assert ((textbook.double() - truth).abs() / truth).max() > 1


@every_backend
@pytest.mark.parametrize("gap", [200.0, 1e4])
def test_certain_references_and_policies_stay_finite(gap: float, backend: BackendName):
    """Tokens 0: reference certain; 1: policy certain of another word; 2: both certain of the same word."""
    reference = torch.tensor([[gap, 0.0, 0.0], [gap, 0.0, 0.0], [gap, 0.0, 0.0]])
    states = torch.tensor([[0.0, 0.0, 0.0], [0.0, gap, 0.0], [gap, 0.0, 0.0]], requires_grad=True)
    identity = torch.eye(3)
    stats = ops.token_stats(states, identity, reference, identity, torch.tensor([1, 0, 0]), backend=backend)
    third = math.log(3)
    torch.testing.assert_close(stats.logp, torch.tensor([-third, -gap, 0.0]))
    torch.testing.assert_close(stats.ref_logp, torch.tensor([-gap, 0.0, 0.0]))
    torch.testing.assert_close(stats.kl, torch.tensor([third, gap, 0.0]))
    (gradient,) = torch.autograd.grad((stats.logp + stats.kl).sum(), states)
    # onehot - p + p - p_ref = onehot - p_ref
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0, 0.0], [0.0] * 3, [0.0] * 3]), rtol=0, atol=1e-6)


def test_softmax_then_log_is_what_must_not_be_done():
    """The formula of the authors' code on the first token of the test above."""
    reference, policy = torch.tensor([[200.0, 0.0, 0.0]]), torch.zeros(1, 3)
    p_ref = reference.softmax(-1)
    assert (p_ref * (p_ref.log() - policy.log_softmax(-1))).sum().isnan()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_padded_vocabulary_rows_change_nothing(dtype: torch.dtype, backend: BackendName):
    """Three rows of the head at minus infinity on both sides: the statistics are those without the rows."""
    problem = head_problem(bias=True, dtype=dtype)

    def padded(hidden: Hidden, trainable: bool) -> Hidden:
        weight = torch.cat([hidden.head.weight.detach(), torch.ones(3, 5, dtype=dtype)]).requires_grad_(trainable)
        assert hidden.head.bias is not None
        bias = torch.cat([hidden.head.bias.detach(), torch.full((3,), -torch.inf, dtype=dtype)])
        return Hidden(hidden.states, Head(weight, bias.requires_grad_(trainable)))

    wide = HeadProblem(padded(problem.policy, True), padded(problem.reference, False), problem.labels)
    ours, without = stats_of(wide, backend, 1), stats_of(problem, backend, 1)
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(ours.logp, without.logp, **tolerance)
    torch.testing.assert_close(ours.kl, without.kl, **tolerance)
    got, expected = gradients_of(wide, backend, 1), gradients_of(problem, backend, 1)
    assert all(gradient.isfinite().all() for gradient in got)
    tolerance = tolerance if dtype != torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(got[0], expected[0], **tolerance)
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a[:11], b, **tolerance)
        assert (a[11:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_terms_of_the_divergence_keep_their_promises_at_the_edges(dtype: torch.dtype):
    """Words neither side gives: 0. Words only the policy gives: p. Words only the reference gives: infinity."""
    policy = torch.tensor([0.25, 0.25, 0.0, 0.5, 0.0], dtype=dtype).log()
    reference = torch.tensor([0.25, 0.0, 0.0, 0.5, 0.25], dtype=dtype).log()
    assert kl_terms(policy, reference).tolist() == [0.0, 0.25, 0.0, 0.0, math.inf]
    leaf = policy[:4].clone().requires_grad_()
    kl_terms(leaf, reference[:4]).sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [0.0, 0.25, 0.0, 0.0]  # p - p_ref


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_terms_of_the_divergence_are_never_negative_and_have_no_seam(dtype: torch.dtype):
    """Across the change from series to closed form, values follow p_ref (e^u - 1 - u) in float64."""
    u = torch.cat([torch.linspace(-0.02, 0.02, 4001), torch.linspace(-30, 30, 4001)]).double()
    reference = torch.full_like(u, -31.0)
    policy = reference + u
    ours = kl_terms(policy.to(dtype), reference.to(dtype)).double()
    u = policy.to(dtype).double() - reference.to(dtype).double()
    truth = reference.exp() * (torch.expm1(u) - u)
    assert (ours >= 0).all()
    wide = u.abs() > 1e-4
    tolerance = 1e-10 if dtype == torch.float64 else 5e-3
    assert ((ours - truth).abs() / truth)[wide].max() < tolerance


# --- precision ------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("closeness", [None, 0.02], ids=["far", "near"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more_than_eager_does(dtype: torch.dtype, closeness: float | None, backend: BackendName):
    """Truth: float64 on the rounded inputs. Eager: logits in half precision, log-softmax and autograd in float32."""
    problem = head_problem(tokens=40, vocab=200, width=32, spread=0.7, dtype=dtype, closeness=closeness)
    a, b = (weight.float() for weight in upstream(problem))
    eager = plain_token_stats(
        plain_logits(problem.policy).float(), plain_logits(problem.reference).float(), problem.labels
    )
    eager_gradients = torch.autograd.grad((a * eager[0] + b * eager[2]).sum(), problem.leaves)
    stats = stats_of(problem, backend)
    assert stats.logp.dtype == stats.ref_logp.dtype == stats.kl.dtype == torch.float32
    assert (stats.kl >= 0).all()
    for ours, theirs, truth in zip((stats.logp, stats.ref_logp, stats.kl), eager, true_stats(problem), strict=True):
        assert ((ours - truth).abs() <= (theirs - truth).abs() + 1e-5).all()
        assert (ours - truth).abs().mean() < 0.02 * (theirs - truth).abs().mean()
    rounding = torch.finfo(dtype).eps
    triples = zip(gradients_of(problem, backend), eager_gradients, true_gradients(problem), strict=True)
    for ours, theirs, truth in triples:
        assert ours.dtype == dtype
        assert ((ours - truth).abs() <= (theirs - truth).abs() + rounding * truth.abs() + 1e-5).all()
        assert (ours - truth).abs().mean() <= (theirs - truth).abs().mean()


@every_backend
def test_half_precision_keeps_small_divergences(backend: BackendName):
    """bfloat16 logits would put a divergence of 5e-5 off by more than its value; the statistics do not round them."""
    problem = head_problem(tokens=40, vocab=200, width=32, spread=1.0, closeness=2e-3, dtype=torch.bfloat16)
    truth = true_stats(problem)[2]
    assert 1e-5 < truth.median() < 1e-2
    assert ((stats_of(problem, backend).kl - truth).abs() / truth).max() < 0.01
    rounded = plain_token_stats(
        plain_logits(problem.policy).float(), plain_logits(problem.reference).float(), problem.labels
    )[2]
    assert ((rounded - truth).abs() / truth).max() > 1


@every_backend
def test_mixed_precisions_follow_the_policy(backend: BackendName):
    """A float32 policy against references of other precisions: float32 statistics, of the reference's own numbers."""
    problem = head_problem(tokens=20, vocab=30, width=8, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        mixed = HeadProblem(problem.policy, problem.cast(dtype).reference, problem.labels)
        stats = stats_of(mixed, backend)
        assert stats.logp.dtype == stats.ref_logp.dtype == stats.kl.dtype == torch.float32
        for ours, truth in zip((stats.logp, stats.ref_logp, stats.kl), true_stats(mixed), strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


@every_backend
def test_autocast_leaves_the_statistics_in_float32(backend: BackendName):
    """Under autocast operands are bfloat16, products and statistics are not: equal to casting the operands by hand."""
    problem = head_problem(tokens=20, vocab=30, width=16, bias=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = stats_of(problem, backend)
        loss = (stats.logp + stats.kl).sum()
    assert stats.logp.dtype == stats.ref_logp.dtype == stats.kl.dtype == torch.float32

    def rounded(hidden: Hidden) -> Hidden:
        return Hidden(hidden.states.bfloat16(), replace(hidden.head, weight=hidden.head.weight.bfloat16()))

    by_hand = ops.response_stats(rounded(problem.policy), rounded(problem.reference), problem.labels, backend)
    torch.testing.assert_close(stats.logp, by_hand.logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.kl, by_hand.kl, rtol=1e-6, atol=1e-6)
    for ours, truth in zip((stats.logp, stats.ref_logp, stats.kl), true_stats(problem), strict=True):
        assert largest_error(ours.detach(), truth.detach()) < 0.02
    got = torch.autograd.grad(loss, problem.leaves)
    exact = problem.cast(torch.float64)
    true_loss = plain_token_stats(plain_logits(exact.policy), plain_logits(exact.reference), problem.labels)
    expected = torch.autograd.grad((true_loss[0] + true_loss[2]).sum(), exact.leaves)
    for ours, truth in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        assert largest_error(ours, truth) < 0.03


@every_backend
def test_autocast_leaves_float64_alone(backend: BackendName):
    problem = head_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = stats_of(problem, backend)
    assert torch.equal(stats.kl, stats_of(problem, backend).kl) and stats.kl.dtype == torch.float64


# --- log-probabilities alone ----------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("budget", [None, 1], ids=["one_chunk", "row_by_row"])
def test_log_probabilities_alone_are_those_of_the_statistics(shape: dict[str, Any], budget: int | None):
    problem = head_problem(**shape)
    a, _ = upstream(problem)
    ours, theirs = ops.response_logp(problem.policy, problem.labels, budget), true_stats(problem)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    exact = stats_of(problem).logp
    got, expected = (torch.autograd.grad((a * logp).sum(), problem.leaves) for logp in (ours, exact))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_log_probabilities_alone_are_float32_for_half_precision_and_under_autocast():
    half = head_problem(tokens=20, vocab=30, width=8, bias=True, dtype=torch.bfloat16)
    logp = ops.response_logp(half.policy, half.labels)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), true_stats(half)[0], rtol=0, atol=1e-5)
    single = head_problem(tokens=20, vocab=30, width=8, bias=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, stats = ops.response_logp(single.policy, single.labels), stats_of(single)
        loss, expected = logp.sum(), stats.logp.sum()
    torch.testing.assert_close(logp, stats.logp, rtol=1e-6, atol=1e-6)
    pairs = zip(torch.autograd.grad(loss, single.leaves), torch.autograd.grad(expected, single.leaves), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_log_probabilities_alone_need_the_memory_of_a_chunk():
    tokens, vocab, rows = 256, 512, 16
    problem = head_problem(tokens=tokens, vocab=vocab, width=4, dtype=torch.float32)
    with Allocations() as allocations:
        budget = budget_for(rows, vocab, torch.float32, LOGP_BUFFERS)
        ops.response_logp(problem.policy, problem.labels, budget).sum().backward()
    assert allocations.largest == rows * vocab
    assert allocations.peak <= budget + 4 * (3 * vocab * 4 + 2 * tokens * 8)


# --- memory ---------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records the largest tensor any operation returns, and the peak of bytes in tensors made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {
            argument.untyped_storage().data_ptr()
            for argument in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(argument, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, known)
        return result

    def _note(self, tensor: Tensor, known: set[int]) -> None:
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer not in self._holders:
            if pointer in known:  # a view of, or in place on, something made before
                return
            self._holders[pointer] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[pointer] += 1
        weakref.finalize(tensor, self._release, pointer, size)

    def _release(self, pointer: int, size: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            del self._holders[pointer]
            self.live -= size


def measured(problem: HeadProblem, backend: BackendName, budget: int | None) -> Allocations:
    with Allocations() as allocations:
        gradients_of(problem, backend, budget)
    return allocations


def test_chunked_never_makes_a_tensor_of_tokens_times_vocabulary():
    tokens, vocab, width, rows = 256, 512, 8, 16
    problem = head_problem(tokens=tokens, vocab=vocab, width=width, bias=True, soft_cap=5.0, dtype=torch.float32)
    budget = budget_for(rows, vocab, torch.float32)
    assert measured(problem, "naive", None).largest == tokens * vocab  # the meter works
    assert measured(problem, "chunked", 3 * budget // 2).largest == rows * vocab


@pytest.mark.parametrize("shape", [{}, {"bias": True, "scale": 0.5, "soft_cap": 5.0}], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_chunked_keeps_its_budget(dtype: torch.dtype, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Peak memory: the budget, a few rows of scratch space, a gradient of the head and the per-token statistics."""
    tokens, vocab, width, rows = 512, 2048, 4, 32
    monkeypatch.setitem(rows_module.ELEMENTS_AT_A_TIME, "cpu", 2 * vocab)
    problem = head_problem(tokens=tokens, vocab=vocab, width=width, dtype=dtype, **shape)
    budget = budget_for(rows, vocab, dtype, 3 if shape else 2)
    rest = rows_module.SCRATCH * 2 * vocab * dtype.itemsize
    rest += dtype.itemsize * (vocab * (width + 1) + 2 * tokens * (width + 5))
    whole = tokens * vocab * dtype.itemsize
    assert measured(problem, "naive", None).peak > 4 * whole  # the meter works
    assert budget + rest < whole
    assert measured(problem, "chunked", budget).peak <= budget + rest


def test_a_budget_below_one_row_still_runs_a_row_at_a_time():
    small, capped = Head(torch.zeros(1000, 1)), Head(torch.zeros(1000, 1), soft_cap=30.0)
    budget = budget_for(6, 1000, torch.float32)
    assert chunk_rows(small, torch.float32, 1) == 1
    assert chunk_rows(small, torch.float32, budget) == 6 and chunk_rows(capped, torch.float32, budget) == 4
    assert default_logits_budget(torch.device("cpu")) == 256 * 2**20
    assert default_logits_budget(torch.device("xpu")) == 512 * 2**20


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "budget"),
    [(60, 20, 15, 2048), (7, 2, 1, 1024), (5, 1, 1, 512), (0.1, 0, 0, 64), (0.1, 4, 0.5, 256)],
)
def test_the_budget_of_a_gpu_is_an_eighth_of_what_is_free(
    free: float, reserved: float, allocated: float, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gibibyte = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * gibibyte), 80 * gibibyte))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(reserved * gibibyte))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: int(allocated * gibibyte))
    assert default_logits_budget(torch.device("cuda")) == budget * 2**20


# --- refusals -------------------------------------------------------------------------------------------------------


def bare(**changes: Tensor | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "ref_hidden": torch.zeros(3, 4),
        "ref_weight": torch.zeros(5, 4),
        "labels": torch.zeros(3, dtype=torch.long),
    }
    return arguments | changes


@every_backend
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": torch.zeros(5, 3)}, ["policy", "[3, 4]", "[5, 3]"]),
        ({"ref_weight": torch.zeros(5, 3)}, ["reference", "[3, 4]", "[5, 3]"]),
        ({"hidden": torch.zeros(1, 3, 4)}, ["policy", "[1, 3, 4]", "[N, D]"]),
        ({"weight": torch.zeros(4)}, ["policy", "[4]", "[V, D]"]),
        ({"ref_weight": torch.zeros(6, 4)}, ["vocabulary", "5", "6"]),
        ({"labels": torch.zeros(2, dtype=torch.long)}, ["labels", "[2]", "[3, 4]"]),
        ({"labels": torch.zeros(3, 1, dtype=torch.long)}, ["labels", "[3, 1]"]),
        ({"ref_hidden": torch.zeros(2, 4)}, ["reference", "[2, 4]", "[3]"]),
        ({"bias": torch.zeros(4)}, ["policy", "bias", "[4]", "[5, 4]"]),
        ({"ref_bias": torch.zeros(1)}, ["reference", "bias", "[1]"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_shapes_that_disagree_are_named(changes: dict[str, Tensor], words: list[str], backend: BackendName):
    with pytest.raises(ValueError) as caught:
        ops.token_stats(**bare(**changes), backend=backend)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_backend_is_named_with_those_there_are():
    with pytest.raises(UserError, match="unknown backend 'fast'; there are: auto, naive, chunked, triton"):
        ops.token_stats(**bare(), backend="fast")  # type: ignore[arg-type]
