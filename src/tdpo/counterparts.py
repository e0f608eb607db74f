"""Options of other libraries, and what each of them is here: plain data, for messages and for docs/coming-from-trl.md.

The tables of TRL hold every field of its release 1.16; a test compares them with the TRL that is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tdpo.errors import nearest


class Counterpart(NamedTuple):
    """What an option of another library is here.

    Attributes:
        option: The option to use, of the same name where it means the same; empty where there is none.
        note: What differs; where there is no option, the reason and what to do instead.
    """

    option: str = ""
    note: str = ""


def _same(names: str) -> dict[str, Counterpart]:
    """Makes the entries of options with the same name and meaning, separated by spaces."""
    return {name: Counterpart(name) for name in names.split()}


def _each(names: str, option: str = "", note: str = "") -> dict[str, Counterpart]:
    """Gives one counterpart to several names, separated by spaces."""
    return {name: Counterpart(option, note) for name in names.split()}


OTHER_LOSS = "not available: it belongs to a loss that is not available either; leave it out"
READ_ONCE = "not available: rows are read and tokenised once, into a cache that is read from disk; leave it out"
BY_ITSELF = "done without an option; leave it out"
FOUND = "read from the checkpoint; leave it out"
NO_LIGER = "only false: the loss runs inside the model's forward, which Liger replaces"
NO_PADDING = "not available: padding never reaches the loss; leave it out"
ONE_LIMIT = "prompt and response together; `max_prompt_length` is what stays of the prompt of a longer pair"

DPO_CONFIG: Mapping[str, Counterpart] = {
    **_same("learning_rate logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs"),
    **_same("torch_empty_cache_steps trust_remote_code disable_dropout beta"),
    **_same("sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"),
    "model_init_kwargs": Counterpart(
        "model_init_kwargs",
        "an error beside a model that is loaded already; without `device_map`, `quantization_config`",
    ),
    "dataset_num_proc": Counterpart("dataset_num_proc", "1 where TRL has None"),
    "max_length": Counterpart("max_length", "a longer pair loses prompt before response, see `max_prompt_length`"),
    "truncation_mode": Counterpart(
        "truncation_mode",
        "which part of a prompt stays when it is cut; TRL cuts prompt and response as one sequence. Responses are cut "
        "at their end",
    ),
    "loss_type": Counterpart(
        "objective",
        "`sigmoid` is `dpo`; no other value, nor a list of several, is available. Left out, the objective is `tdpo2`",
    ),
    "loss_weights": Counterpart(note="not available: there is one objective at a time; leave it out"),
    "precompute_ref_log_probs": Counterpart(
        "reference_cache",
        "a folder (or `reference: cached`): it has the reference's hidden states, from which KL and log-probabilities "
        "are exact, and later runs read it again",
    ),
    "precompute_ref_batch_size": Counterpart("per_device_eval_batch_size", "with which a reference cache is filled"),
    "padding_free": Counterpart("layout", "`tree` runs each prompt once and has no padding; `auto` takes it by itself"),
    "use_liger_kernel": Counterpart("use_liger_kernel", NO_LIGER),
    "pad_to_multiple_of": Counterpart(note="not available: it changes no result; leave it out"),
    "pad_token": Counterpart(note=NO_PADDING),
    "router_aux_loss_coef": Counterpart(
        "router_aux_loss_coef",
        "left out, the config decides: its coefficient where `output_router_logits` is true, where TRL looks at the "
        "coefficient alone",
    ),
    "ld_alpha": Counterpart(note="not available: the weighting of LD-DPO; leave it out"),
    "f_divergence_type": Counterpart(note="not available: `reverse_kl` is what `objective: dpo` has; leave it out"),
    "f_alpha_divergence_coef": Counterpart(note="not available: the alpha-divergence; leave it out"),
    "label_smoothing": Counterpart(note=OTHER_LOSS),
    "use_weighting": Counterpart(note="not available: the weighting of WPO; leave it out"),
    "discopop_tau": Counterpart(note=OTHER_LOSS),
    "activation_offloading": Counterpart("gradient_checkpointing", "recomputes activations instead of moving them"),
}
"""``trl.DPOConfig``: fields of its own, and those whose defaults it changes."""

MODEL_CONFIG: Mapping[str, Counterpart] = {
    **_same("model_name_or_path model_revision dtype attn_implementation use_peft"),
    **_same("lora_r lora_alpha lora_target_modules lora_target_parameters lora_modules_to_save use_rslora use_dora"),
    **_same("load_in_8bit load_in_4bit bnb_4bit_quant_type bnb_4bit_quant_storage use_bnb_nested_quant"),
    "lora_dropout": Counterpart("lora_dropout", "more than 0 takes `disable_dropout: false`"),
    "lora_task_type": Counterpart("lora_task_type", "CAUSAL_LM alone"),
}
"""``trl.ModelConfig``."""

SCRIPT_ARGUMENTS: Mapping[str, Counterpart] = {
    **_same("dataset_name dataset_config dataset_train_split"),
    "dataset_test_split": Counterpart(
        "dataset_test_split",
        "the split of `eval_dataset_name`, which TRL takes to be `dataset_name`: name it there too",
    ),
    "dataset_streaming": Counterpart(note=READ_ONCE),
    "ignore_bias_buffers": Counterpart(note="not available: buffers need no exception under DDP; leave it out"),
}
"""``trl.ScriptArguments``."""

DATASET_MIXTURE_CONFIG: Mapping[str, Counterpart] = {
    "datasets": Counterpart("datasets", "its entries have the fields below"),
    "streaming": Counterpart(note=READ_ONCE),
    "test_split_size": Counterpart("test_fraction", "a prompt is on one side with all its rows"),
}
"""``trl.DatasetMixtureConfig``."""

DATASET_CONFIG: Mapping[str, Counterpart] = {
    "path": Counterpart("name", "TRL's `name`, a configuration, is `config` here"),
    "name": Counterpart("config", "`name` here is what TRL calls `path`"),
    "split": Counterpart("split"),
    "data_dir": Counterpart("name", "the folder itself"),
    "data_files": Counterpart("name", "a file or a glob"),
    "columns": Counterpart("columns", "renames columns; the others need no selection and are left out"),
    "fraction": Counterpart(
        "weight", "how often a record is seen in an epoch, 0.5 a seeded half; not a share of the mixture"
    ),
}
"""Entries of TRL's ``datasets``: :class:`trl.scripts.utils.DatasetConfig`."""

