"""The backends of the operation, their names, and which one runs on given hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from typing_extensions import override

from tdpo.errors import UserError
from tdpo.objectives.base import Objective
from tdpo.ops import chunked, fused, naive, rows
from tdpo.types import Hidden, PairLoss, PairStats, TokenStats

BackendName = Literal["auto", "naive", "chunked", "triton"]


class Backend(Protocol):
    """The two forms of the operation, with the same values and gradients from every backend."""

    def token_stats(
        self, policy: Hidden, reference: Hidden | None, labels_N: Tensor, logits_budget: int | None
    ) -> TokenStats:
        """Computes the statistics of N response tokens, with arbitrary upstream gradients."""

    def pair_loss(
        self, policy: Hidden, reference: Hidden | None, labels_N: Tensor, lengths: Sequence[int], objective: Objective,
        logits_budget: int | None, weights_2N: Tensor | None = None,
    ) -> tuple[Tensor, PairLoss, PairStats, TokenStats]:  # fmt: skip
        """Computes the summed loss of P pairs, which is differentiable, and as constants what it was made of."""


@dataclass(frozen=True)
class Chunked(Backend):
    """The backend with the memory of one block of logits.

    Attributes:
        kernels: Its row operations: :mod:`tdpo.ops.rows` or :mod:`tdpo.ops.triton_kernels`.
    """

    kernels: ModuleType

    @override
    def token_stats(
        self, policy: Hidden, reference: Hidden | None, labels_N: Tensor, logits_budget: int | None
    ) -> TokenStats:
        return chunked.token_stats(policy, reference, labels_N, logits_budget, self.kernels)

    @override
    def pair_loss(
        self, policy: Hidden, reference: Hidden | None, labels_N: Tensor, lengths: Sequence[int], objective: Objective,
        logits_budget: int | None, weights_2N: Tensor | None = None,
    ) -> tuple[Tensor, PairLoss, PairStats, TokenStats]:  # fmt: skip
        ratios = fused.kl_ratios(objective)
        if ratios is None:
            tokens = self.token_stats(policy, reference, labels_N, logits_budget)
            return naive.loss_of_tokens(tokens, lengths, objective, weights_2N)
        return fused.pair_loss(
            policy, reference, labels_N, lengths, objective, ratios, logits_budget, weights_2N, self.kernels
        )


def choose_backend(name: BackendName, states_ND: Tensor) -> Backend:
    """Returns the backend of that name; ``auto`` is triton for CUDA tensors where it runs, and chunked elsewhere.

    Raises:
        UserError: for an unknown backend, and for ``triton`` where it cannot run, with the reason.
    """
    if name not in get_args(BackendName):
        raise UserError(f"unknown backend {name!r}; there are: {', '.join(get_args(BackendName))}")
    if name == "naive":
        return naive
    if name == "triton" or (name == "auto" and states_ND.is_cuda):
        refusal = triton_refusal(states_ND)
        if not refusal:
            from tdpo.ops import triton_kernels

            return Chunked(triton_kernels)
        if name == "triton":
            raise UserError(f"backend triton: {refusal}")
    return Chunked(rows)


def triton_refusal(states_ND: Tensor) -> str:
    """Returns why the Triton kernels cannot run on hidden states of that device and dtype; empty if they can."""
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
