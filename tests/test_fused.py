"""The fused loss equals the specification followed by the objective, values and gradients, whatever the budget."""

from __future__ import annotations

import pytest
import torch
from numeric_worlds import BACKENDS, OBJECTIVE_PARAMETERS, HeadProblem, budget_for, head_problem
from torch.utils._python_dispatch import TorchDispatchMode

from tdpo import objectives, ops
from tdpo.ops.heads import padded_vocab
from tdpo.types import PairStats

LENGTHS = [3, 5, 4, 4, 9, 1, 2, 2]
TOKENS = sum(LENGTHS)
BUDGET_ROWS = {"token by token": 0, "a pair at a time": 8, "two pairs": 16, "all at once": 1000}
every_budget = pytest.mark.parametrize("rows", BUDGET_ROWS.values(), ids=BUDGET_ROWS.keys())
every_objective = pytest.mark.parametrize(("name", "parameters"), OBJECTIVE_PARAMETERS)


def budget(rows: int, problem: HeadProblem) -> int:
    head = problem.policy.head
    return budget_for(rows, head.vocab_size, problem.policy.states.dtype, 2 if head.soft_cap is None else 3)


def specified(problem: HeadProblem, objective: objectives.Objective) -> tuple[torch.Tensor, PairStats, ops.TokenStats]:
    """Computes the objective's loss and the naive statistics it is made of, summed by hand."""
    tokens = ops.response_stats(problem.policy, problem.reference, problem.labels, "naive")

    def sums(values: torch.Tensor) -> list[torch.Tensor]:
        return [part.sum() for part in values.split(LENGTHS)]

    ratio, kl = sums(tokens.logp - tokens.ref_logp), sums(tokens.kl)
    stats = PairStats(*(torch.stack(part) for part in (ratio[::2], ratio[1::2], kl[::2], kl[1::2])))
    return objective(stats).loss, stats, tokens