ENTRY_SPELLINGS: Mapping[str, Counterpart] = {
    **{name: entry for name, entry in DATASET_CONFIG.items() if name not in ("name", entry.option)},
    "id": Counterpart("name"),
    "dataset_name": Counterpart("name"),
    "type": Counterpart("format"),
    "dataset_format": Counterpart("format"),
    "dataset_config": Counterpart("config"),
    "proportion": Counterpart("weight"),
}
"""Other libraries' fields of an entry of ``datasets``, for messages."""

TRAINER: Mapping[str, Counterpart] = {
    **_same("model ref_model args data_collator train_dataset eval_dataset processing_class"),
    **_same("callbacks optimizers peft_config"),
    "compute_metrics": Counterpart(
        note="not available: no logits are kept. `trainer.evaluate()` returns every metric of the pairs, and "
        "a callback may add to them"
    ),
    "quantization_config": Counterpart(
        note="not available: load the model with `quantization_config` and pass it as `model`; on the command line "
        "`load_in_4bit` or `load_in_8bit`"
    ),
}
"""Arguments of ``trl.DPOTrainer``."""


OTHER_SPELLINGS: Mapping[str, Counterpart] = {
    # models
    **_each(
        "model model_id model_name model_path base_model adapter_name_or_path lora_model_dir", "model_name_or_path"
    ),
    **_each("tokenizer tokenizer_name tokenizer_path", "tokenizer_name_or_path"),
    **_each("ref_model ref_model_name ref_model_path reference_model", "ref_model_name_or_path"),
    **_each("revision", "model_revision"),
    **_each("torch_dtype model_dtype", "dtype"),
    **_each("pure_bf16", "dtype", "`bfloat16`"),
    **_each("chat_template template", "chat_template_path"),
    **_each(
        "use_flash_attention_2 use_flash_attn flash_attention flash_attn sdp_attention flex_attention",
        "attn_implementation",
        "`flash_attention_2`, `sdpa`, `eager` or `flex_attention`",
    ),
    **_each("ref_model_init_kwargs", "model_init_kwargs", "they are the reference's too"),
    **_each("model_type tokenizer_type base_model_config is_encoder_decoder use_fast_tokenizer", note=FOUND),
    # data
    **_each(
        "dataset data data_path dataset_path dataset_dir train_file data_files",
        "dataset_name",
        "a file, a folder, a glob or a hub name; `datasets` for several",
    ),
    **_each(
        "dataset_mixer dataset_mixture dataset_weights",
        "datasets",
        "a list of mappings with `name` and `weight` (how often a record is seen in an epoch)",
    ),
    **_each("eval_dataset test_dataset test_datasets validation_file", "eval_dataset_name"),
    **_each("train_split dataset_split", "dataset_train_split"),
    **_each("test_split eval_split dataset_eval_split", "dataset_test_split"),
    **_each("val_size val_set_size test_size", "test_fraction"),
    **_each("preprocessing_num_workers dataset_processes num_proc", "dataset_num_proc"),
    **_each("dataset_prepared_path tokenized_path", "cache_dir"),
    **_each("cutoff_len sequence_len max_seq_length max_seq_len seq_len model_max_length", "max_length", ONE_LIMIT),
    **_each(
        "max_target_length max_completion_length", "max_length", f"{ONE_LIMIT}; responses have no limit of their own"
    ),
    **_each("truncation truncation_side", "truncation_mode"),
    **_each("packing sample_packing neat_packing", "layout", "`tree`, or `auto` where it is left out"),
    **_each("max_samples", note="not available: name a shorter file, or a `weight` below 1 in `datasets`"),
    **_each("label_pad_token_id padding_value pad_to_sequence_len", note=NO_PADDING),
    # objective and reference
    **_each("pref_beta dpo_beta rl_beta", "beta"),
    **_each("loss pref_loss rl", "objective"),
    **_each("rpo_alpha pref_ftx dpo_label_smoothing simpo_gamma orpo_alpha", note=OTHER_LOSS),
    **_each("reference_free", note="not available: every objective compares with a reference; leave it out"),
    **_each("force_use_ref_model", "ref_model_name_or_path", "a reference that is named is always used"),
    **_each(
        "model_adapter_name ref_adapter_name ref_model_adapters create_new_adapter",
        note="not available: name an adapter's folder as the model; `reference` says what it is compared with",
    ),
    # the run
    **_each("lr", "learning_rate"),
    **_each("epochs num_epochs epoch n_epochs", "num_train_epochs"),
    **_each("steps num_steps num_train_steps max_train_steps", "max_steps"),
    **_each("micro_batch_size per_gpu_train_batch_size train_batch_size", "per_device_train_batch_size"),
    **_each(
        "batch_size bs",
        "per_device_train_batch_size",
        "an optimizer step has it times `gradient_accumulation_steps` times the processes",
    ),
    **_each("eval_batch_size per_gpu_eval_batch_size", "per_device_eval_batch_size"),
    **_each("grad_accum gradient_accumulation accumulation_steps", "gradient_accumulation_steps"),
    **_each("grad_checkpointing", "gradient_checkpointing"),
    **_each("optimizer", "optim"),
    **_each("lr_scheduler scheduler", "lr_scheduler_type"),
    **_each("gradient_clipping grad_clip clip_grad_norm", "max_grad_norm"),
    **_each("wd", "weight_decay"),
    **_each("num_warmup_steps", "warmup_steps"),
    **_each("warmup_ratio", "warmup_steps", "a number below 1 is a share of all steps, `warmup_steps: 0.1`"),
    **_each("evaluation_strategy", "eval_strategy"),
    **_each("evals_per_epoch", "eval_steps", "a number below 1 is a share of all steps"),
    **_each("saves_per_epoch", "save_steps", "a number below 1 is a share of all steps"),
    **_each("out_dir output output_path save_dir", "output_dir"),
    **_each("auto_resume_from_checkpoints", "resume"),
    **_each("wandb_name wandb_run_name", "run_name"),
    **_each("wandb_project", "project"),
    **_each("push_to_hub_model_id repo_id", "hub_model_id"),
    **_each("enable_liger_kernel", "use_liger_kernel", NO_LIGER),
    **_each("no_cuda", "use_cpu"),
    **_each("logging_dir", note="not available: transformers 5 reads TENSORBOARD_LOGGING_DIR; leave it out"),
    **_each("save_safetensors use_mps_device half_precision_backend fp16_backend group_by_length", note=BY_ITSELF),
    **_each("stage", note="what the command says, `tdpo train` or `tdpo sft`; leave it out"),
    **_each("env", note="not available: set environment variables before the command starts"),
    **_each(
        "generate_during_eval predict_with_generate",
        note="not available: `tdpo generate` samples from a policy and its reference side by side",
    ),
    # adapters
    **_each("finetuning_type adapter", "use_peft", "`true` for `lora`, `false` for `full`"),
    **_each("lora_rank lora_dim", "lora_r"),
    **_each("lora_target target_modules", "lora_target_modules"),
    **_each("lora_target_linear", "lora_target_modules", "`all-linear`"),
    **_each("additional_target modules_to_save", "lora_modules_to_save"),
    **_each("peft_use_dora", "use_dora"),
    **_each("peft_use_rslora", "use_rslora"),
    **_each("quantization_bit", "load_in_4bit", "`true`, or `load_in_8bit: true`"),
    **_each("double_quantization bnb_4bit_use_double_quant", "use_bnb_nested_quant"),
    **_each("quantization_type", "bnb_4bit_quant_type"),
}
"""Names in transformers 4, earlier releases of TRL, alignment-handbook, axolotl, LLaMA-Factory, and short ones."""

TRL: Mapping[str, Counterpart] = {**DPO_CONFIG, **MODEL_CONFIG, **SCRIPT_ARGUMENTS, **DATASET_MIXTURE_CONFIG}
OPTIONS: Mapping[str, Counterpart] = {**OTHER_SPELLINGS, **TRL}


def hint(name: str, known: Iterable[str], counterparts: Mapping[str, Counterpart] = OPTIONS) -> str:
    """Returns what to use instead of an unknown option: its counterpart, or the nearest known name, or nothing.

    Args:
        name: The unknown option.
        known: The options there are.
        counterparts: What options of other libraries are here.

    Example:
        >>> hint("torch_dtype", ["dtype", "beta"]), hint("bta", ["dtype", "beta"])
        (" Use 'dtype'.", " Did you mean 'beta'?")
        >>> hint("discopop_tau", ["dtype", "beta"])
        ' It is not available: it belongs to a loss that is not available either; leave it out.'
    """
    known = list(known)
    found = counterparts.get(name)
    if found is None or (found.option and found.option not in known):
        return nearest(name, known)
    if found.option:
        return f" Use {found.option!r}{': ' if found.note else ''}{found.note}."
    return f" It is {found.note}."
