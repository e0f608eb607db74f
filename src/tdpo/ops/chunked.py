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

from tdpo.ops.numerics import head_logits, kl_terms, statistics_dtype
from tdpo.types import Head, Hidden, TokenStats

LIVE_BUFFERS = 10
"""Buffers of a chunk's logits alive at once (9.5 measured): two models' logits and what the KL formula keeps."""


CACHED_ELEMENTS = 2**18
"""Logits of one model that fit a CPU core's cache together with what is computed from them."""


def default_logits_budget(device: torch.device) -> int:
    """Bytes a chunk's buffers may take: 512 MiB on an accelerator, 256 MiB on a CPU."""
    return (256 if device.type == "cpu" else 512) * 2**20


def chunk_rows(vocab_size: int, dtype: torch.dtype, budget: int) -> int:
    """Rows whose buffers fit ``budget`` bytes, at least one."""
    return max(1, budget // (vocab_size * dtype.itemsize * LIVE_BUFFERS))


def response_stats(policy: Hidden, reference: Hidden, labels_N: Tensor, logits_budget: int | None = None) -> TokenStats:
    """Equals :func:`tdpo.ops.naive.response_stats` with the memory of one chunk.

    Args:
        policy: Hidden states ``[N, D]`` and head; differentiable in states, weight and bias.
        reference: The same of the reference; constant.
        labels_N: Response tokens, ``[N]`` int64.
        logits_budget: Bytes the buffers of a chunk may take; by default :func:`default_logits_budget`.
    """
    plan = _Plan(
        scale=policy.head.scale,
        soft_cap=policy.head.soft_cap,
        reference=Hidden(reference.states.detach(), _detached(reference.head)),
        labels_N=labels_N,
        budget=default_logits_budget(policy.states.device) if logits_budget is None else logits_budget,
    )
    logp, ref_logp, kl = _TokenStats.apply(policy.states, policy.head.weight, policy.head.bias, plan)
    return TokenStats(logp, ref_logp, kl)


def response_logp(policy: Hidden, labels_N: Tensor, logits_budget: int | None = None) -> Tensor:
    """Log-probabilities ``[N]`` of the labels, chunk by chunk; the backward recomputes a chunk's logits."""
    budget = default_logits_budget(policy.states.device) if logits_budget is None else logits_budget
    rows = chunk_rows(policy.head.vocab_size, statistics_dtype(policy.states.dtype), budget)

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

    def chunks(self, dtype: torch.dtype) -> list[slice]:
        rows = chunk_rows(self.reference.head.vocab_size, dtype, self.budget)
        total = self.labels_N.numel()
        return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: _Plan) -> Any:
        wide = statistics_dtype(states_ND.dtype)
        head, ref_head = _widened(Head(weight_VD, bias_V, plan.scale, plan.soft_cap)), _widened(plan.reference.head)
        logp, ref_logp, kl, log_z, ref_log_z = torch.empty(5, states_ND.shape[0], dtype=wide, device=states_ND.device)
        for rows in plan.chunks(wide):
            index = plan.labels_N[rows, None]
            logits_nV = head_logits(_widen(states_ND[rows]), head)
            ref_logits_nV = head_logits(_widen(plan.reference.states[rows]), ref_head).to(wide)
            log_z[rows] = logits_nV.logsumexp(-1)
            ref_log_z[rows] = ref_logits_nV.logsumexp(-1)
            logp[rows] = logits_nV.gather(1, index)[:, 0] - log_z[rows]
            ref_logp[rows] = ref_logits_nV.gather(1, index)[:, 0] - ref_log_z[rows]
            kl[rows] = _kl_rows(logits_nV, ref_logits_nV, log_z[rows], ref_log_z[rows])
        ctx.save_for_backward(states_ND, weight_VD, bias_V, log_z, ref_log_z)
        ctx.plan = plan
        ctx.mark_non_differentiable(ref_logp)
        ctx.set_materialize_grads(False)
        return logp, ref_logp, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_logp, _, grad_kl = grads
        states_ND, weight_VD, bias_V, log_z, ref_log_z = ctx.saved_tensors
        plan: _Plan = ctx.plan
        if grad_logp is None and grad_kl is None:
            return None, None, None, None
        need_states, need_weight, need_bias, _ = ctx.needs_input_grad
        wide = statistics_dtype(states_ND.dtype)
        head, ref_head = _widened(Head(weight_VD, bias_V, plan.scale, plan.soft_cap)), _widened(plan.reference.head)
        grad_states = torch.empty_like(states_ND) if need_states else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if need_bias else None
        for rows in plan.chunks(wide):
            states = _widen(states_ND[rows])
            logits_nV = head_logits(states, head)
            slope = _cap_slope(logits_nV, plan)
            grad_nV = logits_nV.sub_(log_z[rows, None]).exp_()  # the policy's probabilities
            a = torch.zeros_like(log_z[rows]) if grad_logp is None else grad_logp[rows]
            b = None if grad_kl is None else grad_kl[rows]
            # d logp / d logits = onehot - p;  d KL(ref || pi) / d logits = p - p_ref
            grad_nV.mul_((-a if b is None else b - a)[:, None])
            if b is not None:
                ref_logits_nV = head_logits(_widen(plan.reference.states[rows]), ref_head).to(wide)
                grad_nV.sub_(ref_logits_nV.sub_(ref_log_z[rows, None]).exp_().mul_(b[:, None]))
            grad_nV.scatter_add_(1, plan.labels_N[rows, None], a[:, None].to(wide))
            if slope is not None:
                grad_nV.mul_(slope)
            if plan.scale != 1.0:
                grad_nV.mul_(plan.scale)
            if grad_states is not None:
                grad_states[rows] = (grad_nV @ head.weight.to(wide)).to(grad_states.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_nV.t(), states.to(wide))
            if grad_bias is not None:
                grad_bias += grad_nV.sum(0)
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None else grad_bias.to(bias_V.dtype),
            None,
        )


