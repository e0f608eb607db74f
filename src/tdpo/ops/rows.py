"""What happens to a block of logits between the matrix products: statistics, and the loss gradient written over them.

Everything here runs without autograd and in the statistics dtype. A few rows are taken at a time, so that every pass
after the first finds them in a CPU's cache, and the passes are few: one subtraction, two softmaxes, one dot product.

Shapes: n rows of one block, V vocabulary, B rows taken at a time. Entries that are absent on both sides (-inf, or the
finite filling of :mod:`tdpo.ops.workspace`) change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tdpo.ops.numerics import kl_terms

ELEMENTS_AT_A_TIME = {"cpu": 2**19, "cuda": 2**23}
"""Logits of one model taken at a time: what a CPU's cache holds beside the scratch space, or a GPU's idle memory."""

SCRATCH = 4
"""Further blocks of that size alive meanwhile."""

IDENTITY_ABOVE = 2.0**-6
"""KL, relative to the shift between the two log-partition values, above which float32 keeps five of its digits."""


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
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat(columns) for columns in zip(*(part.columns() for part in parts), strict=True)))


class RowKernels(Protocol):
    """The operations on a block's rows, as a module has them: this one in torch, ``triton_kernels`` in Triton."""

    def row_stats(self, logits_nV: Tensor, ref_logits_nV: Tensor, labels_n: Tensor, with_kl: bool = True) -> RowStats:
        """See :func:`row_stats`."""

    def stats_and_direction_(
        self, logits_nV: Tensor, ref_logits_nV: Tensor, labels_n: Tensor, kl_ratio: Tensor, with_kl: bool = True
    ) -> RowStats:
        """See :func:`stats_and_direction_`."""

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
    scratch = _Scratch(logits_nV)
    for rows in blocks(logits_nV):
        _stats(logits_nV[rows], ref_logits_nV[rows], labels_n[rows], with_kl, scratch, columns[:, rows])
    return RowStats(*columns)


