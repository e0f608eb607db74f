"""References: the models, or the cache, that hidden states of the reference come from.

:class:`LiveReference` runs a model as it is at this moment; :class:`FrozenCopy` a second model, or a second adapter
over the policy's base; :class:`AdapterOff` the policy without its adapter; :class:`~tdpo.models.store.CachedHidden`
reads what one of them computed once. :mod:`tdpo.train.references` chooses one for a run.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from typing_extensions import override

from tdpo.distributed.sharding import cast_weights, frozen_weights_dtype, shard_frozen
from tdpo.errors import UserError
from tdpo.models.adapters import adapter_disabled, adapter_layers, find_changed_base, frozen_base
from tdpo.models.hidden import response_states
from tdpo.models.modes import reference_mode
from tdpo.models.policy import body_of, causal_lm, head_of, prove_head
from tdpo.models.probe import unwrapped
from tdpo.types import Head, Hidden, PackedBatch


class Reference(ABC):
    """Computes the reference's hidden states of a batch, and returns the head they are meant for.

    The defaults are those of a reference that runs no model.
    """

    @abstractmethod
    def states(self, batch: PackedBatch) -> Tensor:
        """Computes the hidden states ``[N, D]`` of the batch's response tokens, without gradient."""

    @abstractmethod
    def head(self) -> Head:
        """Returns the head. Where it is the policy's, its weight may be whole only within the policy's head."""

    def models(self) -> list[nn.Module]:
        """Returns the models that run a batch for it, so that a layout can be proven on them."""
        return []

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Moves the reference's own weights; the trainer moves the policy's."""

    def cast_weights(self, dtype: torch.dtype) -> Reference:
        """Returns the reference with weights of fewer bits; a policy it reads from stays as it is."""
        return self

    def prepare(self, accelerator: Any) -> None:
        """Moves the reference's own weights to their device, sharded where the policy will be."""
        self.to(accelerator.device)


class NoReference(Reference):
    """Stands for the reference of an objective that has none; nothing is run or kept in memory."""

    @override
    def states(self, batch: PackedBatch) -> Tensor:
        raise ValueError("the objective has no reference")

    @override
    def head(self) -> Head:
        raise ValueError("the objective has no reference")

    @override
    def to(self, device: torch.device | str) -> None:
        pass


