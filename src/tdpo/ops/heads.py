"""The heads of policy and reference over blocks of rows: logits into reused buffers, and gradients carried back.

Shapes: N response tokens, n rows of one block, D hidden width, V vocabulary, W the padded length of a row of logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from tdpo.ops.numerics import statistics_dtype
from tdpo.types import Head, Hidden

CACHE_LINE = 64
"""Bytes; every row of logits begins on one. Products into rows that do not take up to 1.6 times as long."""

HALF_DEVICES = ("cuda", "meta") if Version(torch.__version__) >= Version("2.10") else ()
"""Devices on which heads in half precision multiply in their own dtype, with float32 sums and results.

Before torch 2.10, ``addmm`` with ``out_dtype`` does not add to float32.
"""

ABSENT = -1e30
"""Fills the logits between the vocabulary's end and the row's: no probability, and finite, so that 0 times it is 0."""


def default_logits_budget(device: torch.device) -> int:
    """Returns the bytes that blocks of logits may take.

    On a CPU 256 MiB. On a GPU an eighth of the memory that is free, as a power of two from 64 MiB to 2 GiB; what the
    allocator has cached counts as free. On other accelerators 512 MiB.
    """
    if device.type != "cuda":
        return (256 if device.type == "cpu" else 512) * 2**20
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    share = (torch.cuda.mem_get_info(device)[0] + cached) // 8
    return min(max(2 ** max(share.bit_length() - 1, 0), 64 * 2**20), 2**31)


def padded_vocab(vocab_size: int, dtype: torch.dtype) -> int:
    """Returns W, the number of logits from the beginning of one row to that of the next.

    Examples:
        >>> padded_vocab(50_277, torch.float32), padded_vocab(50_277, torch.float64)
        (50288, 50280)
    """
    step = CACHE_LINE // dtype.itemsize
    return -(-vocab_size // step) * step


def chunk_rows(head: Head, dtype: torch.dtype, budget: int) -> int:
    """Returns how many rows of logits fit ``budget`` bytes, at least one.

    Logits of both models are alive at once, and the slope of the soft cap where there is one.
    """
    buffers = 2 if head.soft_cap is None else 3
    return max(1, budget // (padded_vocab(head.vocab_size, dtype) * dtype.itemsize * buffers))


class BlockwiseHeads:
    """Computes logits of both models for a block of rows at a time, and adds up gradients of the policy's side.

    Args:
        policy: Hidden states ``[N, D]`` and head of the policy.
        reference: The same of the reference, which gets no gradient; None for an objective without one, where the
            policy's own logits stand in.
        logits_budget: Bytes the blocks of logits may take; None for the device's default.
        needs: Whether the gradients in the policy's states, weight and bias are wanted.
    """

    def __init__(
        self,
        policy: Hidden,
        reference: Hidden | None,
        logits_budget: int | None,
        needs: tuple[bool, ...] = (False, False, False),
    ) -> None:
        states_ND, head = policy.states, policy.head
        self.wide = statistics_dtype(states_ND.dtype)
        self.policy = _widened(policy, self.wide)
        self.reference = None if reference is None else _widened(reference, self.wide)
        budget = default_logits_budget(states_ND.device) if logits_budget is None else logits_budget
        self.block_rows = min(chunk_rows(head, self.wide, budget), states_ND.shape[0])
        width = padded_vocab(head.vocab_size, self.wide)
        # In half precision the gradient of the logits is rounded into the memory of the reference's logits.
        self._half = self.policy.head.weight.dtype != self.wide
        self._logits, self._ref_logits, self._slope = (
            states_ND.new_empty(self.block_rows if used else 0, width, dtype=self.wide)
            for used in (True, reference is not None or self._half, head.soft_cap is not None)
        )
        wants_states, wants_weight, wants_bias = needs
        self.grad_states = torch.zeros_like(states_ND, dtype=self.wide) if wants_states else None
        self.grad_weight = torch.empty_like(head.weight, dtype=self.wide) if wants_weight else None
        self.grad_bias = torch.zeros_like(head.bias, dtype=self.wide) if head.bias is not None and wants_bias else None
        self.trains_head = self.grad_weight is not None or self.grad_bias is not None
        self.trains = self.trains_head or self.grad_states is not None
        self._beta = 0  # of the weight's gradient: 0 while it is uninitialised, 1 afterwards

    def blocks(self) -> list[slice]:
        """Returns the N rows in blocks that fit the budget."""
        total = self.policy.states.shape[0]
        return [slice(start, min(start + self.block_rows, total)) for start in range(0, total, self.block_rows or 1)]

    def logits(self, rows: slice) -> Tensor:
        """Returns the policy's logits ``[n, W]`` of a block, valid until the next call."""
        logits_nW, cap = _write_logits(self.policy, rows, self._logits), self.policy.head.soft_cap
        if cap is not None:  # d cap(z) / dz = 1 - (logits / cap)^2, taken before a direction replaces the logits
            torch.div(logits_nW, cap, out=self._slope[: len(logits_nW)]).square_().neg_().add_(1)
        return logits_nW

    def ref_logits(self, rows: slice) -> Tensor:
        """Returns the reference's logits ``[n, W]`` of a block, valid until the next call."""
        if self.reference is None:
            return self._logits[: rows.stop - rows.start]
        return _write_logits(self.reference, rows, self._ref_logits)

    def add_gradients(self, rows: slice, factor_n: Tensor | None = None) -> None:
        """Adds the gradients that follow from the gradient in a block's logits: two matrix products at most.

        A head in half precision on a GPU multiplies in its own dtype, with sums in float32; :meth:`ref_logits` of the
        block are overwritten then.

        Args:
            rows: The block, in whose :meth:`logits` the gradient stands; it is overwritten.
            factor_n: Multiplies each row's gradient; cheaper here, where rows are D wide, than on the logits.
        """
        head, n = self.policy.head, rows.stop - rows.start
        grad_nV = self._logits[:n, : head.vocab_size]
        if head.soft_cap is not None:
            grad_nV.mul_(self._slope[:n, : head.vocab_size])
        if head.scale != 1.0:
            grad_nV.mul_(head.scale)
        if self.grad_bias is not None:
            self.grad_bias += grad_nV.sum(0) if factor_n is None else grad_nV.t() @ factor_n
        # torch takes out_dtype for half precision alone.
        sums: dict[str, Any] = {"out_dtype": self.wide} if self._half else {}
        if self._half:
            grad_nV = self._ref_logits.view(head.weight.dtype)[:n, : head.vocab_size].copy_(grad_nV)
        if self.grad_states is not None:
            grad_nD = self.grad_states[rows]
            torch.mm(grad_nV, head.weight, **sums, out=grad_nD)
            if factor_n is not None:
                grad_nD.mul_(factor_n[:, None])
        if self.grad_weight is not None:
            states_nD = self.policy.states[rows]
            states_nD = (states_nD if factor_n is None else states_nD * factor_n[:, None]).to(grad_nV.dtype)
            total = self.grad_weight
            torch.addmm(total, grad_nV.t(), states_nD, beta=self._beta, **sums, out=total)
            self._beta = 1

    def scale_states(self, rows: slice, factor_n: Tensor) -> None:
        """Multiplies the gradients of a block's states, which :meth:`add_gradients` left unscaled."""
        if self.grad_states is not None:
            self.grad_states[rows].mul_(factor_n[:, None])

    def gradients(self) -> list[Tensor | None]:
        """Returns the gradients in states, weight and bias, in the statistics dtype; None where not wanted."""
        if self.grad_weight is not None and not self._beta:
            self.grad_weight.zero_()
        return [self.grad_states, self.grad_weight, self.grad_bias]


