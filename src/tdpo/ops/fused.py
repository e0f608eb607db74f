"""The summed loss of pairs and its gradient, computed in one pass over the logits, a group of pairs at a time.

Per token, the gradient of the loss in the logits is a scalar times a vector, the direction. The direction needs only
the logits of this token; the scalar needs the statistics of the whole pair:

    d loss / d logits = factor_t * ((1 - c) p + c p_ref - onehot(y_t)),    factor_t = -d loss / d logp_t

where c is one constant for the chosen and one for the rejected responses, see :func:`kl_ratios`, times the ratio of the
token's two weights. For a group of whole pairs this takes

1. one matrix product for the policy's logits and one for the reference's, if the objective has a reference;
2. one pass over the rows for token statistics and directions, which replace the policy's logits;
3. the objective on the statistics, whose derivatives are the factors;
4. one product for the gradient of the hidden states and, if the head is trained, one for the head's.

That is 3 products with a frozen head and 4 with a trained one, as many as plain autograd takes, with the memory of one
group. A pair too large for a group is computed in blocks of tokens. With a frozen head, the gradients of the states are
computed unscaled, and each row is multiplied by its factor once the pair is complete. The gradient of a trained head is
a sum over rows, so the factors must be known first: the logits are computed twice (the reference's only where c is not
0), 5 or 6 products in all.

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
    """Computes what :func:`tdpo.ops.naive.pair_loss` does in one pass over the logits.

    Args:
        policy: States ``[N, D]`` and head; differentiable.
        reference: The reference's states and head, which get no gradient; None for an objective without one.
        labels_N: Response tokens, int64; those of a pair are contiguous, chosen before rejected.
        lengths: Token counts, length 2P: of chosen 0, rejected 0, chosen 1, ...
        objective: The objective whose loss is summed.
        ratios: Its :func:`kl_ratios`.
        logits_budget: Bytes the logits of a group may take; None for the device's default.
        weights_2N: Weights of the tokens' log-probabilities and KL; None for 1 everywhere.
        kernels: The row operations: :mod:`tdpo.ops.rows` or :mod:`tdpo.ops.triton_kernels`.

    Returns:
        The sum of the losses, which supports one backward pass and no second derivatives; and without gradient the loss
        and rewards of each pair, its sums, and the token statistics.
    """
    head = policy.head
    options = head, reference, labels_N, lengths, objective, ratios, logits_budget, weights_2N, kernels
    total, pairs, tokens_3N = _PairLoss.apply(policy.states, head.weight, head.bias, *options, torch.is_grad_enabled())
    # rows of pairs [11, P]: loss, chosen reward, rejected reward, then the columns of PairStats
    return total, PairLoss(*pairs[:3]), PairStats(*pairs[3:]), TokenStats(*tokens_3N)


@lru_cache(maxsize=64)
def kl_ratios(objective: Objective) -> tuple[float, float] | None:
    """Derives c of the chosen and the rejected side from an objective's derivatives at two points, once per objective.

    Returns:
        On each side, the derivative in a token's KL over that in its log-probability. None where that is no constant of
        the side; the gradient's direction is then unknown before the sums are.

    Example:
        >>> from tdpo.objectives import tdpo1, tdpo2
        >>> kl_ratios(tdpo1(beta=0.1)), kl_ratios(tdpo2(beta=0.1, alpha=0.5))
        ((1.0, 1.0), (0.0, 0.5))
    """
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3])
    steps = torch.arange(len(ids), dtype=torch.float64)
    of_logp, of_kl = [], []
    for sign in (1.0, -1.0):  # where one point saturates the loss, the other does not
        with torch.enable_grad():
            logp, kl = (sign * torch.sin(steps + 1)).requires_grad_(), (1 + torch.cos(steps)).requires_grad_()
            loss = objective.pair_loss(PairTokens.of(TokenStats(logp, torch.cos(3 * steps), kl), ids, 2)).loss.sum()
            gradients = torch.autograd.grad(loss, (logp, kl), allow_unused=True, materialize_grads=True)
        of_logp.append(gradients[0])
        of_kl.append(gradients[1])
    ratios = []
    for side in (0, 1):
        a, b = (torch.cat(gradients)[(ids % 2 == side).repeat(2)] for gradients in (of_logp, of_kl))
        ratio = float(b[a != 0][0] / a[a != 0][0]) if a.any() else 0.0
        if ((b - ratio * a).abs() > 1e-9 * a.abs()).any():
            return None
        ratios.append(round(ratio, 12) + 0.0)  # never -0
    return ratios[0], ratios[1]


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *options: Any) -> Any:
        """Computes loss, statistics and the gradient of the loss, group by group."""
        head, reference, labels_N, lengths, objective, ratios, logits_budget, weights_2N, kernels, on = options
        policy = Hidden(states_ND, replace(head, weight=weight_VD, bias=bias_V))
        needs = ctx.needs_input_grad[:3] if on else (False, False, False)
        heads = BlockwiseHeads(policy, reference, logits_budget, needs)
        groups = [
            _group_loss(heads, labels_N, group, blocks, objective, ratios, weights_2N, kernels)
            for group, blocks in _groups(lengths, heads.block_rows)
        ]
        tokens_3N, pairs = (torch.cat(parts, 1) for parts in zip(*groups, strict=True))
        sources = states_ND, weight_VD, bias_V
        ctx.gradients = heads.gradients()
        ctx.dtypes = [None if source is None else source.dtype for source in sources]
        ctx.mark_non_differentiable(pairs, tokens_3N)
        return pairs[0].sum(), pairs, tokens_3N

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
    """Computes a group's token statistics ``[3, n]``, and loss, rewards and sums of its pairs ``[11, P]``.

    Side effect: adds the group's gradients to ``heads``.
    """
    start, device = blocks[0].start, labels_N.device
    counts = torch.tensor(lengths, device=device)
    ids_n = torch.repeat_interleave(counts, output_size=sum(lengths))  # chosen 2p, rejected 2p + 1
    weights_2n = None if weights_2N is None else weights_2N[:, start : start + len(ids_n)].to(heads.wide)
    c_n, alone_n = _token_ratios(torch.tensor(ratios, dtype=heads.wide, device=device)[ids_n % 2], weights_2n)
    # Write directions in this pass; otherwise there is no gradient, or a second pass follows.
    directions_now = heads.trains and (len(blocks) == 1 or not heads.trains_head)
    parts = []
    for block in blocks:
        local = slice(block.start - start, block.stop - start)
        # With c, row_stats_ replaces the policy's logits by (1 - c) p + c p_ref - onehot(y).
        c = (c_n[local], None if alone_n is None else alone_n[local]) if directions_now else ()
        parts.append(kernels.row_stats_(heads.logits(block), heads.ref_logits(block), labels_N[block], *c))
        if directions_now and len(blocks) > 1:
            heads.add_gradients(block)
    stats_5n = torch.cat(parts, 1)  # logp, ref_logp, kl, and the log-partition values that direction_ reads
    if heads.reference is None:
        stats_5n[1:3] = torch.nan
    factor_n, pairs = _factors(TokenStats(*stats_5n[:3]), ids_n, len(lengths) // 2, objective, weights_2n)
    if directions_now and len(blocks) == 1:
        heads.add_gradients(blocks[0], factor_n)
    elif directions_now:
        heads.scale_states(slice(start, start + len(ids_n)), factor_n)
    elif heads.trains:
        for block in blocks:  # Second pass: the group is one oversized pair and its head is trained.
            local = slice(block.start - start, block.stop - start)
            is_rejected = local.start >= lengths[0]
            ref_logits = heads.ref_logits(block) if ratios[is_rejected] else None
            a_n = -torch.ones_like(factor_n[local])  # direction_ writes a (onehot - p) + b (p - p_ref)
            if alone_n is not None:
                a_n[alone_n[local]] = 0
            kernels.direction_(heads.logits(block), ref_logits, labels_N[block], stats_5n[:, local], a_n, -c_n[local])
            heads.add_gradients(block, factor_n[local])
    return stats_5n[:3], pairs


def _token_ratios(c_n: Tensor, weights_2n: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns c of every token, and which tokens have a weight on their KL alone (their c is then 1)."""
    if weights_2n is None:
        return c_n, None
    weights_n, kl_weights_n = weights_2n
    alone_n = weights_n == 0
    c_n = c_n * kl_weights_n / torch.where(alone_n, 1, weights_n)
    return torch.where(alone_n, 1, c_n), alone_n


