"""The reference: where its hidden states come from. One strategy so far, a frozen copy."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import nn

from tdpo.errors import UserError
from tdpo.models.hidden import response_hidden
from tdpo.models.policy import head_of
from tdpo.types import Hidden, PackedBatch


class Reference(Protocol):
    """Anything that gives the reference's hidden states of a batch."""

    def hidden(self, batch: PackedBatch) -> Hidden:
        """Hidden states ``[N, D]`` of the batch's response tokens and the head, without gradient."""

    def models(self) -> list[nn.Module]:
        """The models that run a batch for it, so that a layout can be proven on them."""


class FrozenCopy:
    """A second model in evaluation mode whose parameters take no gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def of(cls, policy: nn.Module) -> FrozenCopy:
        """Copies the policy as it is in memory; nothing is reloaded by name."""
        return cls(copy.deepcopy(policy))

    def models(self) -> list[nn.Module]:
        """The frozen model."""
        return [self.model]

    def hidden(self, batch: PackedBatch) -> Hidden:
        """Hidden states ``[N, D]`` of the batch's response tokens and the head, without gradient."""
        with torch.no_grad():
            return response_hidden(self.model, batch)


def check_comparable(policy: nn.Module, reference: nn.Module) -> None:
    """Refuses a reference that KL(reference || policy) would mean nothing against: other vocabulary, shared weights.

    Raises:
        UserError: naming both sizes, or saying what is shared.
    """
    own, others = ({id(parameter) for parameter in model.parameters()} for model in (policy, reference))
    if own & others and policy is not reference:
        raise UserError(
            "policy and reference share weights, so training one moves the other and the KL reads 0: give the "
            "reference weights of its own (copy.deepcopy), or leave ref_model out and a frozen copy is made"
        )
    ours, theirs = head_of(policy).vocab_size, head_of(reference).vocab_size
    if ours != theirs:
        raise UserError(
            f"the policy's vocabulary has {ours} entries, the reference's {theirs}: KL(reference || policy) needs "
            "one vocabulary. Take the model the policy was fine-tuned from as the reference"
        )
