"""The head between hidden states and logits, outside of autograd: blocks of logits, and gradients carried back.

Shapes: N response tokens, n rows of one block, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdpo.ops.numerics import head_logits, statistics_dtype
from tdpo.types import Head


def detached(head: Head) -> Head:
    """The head as a constant."""
    return Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.soft_cap)


def widened(head: Head) -> Head:
    """The head with a half-precision weight widened once, on a CPU; see :func:`widen`."""
    return Head(widen(head.weight), head.bias, head.scale, head.soft_cap)


def widen(tensor: Tensor) -> Tensor:
    """Half precision in the statistics dtype on a CPU; on a GPU the product itself accumulates wide."""
    return tensor if tensor.is_cuda else tensor.to(statistics_dtype(tensor.dtype))


def block_logits(states_nD: Tensor, head: Head) -> Tensor:
    """Logits ``[n, V]`` of a block of rows in the statistics dtype."""
    return head_logits(widen(states_nD), head)


def cap_slope(logits_nV: Tensor, head: Head) -> Tensor | None:
    """Derivative of the soft cap at its own output, 1 - (logits / cap)^2; None without a cap."""
    return None if head.soft_cap is None else 1 - (logits_nV / head.soft_cap) ** 2


def raw_gradient_(grad_nV: Tensor, slope_nV: Tensor | None, head: Head) -> Tensor:
    """From the gradient in the logits to that in the head's raw output, in place: through soft-cap and scale."""
    if slope_nV is not None:
        grad_nV.mul_(slope_nV)
    return grad_nV if head.scale == 1.0 else grad_nV.mul_(head.scale)


class HeadGradient:
    """Gradients in hidden states, weight and bias, added up block by block; weight and bias in the statistics dtype.

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
        self.states = torch.empty_like(states_ND) if needs[0] else None
        self.weight = torch.zeros_like(weight_VD, dtype=self.wide) if needs[1] else None
        self.bias = torch.zeros_like(bias_V, dtype=self.wide) if bias_V is not None and needs[2] else None

    def add(self, rows: slice, grad_nV: Tensor, head: Head) -> None:
        """Carries the gradient of a block's logits back: two matrix products at most.

        Args:
            rows: The block's rows among all N.
            grad_nV: Gradient in the head's raw output, after scale and soft-cap.
            head: The head, widened.
        """
        if self.states is not None:
            self.states[rows] = (grad_nV @ head.weight.to(self.wide)).to(self.states.dtype)
        if self.weight is not None:
            self.weight.addmm_(grad_nV.t(), self.source[rows].to(self.wide))
        if self.bias is not None:
            self.bias += grad_nV.sum(0)

    def scaled(self, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients times a scalar, in the dtypes of what they are gradients of; they are spent by it."""
        gradients = []
        for gradient, dtype in zip((self.states, self.weight, self.bias), self.dtypes, strict=True):
            if gradient is not None and factor is not None:
                gradient.mul_(factor)
            gradients.append(None if gradient is None else gradient.to(dtype))
        return gradients[0], gradients[1], gradients[2]
