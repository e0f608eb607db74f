"""Token statistics in chunks of rows: exact, any upstream gradient, never ``[N, V]`` in memory.

Two passes: the forward keeps one log-partition value a row and model; the backward recomputes the logits of a chunk,
writes the gradient over them and multiplies it away. Shapes: N response tokens, n rows of one chunk, D hidden width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

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
from tdpo.ops.numerics import head_logits, statistics_dtype
from tdpo.ops.rows import RowKernels, RowStats
from tdpo.ops.workspace import logits_buffers, padded_vocab
from tdpo.types import Head, Hidden, TokenStats

LOGP_BUFFERS = 4
"""Logits of a chunk alive at once in :func:`response_logp`, where autograd keeps what a log-softmax is made of."""


def default_logits_budget(device: torch.device) -> int:
    """Bytes a chunk's buffers may take: 512 MiB on an accelerator, 256 MiB on a CPU."""
    return (256 if device.type == "cpu" else 512) * 2**20


def response_stats(
    policy: Hidden,
    reference: Hidden,
    labels_N: Tensor,
    logits_budget: int | None = None,
    kernels: RowKernels = torch_rows,
) -> TokenStats:
    """Equals :func:`tdpo.ops.naive.response_stats` with the memory of one chunk.

    Args:
        policy: Hidden states ``[N, D]`` and head; differentiable in states, weight and bias.
        reference: The same of the reference; constant.
        labels_N: Response tokens, ``[N]`` int64.
        logits_budget: Bytes the buffers of a chunk may take; by default :func:`default_logits_budget`.
        kernels: What is done to a block's rows.
    """
    plan = _Plan(
        scale=policy.head.scale,
        soft_cap=policy.head.soft_cap,
        reference=Hidden(reference.states.detach(), detached(reference.head)),
        labels_N=labels_N,
        budget=default_logits_budget(policy.states.device) if logits_budget is None else logits_budget,
        kernels=kernels,
    )
    logp, ref_logp, kl = _TokenStats.apply(policy.states, policy.head.weight, policy.head.bias, plan)
    return TokenStats(logp, ref_logp, kl)


def response_logp(policy: Hidden, labels_N: Tensor, logits_budget: int | None = None) -> Tensor:
    """Log-probabilities ``[N]`` of the labels, chunk by chunk; the backward recomputes a chunk's logits."""
    budget = default_logits_budget(policy.states.device) if logits_budget is None else logits_budget
    wide = statistics_dtype(policy.states.dtype)
    rows = max(1, budget // (padded_vocab(policy.head.vocab_size, wide) * wide.itemsize * LOGP_BUFFERS))

    def chunk(states_nD: Tensor, labels_n: Tensor) -> Tensor:
        return -cross_entropy(head_logits(states_nD, policy.head), labels_n, reduction="none")

    parts = zip(policy.states.split(rows), labels_N.split(rows), strict=True)
    return torch.cat([checkpoint(chunk, states, labels, use_reentrant=False) for states, labels in parts])


@dataclass(frozen=True)
class _Plan:
    """What the op needs beside the three tensors it differentiates."""

    scale: float
    soft_cap: float | None
    reference: Hidden
    labels_N: Tensor
    budget: int
    kernels: RowKernels

    def chunks(self, head: Head, dtype: torch.dtype) -> list[slice]:
        """The rows of each chunk; the first is the longest."""
        total = self.labels_N.numel()
        rows = min(chunk_rows(head, dtype, self.budget), total)
        return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: _Plan) -> Any:
        """Statistics chunk by chunk; only the log-partition values stay for the backward."""
        wide = statistics_dtype(states_ND.dtype)
        head = prepared(Head(weight_VD, bias_V, plan.scale, plan.soft_cap), wide)
        ref_head = prepared(plan.reference.head, wide)
        parts, chunks = [], plan.chunks(head, wide)
        with logits_buffers(2, chunks[0].stop, head.vocab_size, wide, states_ND.device) as buffers:
            for rows in chunks:
                logits = write_logits(states_ND[rows], head, buffers[0])
                ref_logits = write_logits(plan.reference.states[rows], ref_head, buffers[1])
                parts.append(plan.kernels.row_stats(logits, ref_logits, plan.labels_N[rows]))
        stats = RowStats.joined(parts)
        ctx.save_for_backward(states_ND, weight_VD, bias_V, *stats.columns())
        ctx.plan = plan
        ctx.mark_non_differentiable(stats.ref_logp)
        ctx.set_materialize_grads(False)
        return stats.logp, stats.ref_logp, stats.kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Recomputes each chunk's logits, writes the gradient over them, and carries it back."""
        grad_logp, _, grad_kl = grads
        states_ND, weight_VD, bias_V, *columns = ctx.saved_tensors
        plan: _Plan = ctx.plan
        if grad_logp is None and grad_kl is None:
            return None, None, None, None
        stats = RowStats(*columns)
        a_N = torch.zeros_like(stats.logp) if grad_logp is None else grad_logp
        b_N = torch.zeros_like(stats.logp) if grad_kl is None else grad_kl
        gradient = HeadGradient(states_ND, weight_VD, bias_V, ctx.needs_input_grad[:3])
        head = prepared(Head(weight_VD, bias_V, plan.scale, plan.soft_cap), gradient.wide)
        ref_head = prepared(plan.reference.head, gradient.wide)
        chunks, count, vocab = plan.chunks(head, gradient.wide), buffers_of(head), head.vocab_size
        with logits_buffers(count, chunks[0].stop, vocab, gradient.wide, states_ND.device) as buffers:
            for rows in chunks:
                logits = write_logits(states_ND[rows], head, buffers[0])
                slope = cap_slope(logits, head, buffers[2:])
                ref_logits = None
                if grad_kl is not None:
                    ref_logits = write_logits(plan.reference.states[rows], ref_head, buffers[1])
                labels, stats_n = plan.labels_N[rows], stats.at(rows)
                plan.kernels.direction_(logits, ref_logits, labels, stats_n, a_N[rows], b_N[rows])
                gradient.add(rows, raw_gradient_(logits, slope, head), head)
        return (*gradient.scaled(None), None)
