"""The summed loss of whole pairs in one pass: statistics, objective and gradient while a group's logits are at hand.

A pair's loss depends on sums over its tokens, so the gradient of a token in its logits is known up to two scalars
until both responses are through. Groups therefore hold whole pairs: two matrix products give the logits of policy and
reference, the objective's gradient gives the scalars, the gradient is written over the logits, and one or two more
products carry it to hidden states and head. That is 3 products with a frozen head and 4 with a trained one, as many
as plain autograd takes, with the memory of one group. A pair too large for a group is gone through twice.

Shapes: N response tokens, n rows of one block, P pairs, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdpo.objectives.base import Objective
from tdpo.ops import rows as torch_rows
from tdpo.ops.heads import HeadGradient, block_logits, cap_slope, detached, raw_gradient_, widened
from tdpo.ops.numerics import statistics_dtype
from tdpo.ops.rows import RowKernels, RowStats
from tdpo.types import Head, Hidden, PairLoss, PairStats, TokenStats

GROUP_BUFFERS = 3
"""Logits of a group alive at once: the policy's, the reference's, and what a matrix product needs beside them."""


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
    """
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

    def groups(self, dtype: torch.dtype) -> Iterator[_Group]:
        """Consecutive pairs whose logits fit the budget together; one that does not fit alone is a group of its own."""
        rows = max(1, self.budget // (self.reference.head.vocab_size * dtype.itemsize * GROUP_BUFFERS))
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

    def chunks(self) -> list[slice]:
        """The group's tokens in blocks of logits that fit: one block, unless a single pair is too large."""
        return [slice(s, min(s + self.rows, self.stop)) for s in range(self.start, self.stop, self.rows)]

    def sides(self) -> Iterator[tuple[slice, bool]]:
        """Each response's tokens, and whether it is a chosen one."""
        start = self.start
        for chosen, rejected in self.pairs:
            yield slice(start, start + chosen), True
            yield slice(start + chosen, start + chosen + rejected), False
            start += chosen + rejected

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
        heads = widened(Head(weight_VD, bias_V, plan.scale, plan.soft_cap)), widened(plan.reference.head)
        gradient = HeadGradient(states_ND, weight_VD, bias_V, needs)
        tokens, pairs = [], []
        for group in plan.groups(wide):
            blocks = _Blocks(group, states_ND, plan, *heads)
            stats = blocks.statistics()
            weights, sums, outcome = _objective_gradient(group, stats, plan)
            tokens.append(torch.stack((stats.logp, stats.ref_logp, stats.kl)))
            pairs.append(torch.stack((outcome.loss, outcome.chosen_reward, outcome.rejected_reward, *sums)))
            if any(needs):
                for rows, direction in blocks.directions(stats, *weights):
                    gradient.add(rows, direction, heads[0])
            blocks.release()
        token_columns, pair_columns = torch.cat(tokens, 1), torch.cat(pairs, 1)
        ctx.gradient = gradient
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
        return (*gradient.scaled(grad_total), None)


class _Blocks:
    """The logits of a group: kept where they fit, computed twice where a single pair exceeds the budget."""

    def __init__(self, group: _Group, states_ND: Tensor, plan: _Plan, head: Head, ref_head: Head) -> None:
        self.group, self.states, self.plan, self.head, self.ref_head = group, states_ND, plan, head, ref_head
        self.kept: tuple[Tensor, Tensor] | None = None

    def statistics(self) -> RowStats:
        """Statistics of the group's tokens."""
        chunks, parts = self.group.chunks(), []
        for rows in chunks:
            logits = self._logits(rows)
            parts.append(self.plan.kernels.row_stats(*logits, self.plan.labels_N[rows], self.plan.with_kl))
            if len(chunks) == 1:
                self.kept = logits
        return RowStats.joined(parts)

    def directions(self, stats: RowStats, a_n: Tensor, b_n: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Block by block, the gradient of the group's loss in its logits; a and b weigh logp and KL of each token."""
        for rows in self.group.chunks():
            logits, ref_logits = self.kept or self._logits(rows)
            slope = cap_slope(logits, self.head)
            for side, chosen in self.group.sides():
                part = slice(max(side.start, rows.start), min(side.stop, rows.stop))
                if part.start >= part.stop:
                    continue
                block = slice(part.start - rows.start, part.stop - rows.start)
                local = slice(part.start - self.group.start, part.stop - self.group.start)
                objective = self.plan.objective
                ratio = objective.chosen_kl_ratio if chosen else objective.rejected_kl_ratio
                self.plan.kernels.direction_(
                    logits[block], ref_logits[block] if ratio else None, self.plan.labels_N[part], stats.at(local),
                    a_n[local], b_n[local],
                )  # fmt: skip
            yield rows, raw_gradient_(logits, slope, self.head)

    def release(self) -> None:
        """Lets go of the logits before the next group's are made."""
        self.kept = None

    def _logits(self, rows: slice) -> tuple[Tensor, Tensor]:
        logits = block_logits(self.states[rows], self.head)
        return logits, block_logits(self.plan.reference.states[rows], self.ref_head).to(logits.dtype)


def _objective_gradient(group: _Group, stats: RowStats, plan: _Plan) -> tuple[tuple[Tensor, Tensor], Tensor, PairLoss]:
    """The objective on the group's pairs: token weights of logp and KL, sums ``[4, P]``, and what it says."""
    ids = group.sequence_ids(stats.logp.device)
    per_token = torch.stack((stats.logp - stats.ref_logp, stats.kl))
    summed = torch.zeros(2, 2 * len(group.pairs), dtype=per_token.dtype, device=per_token.device)
    ratio, kl = summed.index_add_(1, ids, per_token).view(2, -1, 2).unbind()
    with torch.enable_grad():
        sums = torch.stack((ratio[:, 0], ratio[:, 1], kl[:, 0], kl[:, 1])).requires_grad_()
        outcome = plan.objective(PairStats(*sums.unbind()))
        (grad,) = torch.autograd.grad(outcome.loss.sum(), sums)
    by_sequence = grad.view(2, 2, -1).transpose(1, 2).reshape(2, -1)
    a, b = by_sequence[:, ids].unbind()
    detached_outcome = PairLoss(outcome.loss.detach(), outcome.chosen_reward, outcome.rejected_reward)
    return (a, b), sums.detach(), detached_outcome
