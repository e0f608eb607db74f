"""The row operations of :mod:`tdpo.ops.rows` as Triton kernels, each of them one launch.

One program a row, which walks the vocabulary in blocks. The statistics take the log-partition values of both models
in one pass and the KL in a second, which also writes the direction of a loss's gradient where that is wanted; the
gradient for arbitrary weights is written in one pass. Launch shapes are chosen here and never tuned by
trial, so ``TRITON_INTERPRET=1``, set before anything imports triton, runs the same kernels on CPU tensors.

Logits are float32. Float64 is refused (:func:`tdpo.ops.backends.triton_refusal` says so before a kernel is reached):
the other backends take it. Labels outside of the vocabulary read nothing and make their row's log-probabilities NaN.

Shapes: n rows of one block of logits, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

MAX_BLOCK = 8192
"""Logits of one model that a program holds at a time."""

MAX_WARPS = 16
"""Warps of a program at that size: 16 logits a thread."""

INTERPRETED = not isinstance(tl.max, JITFunction)
"""Whether triton was imported under ``TRITON_INTERPRET=1``; later is too late for it."""

SERIES_BELOW = tl.constexpr(0.25)
"""Below this |log-ratio| the KL term is its series, which six terms carry to float32 accuracy even there.

Where it ends, the closed form has lost a factor of 32 to cancellation. Ending at 0.01, as
:func:`tdpo.ops.numerics.kl_terms` does, it would have lost 20,000, and float32 has 16 million.
"""


def row_stats_(
    logits_nV: Tensor,
    ref_logits_nV: Tensor,
    labels_n: Tensor,
    kl_ratio_n: Tensor | None = None,
    kl_alone_n: Tensor | None = None,
) -> Tensor:
    """Computes :func:`tdpo.ops.rows.row_stats_` for float32 logits, in one kernel."""
    total, vocab = _checked(logits_nV, ref_logits_nV)
    stats_5n = torch.empty(5, total, dtype=torch.float32, device=logits_nV.device)
    block, warps = launch_shape(vocab)
    ratios = stats_5n if kl_ratio_n is None else kl_ratio_n.to(torch.float32).contiguous()
    alone = stats_5n if kl_alone_n is None else kl_alone_n.to(torch.float32)
    with torch.cuda.device_of(logits_nV):
        _stats_kernel[(total,)](
            logits_nV, ref_logits_nV, labels_n.contiguous(), ratios, alone, stats_5n, total, vocab,
            logits_nV.stride(0), ref_logits_nV.stride(0), WITH_DIRECTION=kl_ratio_n is not None,
            WITH_KL_ALONE=kl_alone_n is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return stats_5n


def direction_(
    logits_nV: Tensor,
    ref_logits_nV: Tensor | None,
    labels_n: Tensor,
    stats_5n: Tensor,
    logp_weight_n: Tensor,
    kl_weight_n: Tensor,
) -> Tensor:
    """Computes :func:`tdpo.ops.rows.direction_` for float32 logits, in one kernel."""
    with_reference = ref_logits_nV is not None
    ref_logits_nV = logits_nV if ref_logits_nV is None else ref_logits_nV
    total, vocab = _checked(logits_nV, ref_logits_nV)
    block, warps = launch_shape(vocab)
    per_row = (labels_n, stats_5n[3], stats_5n[4], logp_weight_n, kl_weight_n)
    with torch.cuda.device_of(logits_nV):
        _direction_kernel[(total,)](
            logits_nV, ref_logits_nV, *(column.contiguous() for column in per_row), vocab,
            logits_nV.stride(0), ref_logits_nV.stride(0), WITH_REFERENCE=with_reference, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return logits_nV


def launch_shape(vocab: int) -> tuple[int, int]:
    """Returns block size and number of warps for rows of ``vocab`` logits.

    Examples:
        >>> launch_shape(1000), launch_shape(150_000)
        ((1024, 2), (8192, 16))
    """
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
    return block, max(1, min(MAX_WARPS, block // 512))


def _checked(logits_nV: Tensor, ref_logits_nV: Tensor) -> tuple[int, int]:
    """Returns the blocks' shape.

    Raises:
        ValueError: for logits that the kernels would read wrongly.
    """
    for logits in (logits_nV, ref_logits_nV):
        if logits.dtype != torch.float32 or not logits[:1].is_contiguous() or logits.shape != logits_nV.shape:
            raise ValueError(
                f"the Triton kernels take two float32 blocks [n, V] with contiguous rows, not {logits.dtype} "
                f"{list(logits.shape)} with strides {logits.stride()}"
            )
    return logits_nV.shape[0], logits_nV.shape[1]


# --- kernels: parameters are pointers and sizes, which Triton types itself ------------------------------------------


@triton.jit(do_not_specialize=["total"])
def _stats_kernel(
    logits: tl.tensor,
    ref_logits: tl.tensor,
    labels: tl.tensor,
    ratios: tl.tensor,
    alone: tl.tensor,
    columns: tl.tensor,
    total: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    ref_stride: tl.tensor,
    WITH_DIRECTION: tl.constexpr,
    WITH_KL_ALONE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the statistics of one row into ``columns [5, n]``, in the order of :mod:`tdpo.ops.rows`.

    With the direction, ``w (p - onehot) + c (p_ref - p)`` goes over the policy's logits, c being the row's ratio and w
    0 in rows whose KL alone counts, 1 elsewhere.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    ref_logits += row * ref_stride
    lanes = tl.arange(0, BLOCK)
    peak, mass = -float("inf"), 0.0
    ref_peak, ref_mass = -float("inf"), 0.0
    for start in range(0, vocab, BLOCK):
        inside = start + lanes < vocab
        z = tl.load(logits + start + lanes, mask=inside, other=-float("inf"))
        ref_z = tl.load(ref_logits + start + lanes, mask=inside, other=-float("inf"))
        peak, mass = _more(peak, mass, z)
        ref_peak, ref_mass = _more(ref_peak, ref_mass, ref_z)
    log_z, ref_log_z = peak + tl.log(mass), ref_peak + tl.log(ref_mass)
    label = tl.load(labels + row)
    known = (label >= 0) & (label < vocab)
    tl.store(columns + row, tl.load(logits + label, mask=known, other=float("nan")) - log_z)
    tl.store(columns + total + row, tl.load(ref_logits + label, mask=known, other=float("nan")) - ref_log_z)
    if WITH_DIRECTION:
        tl.debug_barrier()  # the label's logit is read before another thread writes over it
    terms = tl.zeros([BLOCK], dtype=tl.float32)
    ratio = tl.load(ratios + row) if WITH_DIRECTION else 0.0
    weight = 1.0 - tl.load(alone + row) if WITH_KL_ALONE else 1.0
    for start in range(0, vocab, BLOCK):
        word = start + lanes
        inside = word < vocab
        z = tl.load(logits + word, mask=inside, other=0.0)
        ref_z = tl.load(ref_logits + word, mask=inside, other=0.0)
        terms += tl.where(inside, _kl_terms(z, ref_z, log_z, ref_log_z), 0.0)
        if WITH_DIRECTION:
            # The difference first: where both models agree it is exactly 0, fused multiply-adds or not.
            p = tl.exp(z - log_z)
            mixed = weight * p - ratio * (p - tl.exp(ref_z - ref_log_z))
            tl.store(logits + word, mixed - tl.where(word == label, weight, 0.0), mask=inside)
    tl.store(columns + 2 * total + row, tl.sum(terms, 0))
    tl.store(columns + 3 * total + row, log_z)
    tl.store(columns + 4 * total + row, ref_log_z)


@triton.jit
def _more(peak: tl.tensor, mass: tl.tensor, z: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Returns the largest logit so far, and the sum of exp(logit - largest), with one more block."""
    higher = tl.maximum(peak, tl.max(z, 0))
    base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing but -inf so far: -inf - -inf would be NaN
    return higher, mass * tl.exp(peak - base) + tl.sum(tl.exp(z - base), 0)


