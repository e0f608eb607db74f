"""Row operations on a block of logits, between the matrix products: statistics, and gradients written over the logits.

Everything here runs without autograd and in the statistics dtype. A few rows are taken at a time, so that every pass
after the first finds them in a CPU's cache, and the passes are few: one subtraction, two softmaxes, one dot product.

Statistics of n rows are one tensor ``[5, n]``: log pi and log pi_ref of the label, KL(reference || policy), and the
log-partition values of policy and reference, in nats.

Shapes: n rows of one block, V vocabulary, B rows taken at a time. Entries that are absent on both sides (-inf, or the
finite filling :data:`tdpo.ops.heads.ABSENT`) change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdpo.ops.numerics import kl_terms

ELEMENTS_AT_A_TIME = {"cpu": 2**19, "cuda": 2**23}
"""Logits of one model taken at a time: what a CPU's cache holds beside the scratch space, or a GPU's idle memory."""

SCRATCH = 4
"""Further blocks of that size alive meanwhile."""

IDENTITY_ABOVE = 2.0**-6
"""KL, relative to the shift between the two log-partition values, above which float32 keeps five of its digits."""


def row_stats_(
    logits_nV: Tensor,
    ref_logits_nV: Tensor,
    labels_n: Tensor,
    kl_ratio_n: Tensor | None = None,
    kl_alone_n: Tensor | None = None,
) -> Tensor:
    """Computes statistics ``[5, n]`` of a block and, with ``kl_ratio_n``, a gradient's direction in the same passes.

    The direction is ``(1 - c) p + c p_ref - onehot(label)``, the gradient of ``-(logp + c kl)`` in the logits: up to a
    factor that of every objective, with c the ratio of its weights on KL and log-probability. Rows without a weight
    on the log-probability get ``c (p_ref - p)``, the gradient of ``-c kl``.

    Args:
        logits_nV: The policy's logits; overwritten with the direction where ``kl_ratio_n`` is given.
        ref_logits_nV: The reference's logits.
        labels_n: Labels of the rows.
        kl_ratio_n: c of each row; None for the statistics alone.
        kl_alone_n: bool, the rows whose log-probability has no weight; None for no row.
    """
    stats_5n = logits_nV.new_empty(5, len(logits_nV))
    for rows, (p_buffer, ref_p_buffer, difference, terms) in _blocks(logits_nV, SCRATCH):
        z, ref_z, index = logits_nV[rows], ref_logits_nV[rows], labels_n[rows, None]
        p, ref_p = torch.softmax(z, -1, out=p_buffer), torch.softmax(ref_z, -1, out=ref_p_buffer)
        # The largest probability is exactly one over the sum of exp(logit - largest logit).
        log_z, ref_log_z = (side.amax(-1) - q.amax(-1).log() for side, q in ((z, p), (ref_z, ref_p)))
        logp, ref_logp = z.gather(1, index)[:, 0] - log_z, ref_z.gather(1, index)[:, 0] - ref_log_z
        kl = _kl(z, ref_z, log_z, ref_log_z, ref_p, difference, terms)
        torch.stack((logp, ref_logp, kl, log_z, ref_log_z), out=stats_5n[:, rows])
        if kl_ratio_n is not None:
            torch.lerp(p, ref_p, kl_ratio_n[rows, None], out=z)
            z.scatter_add_(1, index, z.new_full(index.shape, -1.0))
            if kl_alone_n is not None:
                alone = torch.sub(ref_p, p, out=p).mul_(kl_ratio_n[rows, None])
                torch.where(kl_alone_n[rows, None], alone, z, out=z)
    return stats_5n


def direction_(
    logits_nV: Tensor,
    ref_logits_nV: Tensor | None,
    labels_n: Tensor,
    stats_5n: Tensor,
    logp_weight_n: Tensor,
    kl_weight_n: Tensor,
) -> Tensor:
    """Writes the gradient of ``sum(a * logp + b * kl)`` in the logits over the logits, and returns them.

    With d logp = onehot - p and d KL(reference || policy) = p - p_ref it is ``a onehot + (b - a) p - b p_ref``.

    Args:
        logits_nV: The policy's logits, overwritten.
        ref_logits_nV: The reference's logits; None where every ``b`` is 0.
        labels_n: Labels of the rows.
        stats_5n: Their statistics, for kernels that take exp(logit - log_z); torch's softmax is faster than that.
        logp_weight_n: a.
        kl_weight_n: b.
    """
    for rows, (p_buffer, ref_p_buffer) in _blocks(logits_nV, 2):
        z, a, b = logits_nV[rows], logp_weight_n[rows, None], kl_weight_n[rows, None]
        torch.mul(torch.softmax(z, -1, out=p_buffer), b - a, out=z)
        if ref_logits_nV is not None:
            z.sub_(torch.softmax(ref_logits_nV[rows], -1, out=ref_p_buffer).mul_(b))
        z.scatter_add_(1, labels_n[rows, None], a.to(z.dtype))
    return logits_nV


def _blocks(logits_nV: Tensor, scratch: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yields a few rows at a time, on a CPU a multiple of its threads, with that many scratch blocks ``[B, V]``."""
    total, vocab = logits_nV.shape
    device = logits_nV.device.type
    step = max(1, ELEMENTS_AT_A_TIME.get(device, 2**23) // max(vocab, 1))
    threads = torch.get_num_threads() if device == "cpu" else 1
    step = max(step - step % threads, 1)
    buffers = [logits_nV.new_empty(min(step, total), vocab) for _ in range(scratch)]
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield slice(start, stop), [buffer[: stop - start] for buffer in buffers]


def _kl(
    z_BV: Tensor,
    ref_z_BV: Tensor,
    log_z_B: Tensor,
    ref_log_z_B: Tensor,
    ref_p_BV: Tensor,
    difference_BV: Tensor,
    terms_BV: Tensor,
) -> Tensor:
    """Computes KL(reference || policy) of each row, with two scratch blocks.

    With d = z - z_ref it is ``log_z - ref_log_z - sum p_ref d``, one dot product, whose rounding is that of its parts.
    Where the KL is too small beside them for that, it is ``sum p_ref (expm1(u) - u)`` with the log-ratio u, which is as
    accurate as u. Rows where that is not finite (a log-ratio that overflows, or -inf on both sides) are computed again
    by the formula that cannot fail, on accelerators all rows.
    """
    if z_BV.device.type != "cpu":  # the comparisons below would wait for the device
        return kl_terms(z_BV - log_z_B[:, None], ref_z_BV - ref_log_z_B[:, None]).sum(-1)
    torch.sub(z_BV, ref_z_BV, out=difference_BV)
    shift = log_z_B - ref_log_z_B
    kl = shift - torch.linalg.vecdot(ref_p_BV, difference_BV)
    if (kl > IDENTITY_ABOVE * shift.abs().clamp(min=1)).all() and kl.isfinite().all():
        return kl
    log_ratio = difference_BV.sub_(shift[:, None])
    terms = torch.expm1(log_ratio, out=terms_BV).sub_(log_ratio).clamp_(min=0)
    kl = torch.linalg.vecdot(ref_p_BV, terms)
    wrong = ~kl.isfinite()
    if wrong.any():
        logp, ref_logp = z_BV[wrong] - log_z_B[wrong, None], ref_z_BV[wrong] - ref_log_z_B[wrong, None]
        kl[wrong] = kl_terms(logp, ref_logp).sum(-1)
    return kl
