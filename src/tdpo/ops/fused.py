"""Computes the summed loss of pairs and its gradient in one pass over the logits, a group of pairs at a time.

Per token, the gradient of the loss with respect to the logits is a scalar, the factor, times a vector, the direction.
The direction needs only the logits of this token; the factor needs the statistics of the whole pair:

    d loss / d logits = factor_t * ((1 - c) p + c p_ref - onehot(y_t)),    factor_t = -d loss / d logp_t

where c is a constant of the objective for each side, chosen and rejected (:func:`kl_ratios`); with token weights it is
multiplied by the token's KL weight over its log-probability weight. A group of complete pairs takes

1. one matrix product for the policy's logits and one for the reference's, if the objective has a reference;
2. one pass over the rows for token statistics and directions, which replace the policy's logits;
3. the objective on the statistics, whose derivatives are the factors;
4. one product for the gradient of the hidden states and, if the head is trained, one for the head's.

That is 3 products with a frozen head and 4 with a trained one, as many as plain autograd takes, and only the logits of
one group are in memory. A pair too large for a group is computed in blocks of tokens. With a frozen head, the gradients
of the states are computed without factors, and each row is multiplied by its factor once the pair is complete. The
gradient of a trained head is a sum over rows, so the factors must be known first: the logits are computed a second time
(the reference's only where c is not 0), which makes 5 or 6 products.

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
from tdpo.types import Hidden, PairLoss, PairStats, PairTokens, TokenStats


def pair_loss(
    policy: Hidden,
    reference: Hidden | None,
    labels_N: Tensor,
    lengths: Sequence[int],
    objective: Objective,
    ratios: tuple[float, float],
    logits_budget: int | None,
    weights_2N: Tensor | None,
    kernels: ModuleType,
) -> tuple[Tensor, PairLoss, PairStats, TokenStats]:
    """Computes the summed loss and its gradient in one pass over the logits; equals :func:`tdpo.ops.naive.pair_loss`.

    Args:
        policy: States ``[N, D]`` and head; differentiable.
        reference: The reference's states and head, without gradient; None for an objective without a reference.
        labels_N: Response tokens, int64; the tokens of a pair are contiguous, chosen before rejected.
        lengths: 2P token counts: of chosen 0, rejected 0, chosen 1, ...
        objective: The objective whose loss is summed.
        ratios: :func:`kl_ratios` of the objective.
        logits_budget: Largest size of a group's logits, in bytes; None for the device's default.
        weights_2N: Weights of the tokens' log-probabilities and KL; None for 1 everywhere.
        kernels: The row operations: :mod:`tdpo.ops.rows` or :mod:`tdpo.ops.triton_kernels`.

    Returns:
        The sum of the losses, which supports one backward pass and no second derivatives; then, detached, the loss and
        rewards of each pair, the sums over its responses, and the token statistics.
    """
    head = policy.head
    options = head, reference, labels_N, lengths, objective, ratios, logits_budget, weights_2N, kernels
    total, pairs, tokens_3N = _PairLoss.apply(policy.states, head.weight, head.bias, *options, torch.is_grad_enabled())
    # rows of pairs [11, P]: loss, chosen reward, rejected reward, then the columns of PairStats
    return total, PairLoss(*pairs[:3]), PairStats(*pairs[3:]), TokenStats(*tokens_3N)


@lru_cache(maxsize=64)
def kl_ratios(objective: Objective) -> tuple[float, float] | None:
    """Computes c of the chosen and of the rejected side from an objective's derivatives at two points.

    Returns:
        For each side, the derivative with respect to a token's KL divided by that with respect to its log-probability.
        None if this is not one constant per side, or a side has no derivative at either point: the directions may then
        depend on statistics of the whole pair.

    Examples:
        >>> from tdpo.objectives import tdpo1, tdpo2
        >>> kl_ratios(tdpo1(beta=0.1)), kl_ratios(tdpo2(beta=0.1, alpha=0.5))
        ((1.0, 1.0), (0.0, 0.5))
    """
    if not objective.one_pass:
        return None
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3])  # two pairs, of 3 and 2 and of 2 and 4 tokens
    steps = torch.arange(len(ids), dtype=torch.float64)
    logp_gradients, kl_gradients = [], []
    for sign in (1.0, -1.0):  # if one point saturates the loss, the other does not
        with torch.enable_grad():
            logp, kl = (sign * torch.sin(steps + 1)).requires_grad_(), (1 + torch.cos(steps)).requires_grad_()
            loss = objective.pair_loss(PairTokens.of(TokenStats(logp, torch.cos(3 * steps), kl), ids, 2)).loss.sum()
            gradients = torch.autograd.grad(loss, (logp, kl), allow_unused=True, materialize_grads=True)
        logp_gradients.append(gradients[0])
        kl_gradients.append(gradients[1])
    ratios = []
    for side in (0, 1):
        in_logp, in_kl = (torch.cat(parts)[(ids % 2 == side).repeat(2)] for parts in (logp_gradients, kl_gradients))
        depends = in_logp != 0
        if not depends.any():  # such as a hinge that is met at both points
            return None
        ratio = float(in_kl[depends][0] / in_logp[depends][0])
        if not ((in_kl - ratio * in_logp).abs() <= 1e-9 * in_logp.abs()).all():  # also for NaN
            return None
        ratios.append(round(ratio, 12) + 0.0)  # never -0
    return ratios[0], ratios[1]


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *options: Any) -> Any:
        """Computes loss, statistics and the gradients of the loss, group by group."""
        head, reference, labels_N, lengths, objective, ratios, logits_budget, weights_2N, kernels, grad_on = options
        policy = Hidden(states_ND, replace(head, weight=weight_VD, bias=bias_V))
        wants_gradients = ctx.needs_input_grad[:3] if grad_on else (False, False, False)
        heads = BlockwiseHeads(policy, reference, logits_budget, wants_gradients)
        groups = [
            _group_loss(heads, labels_N, group, blocks, objective, ratios, weights_2N, kernels)
            for group, blocks in _groups(lengths, heads.block_rows)
        ]
        tokens_3N, pairs = (torch.cat(parts, 1) for parts in zip(*groups, strict=True))
        inputs = states_ND, weight_VD, bias_V
        ctx.gradients = heads.gradients()
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.mark_non_differentiable(pairs, tokens_3N)
        return pairs[0].sum(), pairs, tokens_3N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> Any:
        """Returns the gradients that the forward computed, scaled by the incoming gradient."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the fused loss can be differentiated once; call it again for a second backward pass")
        # A scale of 1 spares a pass over the head's gradient. On a GPU the comparison would wait for the device.
        if not (grad_total.device.type == "cpu" and grad_total == 1):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_total)
        cast = [None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return *cast, *[None] * 10  # for the options


def _group_loss(
    heads: BlockwiseHeads,
    labels_N: Tensor,
    lengths: Sequence[int],
    blocks: list[slice],
    objective: Objective,
    ratios: tuple[float, float],
    weights_2N: Tensor | None,
    kernels: ModuleType,
) -> tuple[Tensor, Tensor]:
    """Computes a group's token statistics ``[3, n]``, and the loss, rewards and sums of its pairs ``[11, P]``.

    Side effect: adds the group's gradients to ``heads``.
    """
    start = blocks[0].start
    # Chosen 2p, rejected 2p + 1; made on the device, since a copy from the host would wait for it.
    ids_n = torch.cat([labels_N.new_full((length,), number) for number, length in enumerate(lengths)])
    ratio, rejected_ratio = (labels_N.new_full((), value, dtype=heads.wide) for value in ratios)
    weights_2n = None if weights_2N is None else weights_2N[:, start : start + len(ids_n)].to(heads.wide)
    c_n, kl_alone_n = _token_ratios(torch.where(ids_n % 2 == 0, ratio, rejected_ratio), weights_2n)
    # The first pass writes the directions, unless no gradient is needed or a second pass over the logits follows.
    directions_now = heads.trains and (len(blocks) == 1 or not heads.trains_head)
    parts = []
    for block in blocks:
        local = slice(block.start - start, block.stop - start)
        # Given c, row_stats_ replaces the policy's logits by (1 - c) p + c p_ref - onehot(y).
        c = (c_n[local], None if kl_alone_n is None else kl_alone_n[local]) if directions_now else ()
        parts.append(kernels.row_stats_(heads.logits(block), heads.ref_logits(block), labels_N[block], *c))
        if directions_now and len(blocks) > 1:
            heads.add_gradients(block)
    stats_5n = torch.cat(parts, 1)  # logp, ref_logp, kl, and the log-partition values that direction_ reads
    if heads.reference is None:
        stats_5n[1:3] = torch.nan
    factor_n, pairs = _factors(TokenStats(*stats_5n[:3]), ids_n, len(lengths) // 2, objective, c_n, weights_2n)
    if directions_now and len(blocks) == 1:
        heads.add_gradients(blocks[0], factor_n)
    elif directions_now:
        heads.scale_states(slice(start, start + len(ids_n)), factor_n)
    elif heads.trains:
        for block in blocks:  # second pass: the group is one pair in several blocks, and the head is trained
            local = slice(block.start - start, block.stop - start)
            is_rejected = local.start >= lengths[0]
            ref_logits = heads.ref_logits(block) if ratios[is_rejected] else None
            a_n = -torch.ones_like(factor_n[local])  # direction_ writes a (onehot - p) + b (p - p_ref)
            if kl_alone_n is not None:
                a_n.masked_fill_(kl_alone_n[local], 0)
            kernels.direction_(heads.logits(block), ref_logits, labels_N[block], stats_5n[:, local], a_n, -c_n[local])
            heads.add_gradients(block, factor_n[local])
    return stats_5n[:3], pairs


def _token_ratios(c_n: Tensor, weights_2n: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns c of every token, and a mask of the tokens whose log-probability has weight 0.

    Such a token has no ratio; c is 1, and the kernels leave out the log-probability's part of its direction.
    """
    if weights_2n is None:
        return c_n, None
    weights_n, kl_weights_n = weights_2n
    kl_alone_n = weights_n == 0
    c_n = c_n * kl_weights_n / torch.where(kl_alone_n, 1, weights_n)
    return torch.where(kl_alone_n, 1, c_n), kl_alone_n


def _groups(lengths: Sequence[int], max_rows: int) -> Iterator[tuple[Sequence[int], list[slice]]]:
    """Yields groups of consecutive pairs of at most ``max_rows`` tokens: their lengths, and their rows as one block.

    A longer pair is a group of its own, in several blocks, each with tokens of one response only.
    """
    start = first = 0
    for stop in range(2, len(lengths) + 1, 2):
        size = sum(lengths[first:stop])
        if stop < len(lengths) and size + sum(lengths[stop : stop + 2]) <= max_rows:
            continue
        blocks = [slice(start, start + size)]
        if size > max_rows:
            middle = start + lengths[first]
            sides = (start, middle), (middle, start + size)
            blocks = [
                slice(row, min(row + max_rows, end)) for begin, end in sides for row in range(begin, end, max_rows)
            ]
        yield lengths[first:stop], blocks
        start, first = start + size, stop


def _factors(
    tokens: TokenStats, ids_n: Tensor, pairs: int, objective: Objective, c_n: Tensor, weights_2n: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the factor of each token's direction, and the loss, rewards and sums of the pairs ``[11, P]``.

    Raises:
        ValueError: if the ratio of the gradients is another one here than where :func:`kl_ratios` looked. On an
            accelerator, which a check would wait for, the factors are NaN instead, and training stops.
    """
    with torch.enable_grad():
        logp_n, kl_n = tokens.logp.detach().requires_grad_(), tokens.kl.detach().requires_grad_()
        weighted = PairTokens.of(TokenStats(logp_n, tokens.ref_logp, kl_n), ids_n, pairs, weights_2n)
        outcome = objective.pair_loss(weighted)
        gradients = torch.autograd.grad(outcome.loss.sum(), (logp_n, kl_n), allow_unused=True, materialize_grads=True)
    factor_n = -gradients[0]  # negative, since the direction is the gradient of -(logp + c kl)
    wrong_n = (gradients[1] - c_n * gradients[0]).abs() > 1e-3 * gradients[0].abs()
    if weights_2n is not None:
        wrong_n &= weights_2n[0] != 0
        factor_n = torch.where(weights_2n[0] == 0, -gradients[1], factor_n)
    if wrong_n.device.type != "cpu":
        factor_n = torch.where(wrong_n, torch.nan, factor_n)
    elif wrong_n.any():
        raise ValueError(
            f"{objective}: the ratio of its gradients in KL and log-probability changes with the statistics; set "
            "one_pass = False in its class"
        )
    # Reported sums are not weighted.
    reported = weighted if weights_2n is None else PairTokens.of(tokens, ids_n, pairs)
    columns = outcome.loss, outcome.chosen_reward, outcome.rejected_reward, *vars(reported.sums).values()
    return factor_n, torch.stack([column.detach() for column in columns])