@triton.jit
def _kl_terms(z: tl.tensor, ref_z: tl.tensor, log_z: tl.tensor, ref_log_z: tl.tensor) -> tl.tensor:
    """Computes p_ref (exp(u) - 1 - u) with u = log p - log p_ref, see :func:`tdpo.ops.numerics.kl_terms`.

    The logits are subtracted before the log-partition values are, so that logits close to each other lose no digits.
    Where the reference has no mass, as at -inf on both sides, u may be inf - inf, and the term is p alone.
    """
    p, p_ref = tl.exp(z - log_z), tl.exp(ref_z - ref_log_z)
    mass = p_ref > 0.0
    u = tl.where(mass, (z - ref_z) - (log_z - ref_log_z), 0.0)
    small = tl.abs(u) < SERIES_BELOW
    v = tl.where(small, u, 0.0)
    tail = 1 / 24 + v * (1 / 120 + v * (1 / 720 + v * (1 / 5040)))
    series = p_ref * (v * v) * (0.5 + v * (1 / 6 + v * tail))
    return tl.where(mass & small, series, p - p_ref - p_ref * u)


@triton.jit
def _direction_kernel(
    logits: tl.tensor,
    ref_logits: tl.tensor,
    labels: tl.tensor,
    log_zs: tl.tensor,
    ref_log_zs: tl.tensor,
    logp_weights: tl.tensor,
    kl_weights: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    ref_stride: tl.tensor,
    WITH_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes ``a (onehot - p) + b (p - p_ref)`` over one row of logits; without reference ``a onehot + (b - a) p``."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    ref_logits += row * ref_stride
    label, log_z, ref_log_z = tl.load(labels + row), tl.load(log_zs + row), tl.load(ref_log_zs + row)
    a, b = tl.load(logp_weights + row), tl.load(kl_weights + row)
    for start in range(0, vocab, BLOCK):
        word = start + tl.arange(0, BLOCK)
        inside = word < vocab
        p = tl.exp(tl.load(logits + word, mask=inside, other=0.0) - log_z)
        if WITH_REFERENCE:
            # The difference first: where both models agree it is exactly 0, fused multiply-adds or not.
            p_ref = tl.exp(tl.load(ref_logits + word, mask=inside, other=0.0) - ref_log_z)
            grad = b * (p - p_ref) - a * p
        else:
            grad = (b - a) * p
        tl.store(logits + word, grad + tl.where(word == label, a, 0.0), mask=inside)