@every_budget
@every_objective
@pytest.mark.parametrize(
    "extras", [{}, {"bias": True, "scale": 0.7, "soft_cap": 3.0}, {"ref_width": 5}], ids=["plain", "finished", "width"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_the_specifications(backend, dtype, extras, name, parameters, rows) -> None:
    problem = head_problem(tokens=TOKENS, **extras).cast(dtype)
    objective = objectives.build(name, **parameters)
    loss, stats, tokens = specified(problem, objective)
    total, outcome, sums, fused_tokens = ops.pair_loss(
        problem.policy, problem.reference, problem.labels, LENGTHS, objective, budget(rows, problem), backend
    )
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(outcome.loss, loss, rtol=rtol, atol=rtol)
    torch.testing.assert_close(total, loss.sum(), rtol=rtol, atol=rtol)
    for column in ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"):
        torch.testing.assert_close(getattr(sums, column), getattr(stats, column), rtol=rtol, atol=rtol)
    for column in ("logp", "ref_logp", "kl"):
        torch.testing.assert_close(getattr(fused_tokens, column), getattr(tokens, column), rtol=rtol, atol=rtol)
    ours = torch.autograd.grad(1.7 * total, problem.leaves)
    theirs = torch.autograd.grad(1.7 * loss.sum(), problem.leaves)
    for our, their in zip(ours, theirs, strict=True):
        assert ((our - their).abs().max() / their.abs().max()) < 10 * rtol


class Products(TorchDispatchMode):
    """Counts matrix products with the vocabulary, and remembers the largest tensor made."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.count, self.largest = vocab, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = str(function)
        if name.startswith(("aten.mm", "aten.addmm")) and any(
            self.vocab in tensor.shape for tensor in args if isinstance(tensor, torch.Tensor)
        ):
            self.count += 1
        if isinstance(output, torch.Tensor):
            self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize(
    ("trained", "products"),
    [((True, True), 4), ((True, False), 3), ((False, True), 3), ((False, False), 2)],
    ids=["head trained", "head frozen", "states frozen", "nothing trained"],
)
def test_one_group_takes_the_fewest_products(trained: tuple[bool, bool], products: int) -> None:
    problem = head_problem(tokens=TOKENS).cast(torch.float32)
    for leaf, wanted in zip(problem.leaves[:2], trained, strict=True):
        leaf.requires_grad_(wanted)
    with Products(problem.policy.head.vocab_size) as counted:
        total = ops.pair_loss(problem.policy, problem.reference, problem.labels, LENGTHS, objectives.tdpo2())[0]
        if any(trained):
            total.backward()
    assert counted.count == products


@pytest.mark.parametrize(
    ("name", "head_trained", "products_per_block"),
    [("tdpo2", True, 5.5), ("dpo", True, 5.0), ("tdpo1", True, 6.0), ("tdpo2", False, 3.0), ("tdpo1", False, 3.0)],
)
def test_a_pair_over_budget_is_gone_through_twice_only_for_a_trained_head(
    name: str, head_trained: bool, products_per_block: float
) -> None:
    """In the second pass the reference's logits are made again only for sides whose KL is weighed."""
    problem = head_problem(tokens=18).cast(torch.float32)
    problem.policy.head.weight.requires_grad_(head_trained)
    with Products(problem.policy.head.vocab_size) as counted:
        arguments = problem.policy, problem.reference, problem.labels, [9, 9], objectives.build(name)
        ops.pair_loss(*arguments, budget(3, problem))[0].backward()
    assert counted.count == products_per_block * 6


def test_without_grad_mode_only_the_logits_are_made() -> None:
    problem = head_problem(tokens=TOKENS).cast(torch.float32)
    with torch.no_grad(), Products(problem.policy.head.vocab_size) as counted:
        ops.pair_loss(problem.policy, problem.reference, problem.labels, LENGTHS, objectives.tdpo2())
    assert counted.count == 2


def test_memory_is_that_of_a_group_not_of_all_tokens() -> None:
    """The largest tensor is a group's logits; the head's gradient is smaller."""
    problem = head_problem(tokens=TOKENS, vocab=3000).cast(torch.float32)
    group = 10 * padded_vocab(3000, torch.float32)
    assert problem.policy.head.weight.numel() < group < TOKENS * 3000
    largest = {}
    for backend in BACKENDS:
        with Products(3000) as counted:
            ops.pair_loss(
                problem.policy, problem.reference, problem.labels, LENGTHS, objectives.tdpo2(), budget(10, problem),
                backend,
            )[0].backward()  # fmt: skip
        largest[backend] = counted.largest
    assert largest == {"naive": TOKENS * 3000, "chunked": group}


def test_only_the_total_is_differentiable_and_only_once() -> None:
    problem = head_problem(tokens=TOKENS).cast(torch.float32)
    for backend in BACKENDS:
        total, outcome, stats, tokens = ops.pair_loss(
            problem.policy, problem.reference, problem.labels, LENGTHS, objectives.tdpo1(), None, backend
        )
        parts = (outcome.loss, outcome.chosen_reward, stats.chosen_kl, tokens.logp, tokens.ref_logp, tokens.kl)
        assert total.requires_grad and not any(part.requires_grad for part in parts), backend
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        total.backward()


def test_lengths_that_do_not_add_up_are_refused() -> None:
    problem = head_problem(tokens=TOKENS).cast(torch.float64)
    for lengths in (LENGTHS[:-1], [*LENGTHS[:-1], 3]):
        with pytest.raises(ValueError, match="are not 2P counts"):
            ops.pair_loss(problem.policy, problem.reference, problem.labels, lengths, objectives.dpo())


def test_half_precision_is_no_worse_than_eager() -> None:
    """Against float64 truth on the rounded inputs, the gradients err no more than eager bfloat16's."""
    objective = objectives.tdpo1(0.3)
    rounded = head_problem(tokens=TOKENS).cast(torch.bfloat16)
    truth = rounded.cast(torch.float64)
    eager = rounded.cast(torch.bfloat16)
    loss, _, _ = specified(truth, objective)
    true_gradients = torch.autograd.grad(loss.sum(), truth.leaves)
    total = ops.pair_loss(rounded.policy, rounded.reference, rounded.labels, LENGTHS, objective)[0]
    ours = torch.autograd.grad(total, rounded.leaves)
    eager_logits = eager.policy.states @ eager.policy.head.weight.t()
    logp = eager_logits.log_softmax(-1)
    ref_logp = (eager.reference.states @ eager.reference.head.weight.t()).log_softmax(-1)
    kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1)
    picked = [x.gather(1, eager.labels[:, None])[:, 0] for x in (logp, ref_logp)]
    ratio = [part.sum() for part in (picked[0] - picked[1]).split(LENGTHS)]
    sums = [part.sum() for part in kl.split(LENGTHS)]
    stats = PairStats(*(torch.stack(part) for part in (ratio[::2], ratio[1::2], sums[::2], sums[1::2])))
    eager_gradients = torch.autograd.grad(objective(stats).loss.sum(), eager.leaves)
    for our, theirs, true in zip(ours, eager_gradients, true_gradients, strict=True):
        error, eager_error = (our.double() - true).abs(), (theirs.double() - true).abs()
        assert error.max() <= eager_error.max() + 1e-6
        assert error.mean() <= eager_error.mean() + 1e-7
