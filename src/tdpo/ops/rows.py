"""What happens to a block of logits between the matrix products: statistics, and the loss gradient written over them.

Shapes: n rows of one block, V vocabulary. Everything here runs without autograd and in the statistics dtype. On a CPU
a few rows are taken at a time, so that each pass after the first finds them in the core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tdpo.ops.numerics import kl_terms

CACHED_ELEMENTS = 2**18
"""Logits of one model that fit a CPU core's cache together with what is computed from them."""


@dataclass(frozen=True)
class RowStats:
    """Statistics of n rows, all ``[n]``, in nats.

    Attributes:
        logp: log pi of the label.
        ref_logp: log pi_ref of the label.
        kl: KL(reference || policy).
        log_z: Log-partition value of the policy's logits.
        ref_log_z: The same of the reference's.
    """

    logp: Tensor
    ref_logp: Tensor
    kl: Tensor
    log_z: Tensor
    ref_log_z: Tensor

    def at(self, rows: slice) -> RowStats:
        """The statistics of some of the rows."""
        return RowStats(*(column[rows] for column in self.columns()))

    def columns(self) -> tuple[Tensor, ...]:
        """The five statistics in the order of the attributes."""
        return self.logp, self.ref_logp, self.kl, self.log_z, self.ref_log_z

    @classmethod
    def joined(cls, parts: Sequence[RowStats]) -> RowStats:
        """The statistics of consecutive blocks as one."""
        return (
            parts[0]
            if len(parts) == 1
            else cls(*(torch.cat(c) for c in zip(*(p.columns() for p in parts), strict=True)))
        )


class RowKernels(Protocol):
    """The two operations on a block's rows, as a module has them: this one in torch, ``triton_kernels`` in Triton."""

    def row_stats(self, logits_nV: Tensor, ref_logits_nV: Tensor, labels_n: Tensor, with_kl: bool = True) -> RowStats:
        """See :func:`row_stats`."""

    def direction_(
        self,
        logits_nV: Tensor,
        ref_logits_nV: Tensor | None,
        labels_n: Tensor,
        stats: RowStats,
        logp_weight: Tensor,
        kl_weight: Tensor,
    ) -> Tensor:
        """See :func:`direction_`."""


def row_stats(logits_nV: Tensor, ref_logits_nV: Tensor, labels_n: Tensor, with_kl: bool = True) -> RowStats:
    """Statistics of a block of rows; the logits are left as they are. Without ``with_kl`` the KL says 0."""
    columns = torch.zeros(5, logits_nV.shape[0], dtype=logits_nV.dtype, device=logits_nV.device)
    for rows in blocks(logits_nV):
        z, ref_z, index = logits_nV[rows], ref_logits_nV[rows], labels_n[rows, None]
        log_z, ref_log_z = z.logsumexp(-1), ref_z.logsumexp(-1)
        columns[0, rows] = z.gather(1, index)[:, 0] - log_z
        columns[1, rows] = ref_z.gather(1, index)[:, 0] - ref_log_z
        if with_kl:
            columns[2, rows] = _kl(z, ref_z, log_z, ref_log_z)
        columns[3, rows], columns[4, rows] = log_z, ref_log_z
    return RowStats(*columns)


def direction_(
    logits_nV: Tensor,
    ref_logits_nV: Tensor | None,
    labels_n: Tensor,
    stats: RowStats,
    logp_weight: Tensor,
    kl_weight: Tensor,
) -> Tensor:
    """Writes the gradient of ``sum(a * logp + b * kl)`` in the logits over the logits.

    With d logp = onehot - p and d KL(reference || policy) = p - p_ref it is ``a onehot + (b - a) p - b p_ref``.

    Args:
        logits_nV: The policy's logits, overwritten.
        ref_logits_nV: The reference's logits, which may be overwritten; None where every ``b`` is 0.
        labels_n: Labels of the rows.
        stats: Their statistics.
        logp_weight: a, ``[n]``.
        kl_weight: b, ``[n]``.

    Returns:
        ``logits_nV``.
    """
    for rows in blocks(logits_nV):
        a, b = logp_weight[rows, None], kl_weight[rows, None]
        grad = logits_nV[rows].sub_(stats.log_z[rows, None]).exp_().mul_(b - a)
        if ref_logits_nV is not None:
            grad.sub_(ref_logits_nV[rows].sub_(stats.ref_log_z[rows, None]).exp_().mul_(b))
        grad.scatter_add_(1, labels_n[rows, None], a)
    return logits_nV


def blocks(logits_nV: Tensor) -> Iterator[slice]:
    """Row slices of a block that share the cache on a CPU; all rows at once elsewhere."""
    total, vocab = logits_nV.shape
    step = max(1, CACHED_ELEMENTS // vocab) if logits_nV.device.type == "cpu" else total
    return (slice(start, min(start + step, total)) for start in range(0, total, max(step, 1)))


def _kl(z: Tensor, ref_z: Tensor, log_z: Tensor, ref_log_z: Tensor) -> Tensor:
    """KL(reference || policy) of each row by ``expm1``, which is as accurate as the log-ratio it is given.

    Rows where that is not finite (a log-ratio that overflows, or -inf on both sides) are done again by the formula
    that cannot fail.
    """
    ref_logp = ref_z - ref_log_z[:, None]
    u = (z - log_z[:, None]).sub_(ref_logp)
    kl = torch.expm1(u).sub_(u).clamp_(min=0).mul_(ref_logp.exp_()).sum(-1)
    wrong = ~kl.isfinite()
    if wrong.any():
        logp, ref_logp = z[wrong] - log_z[wrong, None], ref_z[wrong] - ref_log_z[wrong, None]
        kl[wrong] = kl_terms(logp, ref_logp).sum(-1)
    return kl