def _widened(hidden: Hidden, wide: torch.dtype) -> Hidden:
    """Casts the weight once; on :data:`HALF_DEVICES` half precision stays, since products widen it."""
    weight = hidden.head.weight.detach()
    if not (weight.device.type in HALF_DEVICES and weight.dtype in (torch.float16, torch.bfloat16)):
        weight = weight.to(wide)
    bias = None if hidden.head.bias is None else hidden.head.bias.detach()
    return Hidden(hidden.states.detach(), replace(hidden.head, weight=weight, bias=bias))


def _write_logits(hidden: Hidden, rows: slice, buffer: Tensor) -> Tensor:
    """Writes the logits of a block of rows into a buffer and returns its first n rows.

    They are never rounded to half precision: bfloat16 logits put the KL off by 170% at 5e-5 nats.
    """
    states_nD, head = hidden.states[rows], hidden.head
    buffer = buffer[: len(states_nD)]
    logits_nV, weight = buffer[:, : head.vocab_size], head.weight
    if weight.dtype != buffer.dtype and weight.dtype == states_nD.dtype:
        torch.mm(states_nD, weight.t(), out_dtype=buffer.dtype, out=logits_nV)
    else:
        torch.mm(states_nD.to(buffer.dtype), weight.to(buffer.dtype).t(), out=logits_nV)
    if head.bias is not None:
        logits_nV.add_(head.bias)
    if head.scale != 1.0:
        logits_nV.mul_(head.scale)
    if head.soft_cap is not None:
        logits_nV.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    buffer[:, head.vocab_size :] = ABSENT
    return buffer
