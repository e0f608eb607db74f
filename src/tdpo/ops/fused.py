"""The summed loss of pairs in one pass: statistics, objective and gradient while a group's logits are in memory.

Per token, the gradient of the loss in the logits is a scalar times a direction that is known before the sums are:

    d loss / d logits = factor_t * ((1 - c) p + c p_ref - onehot(y_t)),    factor_t = -d loss / d logratio

where c, the ratio of the gradients in KL and log-ratio, is a constant of the objective's side. So a group of whole
pairs takes two products for the logits of policy and reference, one pass for statistics and direction, the objective
on ``[P]`` sums for the factors, and one product each for the gradients in hidden states and head. That is 3 products
with a frozen head and 4 with a trained one, as many as plain autograd takes, with the memory of one group.

A pair too large for a group is taken in blocks. With a frozen head each row of the states' gradient is scaled later. A
trained head's gradient is a sum over rows, so the factors must be known first, and the logits are computed twice (the
reference's only where c is not 0).

The direction here is the negative of the one in docs/algorithm.md.

Shapes: N response tokens, n tokens of one group, P pairs, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tdpo.objectives.base import Objective
from tdpo.ops.heads import BlockwiseHeads
from tdpo.ops.numerics import sum_pairs
from tdpo.types import Hidden, PairLoss, PairStats, TokenStats


def pair_loss(
    policy: Hidden,
    reference: Hidden,
    labels_N: Tensor,
    lengths: Sequence[int],
    objective: Objective,
    logits_budget: int | None,
    kernels: ModuleType,
) -> tuple[Tensor, PairLoss, PairStats, TokenStats]:
    """Computes what :func:`tdpo.ops.naive.pair_loss` does in one pass over the logits; differentiable once.

    Args:
        policy: States ``[N, D]`` and head; differentiable.
        reference: The same of the reference; constant.
        labels_N: Response tokens, int64; those of a pair are contiguous, chosen before rejected.
        lengths: 2P token counts, chosen and rejected of each pair in turn.
        objective: The objective whose loss is summed.
        logits_budget: Bytes the logits of a group may take; None for the device's default.
        kernels: The row operations: :mod:`tdpo.ops.rows` or :mod:`tdpo.ops.triton_kernels`.
    """
    check_ratios(objective)
    head = policy.head
    options = head, reference, labels_N, lengths, objective, logits_budget, kernels, torch.is_grad_enabled()
    total, pairs_7P, tokens_3N = _PairLoss.apply(policy.states, head.weight, head.bias, *options)
    return total, PairLoss(*pairs_7P[:3]), PairStats(*pairs_7P[3:]), TokenStats(*tokens_3N)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *options: Any) -> Any:
        """Computes loss, statistics and the gradient of the loss, group by group."""
        head, reference, labels_N, lengths, objective, logits_budget, kernels, with_gradient = options
        policy = Hidden(states_ND, replace(head, weight=weight_VD, bias=bias_V))
        needs = ctx.needs_input_grad[:3] if with_gradient else (False, False, False)
        heads = BlockwiseHeads(policy, reference, logits_budget, needs)
        groups = [
            _group_loss(heads, labels_N, group, blocks, objective, kernels)
            for group, blocks in _groups(lengths, heads.block_rows)
        ]
        tokens_3N, pairs_7P = (torch.cat(parts, 1) for parts in zip(*groups, strict=True))
        sources = states_ND, weight_VD, bias_V
        ctx.gradients = heads.gradients()
        ctx.dtypes = [None if source is None else source.dtype for source in sources]
        ctx.mark_non_differentiable(pairs_7P, tokens_3N)
        return pairs_7P[0].sum(), pairs_7P, tokens_3N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> Any:
        """Scales the gradient that the forward computed."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the fused loss can be differentiated once; call it again for a second backward pass")
        # On a CPU the comparison costs nothing, and spares a pass over the head's gradient.
        if not (grad_total.device.type == "cpu" and grad_total == 1):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_total)
        cast = [None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return *cast, *[None] * 8  # for the options


def _group_loss(
    heads: BlockwiseHeads,
    labels_N: Tensor,
    lengths: Sequence[int],
    blocks: list[slice],
    objective: Objective,
    kernels: ModuleType,
) -> tuple[Tensor, Tensor]:
    """Computes a group's token statistics ``[3, n]``, and loss, rewards and sums of its pairs ``[7, P]``.

    Gradients are added up in ``heads``.
    """
    start, device = blocks[0].start, labels_N.device
    counts = torch.tensor(lengths, device=device)
    ids_n = torch.repeat_interleave(counts, output_size=sum(lengths))  # chosen 2p, rejected 2p + 1
    sides = objective.chosen_kl_ratio, objective.rejected_kl_ratio
    c_n = torch.tensor(sides, dtype=heads.wide, device=device)[ids_n % 2]
    one_pass = heads.trains and (len(blocks) == 1 or not heads.trains_head)
    parts = []
    for rows in blocks:
        # over the policy's logits, if there is a gradient: (1 - c) p + c p_ref - onehot(y)
        c = c_n[rows.start - start : rows.stop - start] if one_pass else None
        parts.append(kernels.row_stats_(heads.logits(rows), heads.ref_logits(rows), labels_N[rows], c))
        if one_pass and len(blocks) > 1:
            heads.carry_back(rows)
    stats_5n = torch.cat(parts, 1)
    factor_n, pairs_7P = _objective_gradient(TokenStats(*stats_5n[:3]), ids_n, len(lengths) // 2, objective)
    if one_pass and len(blocks) == 1:
        heads.carry_back(blocks[0], factor_n)
    elif one_pass and heads.grad_states is not None:
        heads.grad_states[start : start + len(ids_n)].mul_(factor_n[:, None])
    elif heads.trains:
        for rows in blocks:  # of the only pair, which was too large, again
            local = slice(rows.start - start, rows.stop - start)
            weighs_kl = sides[rows.start - start >= lengths[0]] != 0
            logits, ref_logits = heads.logits(rows), heads.ref_logits(rows) if weighs_kl else None
            minus_one = -torch.ones_like(factor_n[local])
            kernels.direction_(logits, ref_logits, labels_N[rows], stats_5n[:, local], minus_one, -c_n[local])
            heads.carry_back(rows, factor_n[local])
    return stats_5n[:3], pairs_7P


def _groups(lengths: Sequence[int], limit: int) -> Iterator[tuple[Sequence[int], list[slice]]]:
    """Yields the lengths of consecutive pairs that fit ``limit`` rows of logits, and their rows as one block.

    A pair that does not fit is a group of its own, in blocks that each hold tokens of one response.
    """
    start = first = 0
    for last in range(2, len(lengths) + 1, 2):
        size = sum(lengths[first:last])
        if last < len(lengths) and size + sum(lengths[last : last + 2]) <= limit:
            continue
        blocks = [slice(start, start + size)]
        if size > limit:
            middle = start + lengths[first]
            sides = (start, middle), (middle, start + size)
            blocks = [slice(row, min(row + limit, end)) for begin, end in sides for row in range(begin, end, limit)]
        yield lengths[first:last], blocks
        start, first = start + size, last


def _objective_gradient(tokens: TokenStats, ids_n: Tensor, pairs: int, objective: Objective) -> tuple[Tensor, Tensor]:
    """Returns each token's factor on its direction, and loss, rewards and sums of the pairs ``[7, P]``."""
    with torch.enable_grad():
        sums_4P = sum_pairs(tokens, ids_n, pairs).requires_grad_()
        outcome = objective(PairStats(*sums_4P))
        (grad_4P,) = torch.autograd.grad(outcome.loss.sum(), sums_4P)
    factor_n = -grad_4P[:2].t().reshape(-1)[ids_n]  # minus, as the direction is the gradient of -(logp + c kl)
    columns = outcome.loss.detach(), outcome.chosen_reward, outcome.rejected_reward, *sums_4P.detach()
    return factor_n, torch.stack(columns)


@lru_cache(maxsize=64)
def check_ratios(objective: Objective) -> None:
    """Compares an objective's declared KL ratios with its own derivatives, once per objective.

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
