"""Lists the fields of ``transformers.TrainingArguments`` that are refused by name; all others are honoured.

A test knows both lists and compares them with the installed transformers, so that a field it adds is looked at.
"""

from __future__ import annotations

from typing import Any

_NO_PREDICTIONS = "has no effect: evaluation computes the metrics of each batch and collects no predictions"
FIXED: dict[str, tuple[Any, str]] = {
    "average_tokens_across_devices": (
        True,
        "cannot be off: the loss is the mean over the pairs or tokens of all processes",
    ),
    "batch_eval_metrics": (False, _NO_PREDICTIONS),
    "bf16_full_eval": (False, "casts the policy and not the reference; use --bf16"),
    "do_predict": (
        False,
        "has no effect: no command has a test set; run tdpo eval, or call trainer.predict(rows)",
    ),
    "eval_do_concat_batches": (True, _NO_PREDICTIONS),
    "eval_use_gather_object": (False, _NO_PREDICTIONS),
    "fp16_full_eval": (False, "casts the policy and not the reference; use --bf16"),
    "include_for_metrics": ([], _NO_PREDICTIONS),
    "label_names": (None, "has no effect: the labels are the response tokens"),
    "label_smoothing_factor": (0.0, "has no effect on these losses"),
    "length_column_name": ("length", "has no effect: lengths are those of the tokenised rows"),
    "parallelism_config": (
        None,
        "is not available: neither sequences nor tensors are split; --accelerate_config fsdp2 shards weights",
    ),
    "remove_unused_columns": (False, "cannot be on: it would remove the pairs' own columns"),
    "use_liger_kernel": (
        False,
        "is not available: Liger replaces the forward of the model, in which the loss is computed here (it never keeps "
        "all logits either)",
    ),
}
"""The one value that a field may have, and why no other is accepted and what to use instead."""
