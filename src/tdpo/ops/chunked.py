"""Token statistics in blocks of rows: exact, any upstream gradient, never ``[N, V]`` in memory.

Two passes: the forward keeps the statistics of each row; the backward recomputes the logits of a block, writes the
gradient over them and carries it back. Shapes: N response tokens, n rows of one block, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from tdpo.ops.heads import BlockwiseHeads, default_logits_budget, padded_vocab
from tdpo.ops.numerics import head_logits, statistics_dtype
from tdpo.types import Hidden, TokenStats

LOGP_BUFFERS = 4
"""Logits of a block alive at once in :func:`response_logp`, where autograd keeps what a log-softmax is made of."""


def token_stats(
    policy: Hidden, reference: Hidden | None, labels_N: Tensor, logits_budget: int | None, kernels: ModuleType
) -> TokenStats:
    """Computes what :func:`tdpo.ops.naive.token_stats` does with the memory of one block.

    Args:
        policy: Hidden states ``[N, D]`` and head; differentiable in states, weight and bias.
        reference: The same of the reference; constant. Without one, its log-probabilities and the KL are NaN.
        labels_N: Response tokens, int64.
        logits_budget: Bytes the logits of a block may take; None for the device's default.
        kernels: The row operations: :mod:`tdpo.ops.rows` or :mod:`tdpo.ops.triton_kernels`.
    """
    head = policy.head
    options = head, reference, labels_N, logits_budget, kernels
    return TokenStats(*_TokenStats.apply(policy.states, head.weight, head.bias, *options))


def response_logp(policy: Hidden, labels_N: Tensor, logits_budget: int | None = None) -> Tensor:
    """Computes the log-probability of each label, block by block; the backward recomputes a block's logits."""
    budget = default_logits_budget(policy.states.device) if logits_budget is None else logits_budget
    wide = statistics_dtype(policy.states.dtype)
    rows = max(1, budget // (padded_vocab(policy.head.vocab_size, wide) * wide.itemsize * LOGP_BUFFERS))

    def block(states_nD: Tensor, labels_n: Tensor) -> Tensor:
        return -cross_entropy(head_logits(states_nD, policy.head), labels_n, reduction="none")

    parts = zip(policy.states.split(rows), labels_N.split(rows), strict=True)
    return torch.cat([checkpoint(block, states, labels, use_reentrant=False) for states, labels in parts])


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *options: Any) -> Any:
        """Computes the statistics block by block and keeps them for the backward."""
        head, reference, labels_N, logits_budget, kernels = options
        policy = Hidden(states_ND, replace(head, weight=weight_VD, bias=bias_V))
        heads = BlockwiseHeads(policy, reference, logits_budget)
        blocks = [
            kernels.row_stats_(heads.logits(rows), heads.ref_logits(rows), labels_N[rows]) for rows in heads.blocks()
        ]
        stats_5N = torch.cat(blocks, 1)
        if reference is None:
            stats_5N[1:3] = torch.nan
        ctx.save_for_backward(states_ND, weight_VD, bias_V, stats_5N)
        ctx.options = options
        logp, ref_logp, kl = (column.clone() for column in stats_5N[:3])
        ctx.mark_non_differentiable(ref_logp)
        ctx.set_materialize_grads(False)
        return logp, ref_logp, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, _: None, grad_kl: Tensor | None) -> Any:
        """Recomputes each block's logits, writes the gradient over them and carries it back."""
        states_ND, weight_VD, bias_V, stats_5N = ctx.saved_tensors
        head, reference, labels_N, logits_budget, kernels = ctx.options
        a_N = torch.zeros_like(stats_5N[0]) if grad_logp is None else grad_logp
        b_N = torch.zeros_like(stats_5N[0]) if grad_kl is None else grad_kl
        policy = Hidden(states_ND, replace(head, weight=weight_VD, bias=bias_V))
        heads = BlockwiseHeads(policy, reference, logits_budget, ctx.needs_input_grad[:3])
        for rows in heads.blocks() if grad_logp is not None or grad_kl is not None else []:
            logits, ref_logits = heads.logits(rows), None if grad_kl is None else heads.ref_logits(rows)
            # d (a logp + b kl) / d logits = a (onehot - p) + b (p - p_ref)
            kernels.direction_(logits, ref_logits, labels_N[rows], stats_5N[:, rows], a_N[rows], b_N[rows])
            heads.add_gradients(rows)
        sources = states_ND, weight_VD, bias_V
        gradients = [None if g is None else g.to(s.dtype) for g, s in zip(heads.gradients(), sources, strict=True)]
        return *gradients, *[None] * 5  # for the options
