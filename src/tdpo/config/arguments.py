"""Lists which fields of ``transformers.TrainingArguments`` are honoured, and which are refused by name.

A test compares both lists with the installed transformers, so that a field it adds is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tdpo.errors import UserError


@dataclass(frozen=True)
class Fixed:
    """A field of which only one value is accepted.

    Attributes:
        value: That value.
        reason: Why no other is, and what to use instead; it follows the name of the field.
    """

    value: Any
    reason: str


_NO_PREDICTIONS = "has no effect: evaluation computes the metrics of each batch and collects no predictions"
FIXED: dict[str, Fixed] = {
    "average_tokens_across_devices": Fixed(
        True, "cannot be off: the loss is the mean over the pairs or tokens of all processes"
    ),
    "batch_eval_metrics": Fixed(False, _NO_PREDICTIONS),
    "bf16_full_eval": Fixed(False, "casts the policy and not the reference; use --bf16"),
    "do_predict": Fixed(
        False, "has no effect: no command has a test set; run tdpo eval, or call trainer.predict(rows)"
    ),
    "eval_do_concat_batches": Fixed(True, _NO_PREDICTIONS),
    "eval_use_gather_object": Fixed(False, _NO_PREDICTIONS),
    "fp16_full_eval": Fixed(False, "casts the policy and not the reference; use --bf16"),
    "include_for_metrics": Fixed([], _NO_PREDICTIONS),
    "label_names": Fixed(None, "has no effect: the labels are the response tokens"),
    "label_smoothing_factor": Fixed(0.0, "has no effect on these losses"),
    "length_column_name": Fixed("length", "has no effect: lengths are those of the tokenised rows"),
    "parallelism_config": Fixed(
        None, "is not available: neither sequences nor tensors are split; --accelerate_config fsdp2 shards weights"
    ),
    "remove_unused_columns": Fixed(False, "cannot be on: it would remove the pairs' own columns"),
    "use_liger_kernel": Fixed(
        False,
        "is not available: Liger replaces the forward of the model, in which the loss is computed here (it never keeps "
        "all logits either)",
    ),
}
"""Fields that are refused by name unless they have this value."""

_HONOURED = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
torch_compile_backend torch_compile_mode liger_kernel_config use_cache neftune_noise_alpha
torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step log_on_each_node
logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name
project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
per_device_eval_batch_size prediction_loss_only eval_on_start eval_accumulation_steps save_only_model save_strategy
save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
fsdp_config deepspeed debug skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank
"""
HONOURED = frozenset(_HONOURED.split())
"""Fields that do what transformers says they do.

``prediction_loss_only`` and ``eval_accumulation_steps`` ask for what always holds: nothing but the metrics is kept.
``liger_kernel_config`` belongs to ``use_liger_kernel``, which is refused, and has no effect without it.
``do_train`` and ``do_eval`` are what the commands do anyway, the second wherever there is held-out data.
"""


def check_fixed(options: Any) -> None:
    """Refuses every field that has another value than the one accepted.

    Raises:
        UserError: naming the field, its value and the reason.
    """
    for name, fixed in FIXED.items():
        if getattr(options, name) != fixed.value:
            raise UserError(f"--{name} {fixed.reason}. Leave it at {fixed.value!r}")