def _groups(lengths: Sequence[int], limit: int) -> Iterator[tuple[Sequence[int], list[slice]]]:
    """Yields the lengths of consecutive pairs that fit ``limit`` rows of logits, and their rows as one block.

    A pair that does not fit is a group of its own, in blocks that each hold tokens of one response.
    """
    start = first = 0
    for stop in range(2, len(lengths) + 1, 2):
        size = sum(lengths[first:stop])
        if stop < len(lengths) and size + sum(lengths[stop : stop + 2]) <= limit:
            continue
        blocks = [slice(start, start + size)]
        if size > limit:
            middle = start + lengths[first]
            sides = (start, middle), (middle, start + size)
            blocks = [slice(row, min(row + limit, end)) for begin, end in sides for row in range(begin, end, limit)]
        yield lengths[first:stop], blocks
        start, first = start + size, stop


def _factors(
    tokens: TokenStats, ids_n: Tensor, pairs: int, objective: Objective, weights_2n: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns each token's factor on its direction, and loss, rewards and sums of the pairs ``[11, P]``."""
    with torch.enable_grad():
        logp_n, kl_n = tokens.logp.detach().requires_grad_(), tokens.kl.detach().requires_grad_()
        seen = PairTokens.of(TokenStats(logp_n, tokens.ref_logp, kl_n), ids_n, pairs, weights_2n)
        outcome = objective.pair_loss(seen)
        gradients = torch.autograd.grad(outcome.loss.sum(), (logp_n, kl_n), allow_unused=True, materialize_grads=True)
    factor_n = -gradients[0]  # minus, as the direction is the gradient of -(logp + c kl)
    if weights_2n is not None:
        factor_n = torch.where(weights_2n[0] == 0, -gradients[1], factor_n)
    measured = (
        seen if weights_2n is None else PairTokens.of(tokens, ids_n, pairs)
    )  # weights do not change a measurement
    columns = outcome.loss, outcome.chosen_reward, outcome.rejected_reward, *vars(measured.sums).values()
    return factor_n, torch.stack([column.detach() for column in columns])
