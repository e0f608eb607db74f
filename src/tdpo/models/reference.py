"""The reference: where its hidden states come from.

:class:`FrozenCopy` is a second model, or a second adapter over the policy's base; :class:`AdapterOff` the policy
without its adapter; :class:`CachedHidden` reads what one of them gave once. :class:`LiveReference` is any model at this
moment: one that is only scored, or the policy before its first step. Which one a run takes is decided in
:mod:`tdpo.train.references`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from tdpo.distributed.sharding import cast_weights, frozen_weights_dtype, shard_frozen
from tdpo.errors import UserError
from tdpo.models.adapters import adapter_layers, frozen_base, moves_its_base, switched_off
from tdpo.models.hidden import response_states
from tdpo.models.modes import reference_mode
from tdpo.models.policy import body_of, causal_lm, head_of, prove_head, unwrapped
from tdpo.models.store import HiddenStore
from tdpo.types import Head, Hidden, PackedBatch


class Reference(Protocol):
    """Anything that gives the reference's hidden states of a batch, and the head they are meant for."""

    def states(self, batch: PackedBatch) -> Tensor:
        """Hidden states ``[N, D]`` of the batch's response tokens, without gradient."""

    def head(self) -> Head:
        """The head. Where it is the policy's, its weight may be whole only within the policy's head."""

    def models(self) -> list[nn.Module]:
        """The models that run a batch for it, so that a layout can be proven on them."""

    def to(self, device: torch.device | str) -> None:
        """Moves what is the reference's own; the policy's place is the trainer's business."""

    def cast_weights(self, dtype: torch.dtype) -> Reference:
        """The same reference with weights of fewer bits; a policy it reads from stays as it is."""

    def prepare(self, accelerator: Any) -> None:
        """Brings what is the reference's own to its device, shared out between processes where the policy will be."""


class FrozenCopy:
    """A second model in evaluation mode whose parameters take no gradient.

    Args:
        model: The model.
        shared: The weights in it that are the policy's own, which training leaves as they are.
    """

    def __init__(self, model: nn.Module, shared: Sequence[nn.Parameter] = ()) -> None:
        self.model, self.shared = model.eval().requires_grad_(False), shared
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

    def models(self) -> list[nn.Module]:
        """The frozen model."""
        return [self.model]

    def to(self, device: torch.device | str) -> None:
        """Moves the frozen model; one that is there already stays untouched, as models in few bits must."""
        if self.copied[0].device != torch.device(device):
            self.model.to(device)

    def cast_weights(self, dtype: torch.dtype) -> FrozenCopy:
        """Casts this reference in place."""
        self._unshare()
        cast_weights(self.model, dtype)
        return self

    def _unshare(self) -> None:
        """Copies the shared weights too, in the same modules: what was proven of the model stays proven."""
        own = {id(weight): copy.deepcopy(weight) for weight in self.shared}
        for module in self.model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if id(weight) in own:
                    setattr(module, name, own[id(weight)])
        self.shared = ()

    @property
    def sharded(self) -> bool:
        """Whether this process holds but a part of the body."""
        return self._head is not None

    def prepare(self, accelerator: Any) -> None:
        """Shards the body where weights are sharded; the head, which every step reads whole, stays whole.

        Under mixed precision it gets the policy's, so that equal models give equal states.
        """
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            self._unshare()  # these engines replace or empty the policy's weights
        dtype = frozen_weights_dtype(accelerator)
        if dtype is not None:
            self.cast_weights(dtype)
        head = head_of(self.model).map(torch.detach)  # the parameter itself is emptied
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

    def states(self, batch: PackedBatch) -> Tensor:
        """Hidden states ``[N, D]`` of the batch's response tokens, without gradient."""
        with reference_mode(self.model), torch.no_grad():
            return response_states(self.model, batch)

    def head(self) -> Head:
        """The frozen model's."""
        return self._head or head_of(self.model)


