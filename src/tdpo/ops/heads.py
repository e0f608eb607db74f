"""The head between hidden states and logits, outside of autograd: blocks of logits, and gradients carried back.

Shapes: N response tokens, n rows of one block, D hidden width, V vocabulary, V' the padded length of a logits row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdpo.ops.numerics import statistics_dtype
from tdpo.ops.workspace import ABSENT, padded_vocab
from tdpo.types import Head


def detached(head: Head) -> Head:
    """The head as a constant."""
    return Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.soft_cap)


def prepared(head: Head, dtype: torch.dtype) -> Head:
    """The head with its weight cast once to the dtype of the logits; on a GPU half precision stays, products widen it.

    Args:
        head: The head.
        dtype: Statistics dtype of the policy.
    """
    weight = head.weight
    widens = weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16)
    return Head(weight if widens else weight.to(dtype), head.bias, head.scale, head.soft_cap)


def buffers_of(head: Head) -> int:
    """Buffers of logits alive at once: the policy's, the reference's, and the slope of a soft cap."""
    return 2 if head.soft_cap is None else 3


def chunk_rows(head: Head, dtype: torch.dtype, budget: int) -> int:
    """Rows of logits whose buffers fit ``budget`` bytes together, at least one."""
    return max(1, budget // (padded_vocab(head.vocab_size, dtype) * dtype.itemsize * buffers_of(head)))


def write_logits(states_nD: Tensor, head: Head, buffer_nW: Tensor) -> Tensor:
    """Writes the logits of a block of rows into a buffer of :mod:`tdpo.ops.workspace` and gives its first n rows.

    Never rounded to half precision: bfloat16 logits put the KL off by 170% at 5e-5 nats.

    Args:
        states_nD: Hidden states of the rows.
        head: The head, :func:`prepared`.
        buffer_nW: At least n rows of V' logits.
    """
    buffer = buffer_nW[: states_nD.shape[0]]
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


def cap_slope(buffer_nW: Tensor, head: Head, spare: Sequence[Tensor]) -> Tensor | None:
    """Derivative ``[n, V]`` of the soft cap at its own output, 1 - (logits / cap)^2; None without a cap.

    Args:
        buffer_nW: The logits.
        head: Their head.
        spare: One more buffer for the derivative, where there is a cap.
    """
    if head.soft_cap is None:
        return None
    n, vocab = buffer_nW.shape[0], head.vocab_size
    out = spare[0][:n, :vocab]
    return torch.div(buffer_nW[:, :vocab], head.soft_cap, out=out).square_().neg_().add_(1)


def raw_gradient_(buffer_nW: Tensor, slope_nV: Tensor | None, head: Head) -> Tensor:
    """From the gradient in the logits to that in the head's raw output ``[n, V]``, in place: soft-cap and scale."""
    grad_nV = buffer_nW[:, : head.vocab_size]
    if slope_nV is not None:
        grad_nV.mul_(slope_nV)
    return grad_nV if head.scale == 1.0 else grad_nV.mul_(head.scale)


class HeadGradient:
    """Gradients in hidden states, weight and bias, added up block by block in the statistics dtype.

    Args:
        states_ND: The policy's hidden states.
        weight_VD: Its head's weight.
        bias_V: Its head's bias, or None.
        needs: Which of the three are wanted.
    """

    def __init__(
        self, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> None:
        self.wide = statistics_dtype(states_ND.dtype)
        self.source = states_ND
        self.dtypes = states_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        self.states = torch.zeros_like(states_ND, dtype=self.wide) if needs[0] else None
        self.weight = torch.empty_like(weight_VD, dtype=self.wide) if needs[1] else None
        self.bias = torch.zeros_like(bias_V, dtype=self.wide) if bias_V is not None and needs[2] else None
        self._weight_is_empty = True

    @property
    def wanted(self) -> bool:
        """Whether any of the three is."""
        return not (self.states is None and self.weight is None and self.bias is None)

    @property
    def of_head(self) -> bool:
        """Whether the head's is, which has to be added up with every row at its final size."""
        return not (self.weight is None and self.bias is None)

    def add(self, rows: slice, grad_nV: Tensor, head: Head, factor_n: Tensor | None = None) -> None:
        """Carries the gradient of a block's logits back: two matrix products at most.

        Args:
            rows: The block's rows among all N.
            grad_nV: Gradient in the head's raw output, after scale and soft-cap.
            head: The head, prepared.
            factor_n: Multiplies each row's gradient; cheaper here, where rows are D wide, than on the logits.
        """
        if self.states is not None:
            torch.mm(grad_nV, head.weight.to(self.wide), out=self.states[rows])
        if self.weight is not None:
            source = self.source[rows].to(self.wide)
            source = source if factor_n is None else source * factor_n[:, None]
            self.weight.addmm_(grad_nV.t(), source, beta=0 if self._weight_is_empty else 1)
            self._weight_is_empty = False
        if self.bias is not None:
            self.bias += grad_nV.sum(0) if factor_n is None else grad_nV.t() @ factor_n
        if factor_n is not None:
            self.scale_states(rows, factor_n)

    def scale_states(self, rows: slice, factor_n: Tensor) -> None:
        """Multiplies the gradient of some hidden states, row by row."""
        if self.states is not None:
            self.states[rows].mul_(factor_n[:, None])

    def scaled(self, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients times a scalar, in the dtypes of what they are gradients of; they are spent by it."""
        # On a CPU a look costs nothing, and spares a pass over the head's gradient.
        if self.weight is not None and self._weight_is_empty:
            self.weight.zero_()
        factor = None if factor is None or (factor.device.type == "cpu" and factor == 1) else factor
        gradients = []
        for gradient, dtype in zip((self.states, self.weight, self.bias), self.dtypes, strict=True):
            if gradient is not None and factor is not None:
                gradient.mul_(factor)
            gradients.append(None if gradient is None else gradient.to(dtype))
        return gradients[0], gradients[1], gradients[2]