class LiveReference(Reference):
    """Runs a model as it is at this moment; a policy is no longer a reference after its first step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @override
    def models(self) -> list[nn.Module]:
        return [self.model]

    @override
    def to(self, device: torch.device | str) -> None:
        pass  # the model is the trainer's

    @override
    def cast_weights(self, dtype: torch.dtype) -> Reference:
        return type(self)(cast_weights(copy.deepcopy(self.model), dtype))

    @override
    def states(self, batch: PackedBatch) -> Tensor:
        with reference_mode(self.model), torch.no_grad():
            return response_states(self.model, batch)

    @override
    def head(self) -> Head:
        return head_of(self.model)


class FrozenCopy(LiveReference):
    """Runs a second model in evaluation mode whose parameters take no gradient.

    Args:
        model: The model.
        shared: The weights in it that are the policy's own, which training leaves as they are.
    """

    def __init__(self, model: nn.Module, shared: Sequence[nn.Parameter] = ()) -> None:
        super().__init__(model.eval().requires_grad_(False))
        self.shared = shared
        self._head: Head | None = None

    @classmethod
    def of(cls, policy: nn.Module) -> FrozenCopy:
        """Copies the policy as it is in memory; nothing is reloaded by name.

        Of a policy with an adapter only the adapter is copied, and what else is trained: the frozen weights of its base
        are those of the policy.
        """
        base = frozen_base(policy)
        return cls(copy.deepcopy(policy, {id(weight): weight for weight in base}), base)

    @property
    def copied(self) -> list[nn.Parameter]:
        """The weights that are not the policy's own."""
        shared = {id(weight) for weight in self.shared}
        return [weight for weight in self.model.parameters() if id(weight) not in shared]

    @property
    def sharded(self) -> bool:
        """True where this process holds only a part of the body."""
        return self._head is not None

    @override
    def to(self, device: torch.device | str) -> None:
        if self.copied[0].device != torch.device(device):  # models in few bits must not be moved, not even in place
            self.model.to(device)

    @override
    def cast_weights(self, dtype: torch.dtype) -> FrozenCopy:
        self._copy_shared()
        cast_weights(self.model, dtype)
        return self

    def _copy_shared(self) -> None:
        """Copies the shared weights too, in the same modules: what was proven of the model stays proven."""
        own = {id(weight): copy.deepcopy(weight) for weight in self.shared}
        for module in self.model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if id(weight) in own:
                    setattr(module, name, own[id(weight)])
        self.shared = ()

    @override
    def prepare(self, accelerator: Any) -> None:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            self._copy_shared()  # these engines replace or empty the policy's weights
        dtype = frozen_weights_dtype(accelerator)  # the policy's, so that equal models give equal states
        if dtype is not None:
            self.cast_weights(dtype)
        # Every step reads the whole head, so it is kept beside the sharded body, which empties the parameter.
        head = head_of(self.model).map(torch.detach)
        if shard_frozen(body_of(self.model), accelerator):
            self._head = head.map(lambda tensor: tensor.to(accelerator.device))
        else:
            self.to(accelerator.device)

    def follow(self, policy: nn.Module, share: float) -> None:
        """Moves every weight a share of the way to the policy's (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656).

        Args:
            policy: A model with the same parameters, whole.
            share: 1 takes the policy's weights, 0 would stay.
        """
        with torch.no_grad():
            for own, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
                own.lerp_(theirs.to(own.device, own.dtype), share)

    @override
    def head(self) -> Head:
        return self._head or head_of(self.model)


class AdapterOff(LiveReference):
    """Runs the policy with its adapter switched off: no second copy of the weights, and one head unless it is trained.

    Modules the adapter saves whole (``modules_to_save``, a trained head say) step back to what they were copied from.

    Args:
        policy: A peft model whose base stays as it is.

    Raises:
        UserError: if training moves the base too, since the reference would then move with it.
    """

    def __init__(self, policy: Any) -> None:
        reason = find_changed_base(policy)
        if reason:
            raise UserError(
                f"--reference adapter_off: {reason}, so the policy without its adapter is not what the adapter was "
                "put on; --reference frozen keeps a copy"
            )
        super().__init__(policy)
        self._layers = adapter_layers(policy)
        in_head = set(causal_lm(policy).get_output_embeddings().modules())
        self._head_layers = [layer for layer in self._layers if layer in in_head]

    @override
    def states(self, batch: PackedBatch) -> Tensor:
        with adapter_disabled(self._layers):
            return super().states(batch)

    @override
    def head(self) -> Head:
        with adapter_disabled(self._head_layers):
            return super().head()


def as_reference(reference: nn.Module | Reference) -> Reference:
    """Returns a reference as it is, and a model as a reference that runs it."""
    return LiveReference(reference) if isinstance(reference, nn.Module) else reference


def reference_hidden(reference: nn.Module | Reference, batch: PackedBatch) -> Hidden:
    """Computes the states ``[N, D]`` of a reference whose weights are whole, and returns them with its head."""
    live = as_reference(reference)
    return Hidden(live.states(batch), live.head())


def check_comparable(policy: nn.Module, reference: nn.Module) -> None:
    """Proves both heads, and refuses a reference with another vocabulary or with weights of the policy.

    Raises:
        UserError: naming both sizes, or saying what is shared.
    """
    for model in (policy, reference):
        prove_head(model)
    own, others = ({id(parameter) for parameter in model.parameters()} for model in (policy, reference))
    if own & others and unwrapped(policy) is not unwrapped(reference):
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
