"""The names of the backends, and what each of them runs on a block of logits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tdpo.errors import UserError
from tdpo.ops import rows
from tdpo.ops.rows import RowKernels

Backend = Literal["auto", "naive", "chunked", "triton"]


def row_kernels(backend: Backend, states_ND: Tensor) -> RowKernels:
    """The row operations of a backend for hidden states of that device and dtype.

    ``chunked`` has torch's, ``triton`` its own kernels; ``auto`` takes the latter for CUDA tensors where they run.

    Raises:
        UserError: for an unknown backend, and for ``triton`` where it cannot run, with the reason.
        ValueError: for ``naive``, which knows no blocks of rows.
    """
    if backend not in get_args(Backend):
        raise UserError(f"unknown backend {backend!r}; there are: {', '.join(get_args(Backend))}")
    if backend == "naive":
        raise ValueError("the naive backend has no fused form: take response_stats, and the objective of its sums")
    if backend == "chunked" or (backend == "auto" and not states_ND.is_cuda):
        return rows
    refusal = triton_refusal(states_ND)
    if refusal and backend == "triton":
        raise UserError(f"backend triton: {refusal}")
    if refusal:
        return rows
    from tdpo.ops import triton_kernels

    return triton_kernels


def triton_refusal(states_ND: Tensor) -> str:
    """Why the Triton kernels cannot run on hidden states of that device and dtype, in words; empty if they can."""
    if states_ND.dtype == torch.float64:
        return "its kernels compute in float32, and these hidden states are float64; take chunked or naive"
    try:
        from tdpo.ops import triton_kernels
    except ImportError as error:
        return f"triton cannot be imported ({error}); on Linux: pip install triton"
    if states_ND.is_cuda or (states_ND.device.type == "cpu" and triton_kernels.INTERPRETED):
        return ""
    return (
        f"it needs CUDA tensors, and these are on {states_ND.device.type}; its kernels run on a CPU only where "
        "TRITON_INTERPRET=1 was set before triton was first imported, for tests"
    )
