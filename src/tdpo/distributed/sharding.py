"""Shards policy and reference with FSDP2 or ZeRO stage 3, where transformers and accelerate do it for the policy alone.

Both let every process but one load empty or partial weights, to be filled later. The checks of the loaded model (its
head, its trees) and the copy that becomes the reference need all weights, so every process loads all of them.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from tdpo.errors import UserError


def override_engine_settings(accelerator: Any) -> None:
    """Changes the settings of an engine that would cost digits or weights.

    FSDP2 rounds the output of a forward to the precision of its weights, and ours returns the loss. ZeRO stage 3 saves
    weights that cannot be loaded, unless its settings say to gather them.

    Raises:
        UserError: if FSDP was asked for on CPUs, where accelerate would train with plain data parallelism.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.device.type == "cpu" and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError("FSDP does not run on CPUs: use --accelerate_config ddp, or leave out the settings of FSDP")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
    if sharding_engine(accelerator) == "zero3":
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True


def sharding_engine(accelerator: Any) -> str:
    """Returns ``fsdp2`` or ``zero3`` where weights are sharded by one of them, or an empty text."""
    kind, state = accelerator.distributed_type, accelerator.state
    if kind == DistributedType.FSDP and state.fsdp_plugin.fsdp_version == 2:
        return "fsdp2"
    return "zero3" if kind == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3 else ""


def frozen_weights_dtype(accelerator: Any) -> torch.dtype | None:
    """Returns the dtype FSDP2 and DeepSpeed cast a policy's weights to under mixed precision.

    None where weights keep their dtype, under autocast.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    casts = sharding_engine(accelerator) == "fsdp2" or accelerator.distributed_type == DistributedType.DEEPSPEED
    return dtype if casts else None


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """Casts the weights of a frozen model in place and leaves its buffers, as the engines do."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def shard_frozen(body: nn.Module, accelerator: Any) -> bool:
    """Shards the weights of a frozen model's body in place, as accelerate will shard the policy's.

    Args:
        body: A transformers model without a head; this process holds all its weights.
        accelerator: The run's. Without FSDP2 or ZeRO stage 3 nothing happens.

    Returns:
        Whether the body is sharded now, and on its device.
    """
    state, engine = accelerator.state, sharding_engine(accelerator)
    if engine == "fsdp2":
        from accelerate.utils import fsdp2_prepare_model

        plugin = state.fsdp_plugin
        policys = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
        plugin.transformer_cls_names_to_wrap = None  # this body's own layers, which need not be the policy's
        try:
            fsdp2_prepare_model(accelerator, body)
        finally:
            plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policys
        return True
    if engine == "zero3":
        import deepspeed

        given = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        kept = ("stage", "stage3_param_persistence_threshold", "offload_param")
        zero = {name: given[name] for name in kept if given.get(name) not in (None, "auto")}
        dtype = next(body.parameters()).dtype
        deepspeed.initialize(  # without an optimizer it only shards the weights
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
