"""The summed loss of whole pairs in one pass: statistics, objective and gradient while a group's logits are at hand.

A pair's loss depends on sums over its tokens, yet the gradient of a token in its logits is known before them, up to one
scalar a response: its direction follows from the objective's two KL ratios alone. Groups hold whole pairs. Two matrix
products give the logits of policy and reference, statistics and direction are taken in the same passes over them, the
objective's gradient gives the scalars, and one or two more products carry the direction to hidden states and head,
where the scalars come in. That is 3 products with a frozen head and 4 with a trained one, as many as plain autograd
takes, with the memory of one group. A pair too large for a group is taken in pieces; only a trained head makes that a
second pass, since its gradient adds up rows whose scalars must be known.

Shapes: N response tokens, n rows of one block, P pairs, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from tdpo.objectives.base import Objective
from tdpo.ops import rows as torch_rows
from tdpo.ops.heads import (
    HeadGradient,
    buffers_of,
    cap_slope,
    chunk_rows,
    detached,
    prepared,
    raw_gradient_,
    write_logits,
)
from tdpo.ops.numerics import statistics_dtype
from tdpo.ops.rows import RowKernels, RowStats
from tdpo.ops.workspace import logits_buffers
from tdpo.types import Head, Hidden, PairLoss, PairStats, TokenStats


class WeightGradient(Protocol):
    """Somebody who adds to the gradient of the head's weight before autograd gets it."""

    def leave(self, gradient_VD: Tensor) -> Tensor | None:
        """Takes the gradient, or gives it back for autograd."""


@dataclass(frozen=True)
class FusedLoss:
    """What one pass gives.

    Attributes:
        total: Sum of the pairs' losses, a scalar; differentiable in states, weight and bias of the policy.
        outcome: Losses and rewards, ``[P]``, without gradient.
        stats: Sums over response tokens, ``[P]``, without gradient.
        tokens: Token statistics ``[N]``, without gradient.
    """

    total: Tensor
    outcome: PairLoss
    stats: PairStats
    tokens: TokenStats


def pair_loss(
    policy: Hidden,
    reference: Hidden,
    labels_N: Tensor,
    lengths: Sequence[int],
    objective: Objective,
    logits_budget: int,
    with_kl: bool = True,
    kernels: RowKernels = torch_rows,
    tied: WeightGradient | None = None,
) -> FusedLoss:
    """Summed loss of P pairs whose tokens are contiguous, chosen before rejected.

    Args:
        policy: States ``[N, D]`` and head; differentiable.
        reference: The same of the reference; constant.
        labels_N: ``[N]`` int64, the response tokens.
        lengths: 2P token counts, chosen and rejected of each pair in turn; they add up to N.
        objective: Its loss is summed.
        logits_budget: Bytes the logits of a group may take.
        with_kl: Whether to compute the KL at all; without it the statistics say 0. Only for objectives whose two KL
            ratios are 0.
        kernels: What is done to a block's rows.
        tied: Takes the gradient of the head's weight in the backward, in place of autograd.
    """
    check_ratios(objective)
    plan = _Plan(
        scale=policy.head.scale,
        soft_cap=policy.head.soft_cap,
        reference=Hidden(reference.states.detach(), detached(reference.head)),
        labels_N=labels_N,
        lengths=lengths,
        objective=objective,
        budget=logits_budget,
        with_kl=with_kl,
        kernels=kernels,
        with_gradient=torch.is_grad_enabled(),
        tied=tied,
    )
    total, *rest = _PairLoss.apply(policy.states, policy.head.weight, policy.head.bias, plan)
    return FusedLoss(total, PairLoss(*rest[:3]), PairStats(*rest[3:7]), TokenStats(*rest[7:]))


@dataclass(frozen=True)
class _Plan:
    """What the op needs beside the three tensors it differentiates."""

    scale: float
    soft_cap: float | None
    reference: Hidden
    labels_N: Tensor
    lengths: Sequence[int]
    objective: Objective
    budget: int
    with_kl: bool
    kernels: RowKernels
    with_gradient: bool
    tied: WeightGradient | None

    def groups(self, rows: int) -> Iterator[_Group]:
        """Consecutive pairs whose tokens fit ``rows`` together; one that does not fit alone is a group of its own."""
        pairs: list[tuple[int, int]] = []
        start = size = 0
        for chosen, rejected in zip(self.lengths[::2], self.lengths[1::2], strict=True):
            if pairs and size + chosen + rejected > rows:
                yield _Group(start, pairs, rows)
                start, size, pairs = start + size, 0, []
            pairs.append((chosen, rejected))
            size += chosen + rejected
        if pairs:
            yield _Group(start, pairs, rows)