class AdapterOff:
    """The policy with its adapter switched off: no second copy of the weights, and one head unless it is trained.

    Modules the adapter saves whole (``modules_to_save``, a trained head say) step back to what they were copied from.

    Args:
        policy: A peft model whose base stays as it is.

    Raises:
        UserError: if training moves the base too, since the reference would then move with it.
    """

    def __init__(self, policy: Any) -> None:
        reason = moves_its_base(policy)
        if reason:
            raise UserError(
                f"--reference adapter_off: {reason}, so the policy without its adapter is not what the adapter was "
                "put on; --reference frozen keeps a copy"
            )
        self.policy = policy
        self._layers = adapter_layers(policy)
        in_head = set(causal_lm(policy).get_output_embeddings().modules())
        self._head_layers = [layer for layer in self._layers if layer in in_head]

    def models(self) -> list[nn.Module]:
        """The policy's model, which runs for both."""
        return [self.policy]

    def to(self, device: torch.device | str) -> None:
        """Nothing here is the reference's own."""

    def cast_weights(self, dtype: torch.dtype) -> AdapterOff:
        """Returns a copy with its weights cast."""
        return AdapterOff(cast_weights(copy.deepcopy(self.policy), dtype))

    def prepare(self, accelerator: Any) -> None:
        """Nothing here is the reference's own."""

    def states(self, batch: PackedBatch) -> Tensor:
        """Hidden states ``[N, D]`` of the batch's response tokens, without gradient."""
        with reference_mode(self.policy), switched_off(self._layers), torch.no_grad():
            return response_states(self.policy, batch)

    def head(self) -> Head:
        """The policy's; what it was copied from where it is trained."""
        with switched_off(self._head_layers):
            return head_of(self.policy)


class LiveReference:
    """A model as it is at this moment, left as it is; a policy is no reference any more after its first step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def models(self) -> list[nn.Module]:
        """The model."""
        return [self.model]

    def to(self, device: torch.device | str) -> None:
        """Nothing here is the reference's own."""

    def cast_weights(self, dtype: torch.dtype) -> LiveReference:
        """Returns a copy with its weights cast."""
        return LiveReference(cast_weights(copy.deepcopy(self.model), dtype))

    def prepare(self, accelerator: Any) -> None:
        """Nothing here is the reference's own."""

    def states(self, batch: PackedBatch) -> Tensor:
        """Hidden states ``[N, D]`` of the batch's response tokens, without gradient."""
        with reference_mode(self.model), torch.no_grad():
            return response_states(self.model, batch)

    def head(self) -> Head:
        """The model's."""
        return head_of(self.model)


class CachedHidden:
    """Hidden states read from disk, exactly as the reference gave them in the cache's dtype; its body is gone.

    Args:
        store: Holds the states of every pair that will be asked for.
        head: The reference's head; copied, so that neither training nor a release of the model touches it.
    """

    def __init__(self, store: HiddenStore, head: Head) -> None:
        self.store, self._head = store, head.map(lambda tensor: tensor.detach().clone())

    def models(self) -> list[nn.Module]:
        """None: nothing runs."""
        return []

    def to(self, device: torch.device | str) -> None:
        """Moves the head; states follow their batch."""
        self._head = self._head.map(lambda tensor: tensor.to(device))

    def cast_weights(self, dtype: torch.dtype) -> CachedHidden:
        """This one: its states have the dtype they were kept in."""
        return self

    def prepare(self, accelerator: Any) -> None:
        """Moves the head."""
        self.to(accelerator.device)

    def head(self) -> Head:
        """The copy."""
        return self._head

    def states(self, batch: PackedBatch) -> Tensor:
        """Hidden states ``[N, D]`` of the batch's response tokens.

        Raises:
            UserError: naming the rows of pairs the cache does not hold.
        """
        states = self.store.states(batch.pair_keys, batch.lengths, batch.pair_rows)
        # A cache of fewer bits than the head is widened, and the head is never cast to fewer bits.
        dtype = torch.promote_types(states.dtype, self._head.weight.dtype)
        return states.to(batch.input_ids.device, dtype)


def as_reference(reference: nn.Module | Reference) -> Reference:
    """A reference strategy as it is; a model as one."""
    return LiveReference(reference) if isinstance(reference, nn.Module) else reference


def reference_hidden(reference: nn.Module | Reference, batch: PackedBatch) -> Hidden:
    """States ``[N, D]`` and head of a reference whose weights are whole."""
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