def _kl_rows(logits_nV: Tensor, ref_logits_nV: Tensor, log_z_n: Tensor, ref_log_z_n: Tensor) -> Tensor:
    """KL(reference || policy) of each row, ``[n]``, from logits and their log-partition values.

    On a CPU a few rows at a time, so that every pass after the first finds them in the cache, and by ``expm1``, which
    is as accurate as the log-ratio it is given. Rows where that is not finite (a log-ratio that overflows, or -inf on
    both sides) are done again by the formula that cannot fail.
    """
    if logits_nV.device.type != "cpu":
        return kl_terms(logits_nV - log_z_n[:, None], ref_logits_nV - ref_log_z_n[:, None]).sum(-1)
    parts = []
    rows = max(1, CACHED_ELEMENTS // logits_nV.shape[1])
    for z, ref_z, log_z, ref_log_z in zip(
        logits_nV.split(rows), ref_logits_nV.split(rows), log_z_n.split(rows), ref_log_z_n.split(rows), strict=True
    ):
        ref_logp = ref_z - ref_log_z[:, None]
        u = (z - log_z[:, None]).sub_(ref_logp)
        kl = torch.expm1(u).sub_(u).clamp_(min=0).mul_(ref_logp.exp_()).sum(-1)
        wrong = ~kl.isfinite()
        if wrong.any():
            logp, ref_logp = z[wrong] - log_z[wrong, None], ref_z[wrong] - ref_log_z[wrong, None]
            kl[wrong] = kl_terms(logp, ref_logp).sum(-1)
        parts.append(kl)
    return torch.cat(parts)


def _cap_slope(logits_nV: Tensor, plan: _Plan) -> Tensor | None:
    """Derivative of the soft cap at its own output: 1 - (logits / cap)^2."""
    return None if plan.soft_cap is None else 1 - (logits_nV / plan.soft_cap) ** 2


def _detached(head: Head) -> Head:
    return Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.soft_cap)


def _widen(tensor: Tensor) -> Tensor:
    """Half precision on a CPU is widened once here; on a GPU the product itself accumulates wide."""
    return tensor if tensor.is_cuda else tensor.to(statistics_dtype(tensor.dtype))


def _widened(head: Head) -> Head:
    return Head(_widen(head.weight), head.bias, head.scale, head.soft_cap)