@dataclass(frozen=True)
class _Group:
    """Some consecutive pairs: where their tokens begin, how long their sides are, and how many rows may be alive."""

    start: int
    pairs: list[tuple[int, int]]
    rows: int

    @property
    def stop(self) -> int:
        return self.start + sum(chosen + rejected for chosen, rejected in self.pairs)

    @property
    def tokens(self) -> slice:
        """The group's tokens among all N."""
        return slice(self.start, self.stop)

    def local(self, rows: slice) -> slice:
        """Rows among all N as rows of the group."""
        return slice(rows.start - self.start, rows.stop - self.start)

    def chunks(self) -> list[tuple[slice, tuple[bool, ...]]]:
        """The group's tokens in blocks of logits that fit, and which sides (True: chosen) each of them holds.

        One block, unless a single pair is too large; then no block crosses from one side to the other.
        """
        if self.stop - self.start <= self.rows:
            return [(self.tokens, (True, False))]
        blocks: list[tuple[slice, tuple[bool, ...]]] = []
        start = self.start
        for length, chosen in zip(self.pairs[0], (True, False), strict=True):
            stop = start + length
            blocks += [(slice(s, min(s + self.rows, stop)), (chosen,)) for s in range(start, stop, self.rows)]
            start = stop
        return blocks

    def sequence_ids(self, device: torch.device) -> Tensor:
        """The response each of the group's tokens belongs to, counted within the group."""
        counts = torch.tensor([length for pair in self.pairs for length in pair], device=device)
        return torch.repeat_interleave(counts, output_size=self.stop - self.start)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: _Plan) -> Any:
        """Everything, the gradient of the sum included; see the module's docstring."""
        wide = statistics_dtype(states_ND.dtype)
        needs = ctx.needs_input_grad[:3] if plan.with_gradient else (False, False, False)
        gradient = HeadGradient(states_ND, weight_VD, bias_V, needs)
        head = prepared(Head(weight_VD, bias_V, plan.scale, plan.soft_cap), wide)
        ref_head = prepared(plan.reference.head, wide)
        tokens, pairs = [], []
        rows = chunk_rows(head, wide, plan.budget)
        alive = min(rows, states_ND.shape[0])
        with logits_buffers(buffers_of(head), alive, head.vocab_size, wide, states_ND.device) as buffers:
            blocks = _Blocks(states_ND, plan, head, ref_head, buffers, gradient)
            for group in plan.groups(rows):
                stats, sums, outcome = blocks.through(group)
                tokens.append(torch.stack((stats.logp, stats.ref_logp, stats.kl)))
                pairs.append(torch.stack((outcome.loss, outcome.chosen_reward, outcome.rejected_reward, *sums)))
        token_columns, pair_columns = torch.cat(tokens, 1), torch.cat(pairs, 1)
        ctx.gradient, ctx.tied = gradient, plan.tied
        results = (pair_columns[0].sum(), *pair_columns.unbind(), *token_columns.unbind())
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> Any:
        """Scales what the forward left."""
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the fused loss can be differentiated once; call it again for a second backward pass")
        states, weight, bias = gradient.scaled(grad_total)
        if weight is not None and ctx.tied is not None:
            weight = ctx.tied.leave(weight)
        return states, weight, bias, None