def stats_and_direction_(
    logits_nV: Tensor, ref_logits_nV: Tensor, labels_n: Tensor, kl_ratio: Tensor, with_kl: bool = True
) -> RowStats:
    """The statistics, and over the policy's logits the direction of a loss's gradient in them, in the same passes.

    The direction is ``(1 - c) p + c p_ref - onehot(label)``: what the gradient of ``-(logp + c kl)`` is, and up to a
    factor that of every objective, with c the ratio of the two weights.

    Args:
        logits_nV: The policy's logits, overwritten.
        ref_logits_nV: The reference's logits.
        labels_n: Labels of the rows.
        kl_ratio: c, ``[n]``.
        with_kl: Without it the KL says 0, and every ``c`` must be 0.
    """
    columns = torch.zeros(5, logits_nV.shape[0], dtype=logits_nV.dtype, device=logits_nV.device)
    scratch = _Scratch(logits_nV)
    for rows in blocks(logits_nV):
        z, ref_z, labels = logits_nV[rows], ref_logits_nV[rows], labels_n[rows]
        p, ref_p = _stats(z, ref_z, labels, with_kl, scratch, columns[:, rows])
        if with_kl:
            torch.lerp(p, ref_p, kl_ratio[rows, None], out=z)
        else:
            z.copy_(p)
        z.scatter_add_(1, labels[:, None], z.new_full((len(labels), 1), -1.0))
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
        ref_logits_nV: The reference's logits; None where every ``b`` is 0.
        labels_n: Labels of the rows.
        stats: Their statistics, for kernels that take exp(logit - log_z); torch's softmax is faster than that.
        logp_weight: a, ``[n]``.
        kl_weight: b, ``[n]``.

    Returns:
        ``logits_nV``.
    """
    scratch = _Scratch(logits_nV)
    for rows in blocks(logits_nV):
        z, a, b = logits_nV[rows], logp_weight[rows, None], kl_weight[rows, None]
        p = scratch.softmax(z, 0)
        torch.mul(p, b - a, out=z)
        if ref_logits_nV is not None:
            z.sub_(scratch.softmax(ref_logits_nV[rows], 1).mul_(b))
        z.scatter_add_(1, labels_n[rows, None], a.to(z.dtype))
    return logits_nV


def blocks(logits_nV: Tensor) -> Iterator[slice]:
    """Row slices of a block, each as long as is taken at a time; on a CPU a multiple of its threads."""
    total = logits_nV.shape[0]
    step = rows_at_a_time(logits_nV)
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def rows_at_a_time(logits_nV: Tensor) -> int:
    """B, rows of such logits that are taken at a time."""
    device, vocab = logits_nV.device.type, logits_nV.shape[1]
    rows = max(1, ELEMENTS_AT_A_TIME.get(device, 2**23) // max(vocab, 1))
    threads = torch.get_num_threads() if device == "cpu" else 1
    return max(rows - rows % threads, 1)


class _Scratch:
    """Blocks ``[B, V]`` that every step of a loop writes over."""

    def __init__(self, logits_nV: Tensor) -> None:
        rows = min(rows_at_a_time(logits_nV), logits_nV.shape[0])
        self.buffers = [logits_nV.new_empty(0)] * SCRATCH
        self.shape = rows, logits_nV.shape[1]

    def __call__(self, rows: int, number: int) -> Tensor:
        """One of the blocks, as long as wanted; made when first asked for."""
        if not self.buffers[number].numel():
            self.buffers[number] = self.buffers[number].new_empty(self.shape)
        return self.buffers[number][:rows]

    def softmax(self, logits_BV: Tensor, number: int) -> Tensor:
        """Probabilities of some rows in one of the blocks."""
        return torch.softmax(logits_BV, -1, out=self(len(logits_BV), number))


def _stats(
    z_BV: Tensor, ref_z_BV: Tensor, labels_B: Tensor, with_kl: bool, scratch: _Scratch, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills ``columns [5, B]`` and gives the probabilities of both models, in scratch space."""
    index = labels_B[:, None]
    p, ref_p = scratch.softmax(z_BV, 0), scratch.softmax(ref_z_BV, 1)
    # The largest probability is exactly one over the sum of exp(logit - largest logit).
    log_z = z_BV.amax(-1) - p.amax(-1).log()
    ref_log_z = ref_z_BV.amax(-1) - ref_p.amax(-1).log()
    columns[0] = z_BV.gather(1, index)[:, 0] - log_z
    columns[1] = ref_z_BV.gather(1, index)[:, 0] - ref_log_z
    if with_kl:
        columns[2] = _kl(z_BV, ref_z_BV, log_z, ref_log_z, ref_p, scratch)
    columns[3], columns[4] = log_z, ref_log_z
    return p, ref_p


def _kl(
    z_BV: Tensor, ref_z_BV: Tensor, log_z: Tensor, ref_log_z: Tensor, ref_p_BV: Tensor, scratch: _Scratch
) -> Tensor:
    """KL(reference || policy) of each row.

    With d = z - z_ref it is ``log_z - ref_log_z - sum p_ref d``, one dot product, whose rounding is that of its parts.
    Where the KL is too small beside them for that, it is ``sum p_ref (expm1(u) - u)`` with the log-ratio u, which is as
    accurate as u. Rows where that is not finite (a log-ratio that overflows, or -inf on both sides) are done again by
    the formula that cannot fail.
    """
    difference = torch.sub(z_BV, ref_z_BV, out=scratch(len(z_BV), 2))
    shift = log_z - ref_log_z
    kl = shift - torch.linalg.vecdot(ref_p_BV, difference)
    if (kl > IDENTITY_ABOVE * shift.abs().clamp(min=1)).all() and kl.isfinite().all():
        return kl
    log_ratio = difference.sub_(shift[:, None])
    terms = torch.expm1(log_ratio, out=scratch(len(z_BV), 3)).sub_(log_ratio).clamp_(min=0)
    kl = torch.linalg.vecdot(ref_p_BV, terms)
    wrong = ~kl.isfinite()
    if wrong.any():
        logp, ref_logp = z_BV[wrong] - log_z[wrong, None], ref_z_BV[wrong] - ref_log_z[wrong, None]
        kl[wrong] = kl_terms(logp, ref_logp).sum(-1)
    return kl
