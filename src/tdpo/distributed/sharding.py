"""What a run needs so that weights may be shared out between processes, beyond what transformers and accelerate do.

Both let every process but one load empty weights, or parts of weights, to be filled later. The proofs on the loaded
model (its head, its trees) and the copy that becomes the reference need whole ones, so models are loaded whole.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from transformers import TrainerCallback
from typing_extensions import override

from tdpo.errors import UserError

logger = logging.getLogger("tdpo")


def allow_fsdp_on_cpus(args: Any) -> bool:
    """Lets accelerate shard on CPUs too, where it would train with plain data parallelism and not say so.

    Accelerate takes FSDP's settings for kinds of devices it lists; torch's ``fully_shard`` takes any.

    Returns:
        Whether FSDP was asked for and there is no accelerator.

    Raises:
        UserError: where a GPU is hidden from this run alone, there is one process, or it is FSDP's first version.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or args.fsdp_plugin_args is not None
    if not asked or args.device.type != "cpu":
        return False
    if torch.accelerator.is_available():
        raise UserError("FSDP with --use_cpu takes the GPU for its own; hide it with CUDA_VISIBLE_DEVICES=")
    state, given = PartialState(), args.fsdp_plugin_args or {}
    if state.num_processes < 2:
        raise UserError("FSDP on a CPU needs two processes or more: --num_processes 2, or torchrun")
    if int(given.get("fsdp_version", os.environ.get("FSDP_VERSION", 1))) != 2:
        raise UserError("FSDP on a CPU has to be version 2: fsdp_version: 2 under fsdp_config")
    state.distributed_type = DistributedType.MULTI_GPU
    return True


def settle_fsdp_on_cpus(accelerator: Any) -> None:
    """What :func:`allow_fsdp_on_cpus` needs once there is an accelerator: offloaded weights are not pinned for a GPU.

    Raises:
        UserError: if accelerate took the settings for something else all the same.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("this version of accelerate does not shard on CPUs; use --accelerate_config ddp")
    plugin = accelerator.state.fsdp_plugin
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)


def override_engine_settings(accelerator: Any) -> None:
    """Changes what in an engine's settings would cost digits or weights.

    FSDP2 rounds what a forward returns to the precision of its weights, and ours returns the loss. ZeRO stage 3 saves
    no weights that load, unless it is told to gather them.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
    if _is_zero3(accelerator):
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True


def _is_fsdp2(accelerator: Any) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version == 2


def _is_zero3(accelerator: Any) -> bool:
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return is_deepspeed and accelerator.state.deepspeed_plugin.zero_stage == 3


def frozen_weights_dtype(accelerator: Any) -> torch.dtype | None:
    """What FSDP2 and DeepSpeed make of a policy's weights under mixed precision, where others leave them and autocast.

    None where weights stay as they are.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    narrows = _is_fsdp2(accelerator) or accelerator.distributed_type == DistributedType.DEEPSPEED
    return dtype if narrows else None


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """Narrows the weights of a model that is not trained, in place, and leaves its buffers, as the engines do."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def shard_frozen(body: nn.Module, accelerator: Any) -> bool:
    """Shares out the weights of a frozen model's body as accelerate will share out the policy's, in place.

    Args:
        body: A transformers model without a head; its weights are whole.
        accelerator: Says how. Without FSDP2 or ZeRO stage 3 nothing happens.

    Returns:
        Whether the body is sharded now, and on its device.
    """
    state = accelerator.state
    if _is_fsdp2(accelerator):
        from accelerate.utils import fsdp2_prepare_model

        plugin = state.fsdp_plugin
        policys = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
        plugin.transformer_cls_names_to_wrap = None  # this body's own layers, which need not be the policy's
        try:
            fsdp2_prepare_model(accelerator, body)
        finally:
            plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policys
        return True
    if _is_zero3(accelerator):
        import deepspeed

        given = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        kept = ("stage", "stage3_param_persistence_threshold", "offload_param")
        zero = {name: given[name] for name in kept if given.get(name) not in (None, "auto")}
        dtype = next(body.parameters()).dtype
        deepspeed.initialize(  # without an optimizer it only shares out the weights
            model=body,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": zero,
                "bf16": {"enabled": dtype == torch.bfloat16},
                "fp16": {"enabled": dtype == torch.float16},
                "steps_per_print": float("inf"),
            },
        )
        return True
    return False


def count_weights(model: Any) -> tuple[int, int]:
    """Counts the weights of a model: those this process holds between steps, and all of them."""
    local = total = 0
    for parameter in model.parameters():
        if hasattr(parameter, "ds_numel"):  # DeepSpeed's: empty while it is partitioned
            local += max(parameter.numel(), parameter.ds_tensor.numel())
            total += parameter.ds_numel
        else:
            local += parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()
            total += parameter.numel()
    return local, total


class ShardingCallback(TrainerCallback):
    """Prints at the start of training how much of a sharded model each process holds."""

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        local, total = count_weights(model)
        if local < total and state.is_world_process_zero:
            print(f"weights: sharded, {local:,} of {total:,} in this process")