@dataclass(frozen=True)
class _Blocks:
    """Takes groups through their logits: both heads, the buffers the logits are written to, and where gradients go."""

    states: Tensor
    plan: _Plan
    head: Head
    ref_head: Head
    buffers: list[Tensor]
    gradient: HeadGradient

    def through(self, group: _Group) -> tuple[RowStats, Tensor, PairLoss]:
        """Statistics of the group's tokens, their sums ``[4, P]``, what the objective says; gradients are added."""
        ids = group.sequence_ids(self.states.device)
        objective = self.plan.objective
        ratios = self.states.new_tensor(
            (objective.chosen_kl_ratio, objective.rejected_kl_ratio), dtype=self.gradient.wide
        )
        ratio_n, chunks = ratios[ids % 2], group.chunks()
        at_once = self.gradient.wanted and (len(chunks) == 1 or not self.gradient.of_head)
        parts, grad = [], self.states
        for rows, _ in chunks:
            logits, ref_logits = self._logits(rows), self._ref_logits(rows)
            labels, with_kl = self.plan.labels_N[rows], self.plan.with_kl
            if not at_once:
                parts.append(self.plan.kernels.row_stats(logits, ref_logits, labels, with_kl))
                continue
            slope = cap_slope(logits, self.head, self.buffers[2:])
            ratio = ratio_n[group.local(rows)]
            parts.append(self.plan.kernels.stats_and_direction_(logits, ref_logits, labels, ratio, with_kl))
            grad = raw_gradient_(logits, slope, self.head)
            if len(chunks) > 1:
                self.gradient.add(rows, grad, self.head)
        stats = RowStats.joined(parts)
        factor, sums, outcome = _objective_gradient(group, ids, stats, objective)
        if at_once and len(chunks) == 1:
            self.gradient.add(group.tokens, grad, self.head, factor)
        elif at_once:
            self.gradient.scale_states(group.tokens, factor)
        elif self.gradient.wanted:
            self._second_pass(group, stats, ratio_n, factor)
        return stats, sums, outcome

    def _second_pass(self, group: _Group, stats: RowStats, ratio_n: Tensor, factor_n: Tensor) -> None:
        """The logits of a pair that was too large once more, now that its scalars are known."""
        objective = self.plan.objective
        for rows, sides in group.chunks():
            local = group.local(rows)
            mixed = any(objective.chosen_kl_ratio if chosen else objective.rejected_kl_ratio for chosen in sides)
            logits = self._logits(rows)
            slope = cap_slope(logits, self.head, self.buffers[2:])
            minus_one = -torch.ones_like(factor_n[local])
            self.plan.kernels.direction_(
                logits, self._ref_logits(rows) if mixed else None, self.plan.labels_N[rows], stats.at(local),
                minus_one, -ratio_n[local],
            )  # fmt: skip
            self.gradient.add(rows, raw_gradient_(logits, slope, self.head), self.head, factor_n[local])

    def _logits(self, rows: slice) -> Tensor:
        return write_logits(self.states[rows], self.head, self.buffers[0])

    def _ref_logits(self, rows: slice) -> Tensor:
        return write_logits(self.plan.reference.states[rows], self.ref_head, self.buffers[1])


def _objective_gradient(
    group: _Group, ids: Tensor, stats: RowStats, objective: Objective
) -> tuple[Tensor, Tensor, PairLoss]:
    """The objective on the group's pairs: each token's factor on its direction, sums ``[4, P]``, and what it says."""
    per_token = torch.stack((stats.logp - stats.ref_logp, stats.kl))
    summed = torch.zeros(2, 2 * len(group.pairs), dtype=per_token.dtype, device=per_token.device)
    ratio, kl = summed.index_add_(1, ids, per_token).view(2, -1, 2).unbind()
    with torch.enable_grad():
        sums = torch.stack((ratio[:, 0], ratio[:, 1], kl[:, 0], kl[:, 1])).requires_grad_()
        outcome = objective(PairStats(*sums.unbind()))
        (grad,) = torch.autograd.grad(outcome.loss.sum(), sums)
    # The direction is the gradient of -(logp + c kl), so its factor is minus the loss's gradient in the log-ratio.
    factor = -grad[:2].t().reshape(-1)[ids]
    detached_outcome = PairLoss(outcome.loss.detach(), outcome.chosen_reward, outcome.rejected_reward)
    return factor, sums.detach(), detached_outcome


@lru_cache(maxsize=64)
def check_ratios(objective: Objective) -> None:
    """Holds an objective's declared KL ratios against its own derivatives, once per objective.

    Raises:
        ValueError: naming the side; every gradient of the fused loss would be wrong.
    """
    with torch.enable_grad():
        sums = torch.tensor([[0.3], [-0.2], [0.7], [0.4]], dtype=torch.float64, requires_grad=True)
        loss = objective(PairStats(*sums.unbind())).loss.sum()
        (grad,) = torch.autograd.grad(loss, sums)
    declared = (objective.chosen_kl_ratio, objective.rejected_kl_ratio)
    for side, ratio, of_logratio, of_kl in zip(("chosen", "rejected"), declared, grad[:2], grad[2:], strict=True):
        if abs(float(of_kl) - ratio * float(of_logratio)) > 1e-6 * abs(float(of_logratio)):
            raise ValueError(
                f"objective {objective.name} declares {side}_kl_ratio={ratio:g}, but its gradient in the {side} side's "
                f"sequential KL is {float(of_kl):g} where that in the log-ratio is {float(of_logratio):g}"
            )
