"""Keeps a frozen reference in sync with the policy (TR-DPO), in training and in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from typing_extensions import override

from tdpo.config import TDPOConfig
from tdpo.errors import UserError
from tdpo.models.adapters import has_adapter
from tdpo.models.reference import FrozenCopy, Reference


class ReferenceSyncCallback(TrainerCallback):
    """Moves a frozen reference toward the policy every N steps, and keeps it in checkpoints.

    Args:
        reference: The reference.
        policy: The policy, without any wrapper.
        args: ``ref_model_mixup_alpha`` sets how far, ``ref_model_sync_steps`` how often.

    Raises:
        UserError: for a reference and a policy that do not have the same parameters.
    """

    FILE = "reference.safetensors"

    def __init__(self, reference: Reference, policy: nn.Module, args: TDPOConfig) -> None:
        if isinstance(reference, FrozenCopy) and reference.sharded:
            raise UserError("--sync_ref_model needs whole weights in every process: --accelerate_config ddp or zero2")
        if not isinstance(reference, FrozenCopy) or has_adapter(policy) or _shapes(policy) != _shapes(reference.model):
            raise UserError(
                "--sync_ref_model: the reference can only follow a policy that is a whole model of the same shape, "
                "without an adapter"
            )
        self.reference, self.policy = reference, policy
        self.share, self.every = args.ref_model_mixup_alpha, args.ref_model_sync_steps

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.reference.follow(self.policy, self.share)

    def save(self, folder: Path) -> None:
        """Writes the weights of the reference."""
        weights = {name: parameter.contiguous() for name, parameter in self.reference.model.named_parameters()}
        save_file(weights, folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Restores what :meth:`save` wrote.

        Raises:
            UserError: if the checkpoint has no reference.
        """
        if not (folder / self.FILE).is_file():
            raise UserError(f"{folder} has no {self.FILE}: it was written without --sync_ref_model")
        weights = load_file(folder / self.FILE)
        with torch.no_grad():
            for name, parameter in self.reference.model.named_parameters():
                parameter.copy_(weights[name])


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
