"""Every option, once: dataclasses that the trainers take and the command line parses.

Defaults live here and nowhere else; help texts are what ``tdpo <command> --help`` prints.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from tdpo import objectives
from tdpo.data.formats import FORMATS
from tdpo.data.tokenise import Lengths
from tdpo.errors import UserError
from tdpo.ops import Backend

DATASET_HELP = "Dataset: a .jsonl, .json, .csv or .parquet file (also .gz), a folder, a glob or a hub name."

APPLIED = "TDPO_ACCELERATE_CONFIG"
"""Environment variable that says which ``--accelerate_config`` has been applied to this process."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
"""Seconds in the units a duration may have."""


@dataclass
class ModelConfig:
    """Which model and tokenizer, and how they are loaded."""

    model_name_or_path: str = field(metadata={"help": "Model to train or evaluate: a hub name or a folder."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, where it is not kept with the model: a hub name or a folder."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = field(
        default="float32",
        metadata={"help": "Dtype of the weights; auto takes the checkpoint's. For mixed precision use --bf16 instead."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention implementation: eager, sdpa, flash_attention_2; default: the model's."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers that bring Python code of their own to run it."}
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "End-of-sequence token to use instead of the tokenizer's own."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja file with the chat template to use instead of the tokenizer's own."}
    )


@dataclass
class ReferenceConfig:
    """Which model the policy is held against."""

    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model: a hub name or a folder; default: the policy as it is loaded."}
    )


@dataclass
class DataConfig:
    """Which data, and how its rows are read."""

    dataset_name: str = field(metadata={"help": DATASET_HELP})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(
        default="train",
        metadata={"help": "Split to train on: of a hub dataset, or the beginning of file names in a folder."},
    )


@dataclass
class EvalDataConfig(DataConfig):
    """Training data, and held-out data beside it."""

    dataset_test_split: str = field(default="test", metadata={"help": "Split of --eval_dataset_name to evaluate on."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out data, named as --dataset_name; it is evaluated at the end of training at least."},
    )


@dataclass
class LengthOptions:
    """How long sequences may be, and what happens to rows that do not fit.

    See :class:`tdpo.data.tokenise.Lengths`.
    """

    max_length: int = field(default=512, metadata={"help": "Longest sequence in tokens, prompt and response together."})
    truncation_mode: str = field(
        default="keep_end",
        metadata={"help": "Which part of a prompt stays when it is cut.", "choices": ["keep_end", "keep_start"]},
    )
    on_overlong: str = field(
        default="truncate",
        metadata={"help": "What happens to longer rows.", "choices": ["truncate", "drop", "error"]},
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "What happens to rows that cannot be used: stop, or drop and count.",
            "choices": ["error", "drop"],
        },
    )


@dataclass
class PairOptions(LengthOptions):
    """How preference rows are read and cut."""

    max_prompt_length: int = field(
        default=256, metadata={"help": "Longest prompt in tokens once a pair has to be cut to --max_length."}
    )
    dataset_format: str = field(
        default="auto",
        metadata={"help": "Format of the rows; auto tells it from the columns.", "choices": ["auto", *FORMATS]},
    )

    def lengths(self) -> Lengths:
        """Truncation as these options describe it."""
        return Lengths(self.max_length, self.max_prompt_length, self.truncation_mode, self.on_overlong)  # type: ignore[arg-type]


@dataclass
class ObjectiveOptions:
    """The objective and its parameters."""

    objective: str = field(
        default="tdpo2", metadata={"help": "Preference objective.", "choices": list(objectives.OBJECTIVES)}
    )
    beta: float = field(
        default=0.1, metadata={"help": "Strength of the tie to the reference, in every objective. The paper's is 0.1."}
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the sequential-KL difference in tdpo2, 0.5 by default. Others have none."},
    )

    def build_objective(self) -> objectives.Objective:
        """The objective these options describe.

        Raises:
            UserError: for an unknown name or a parameter the objective does not have.
        """
        return objectives.build(self.objective, beta=self.beta, alpha=self.alpha)


@dataclass
class LayoutOptions:
    """How sequences share rows; none of it changes a result."""

    layout: str = field(
        default="auto",
        metadata={
            "help": "tree packs sequences into shared rows and runs a prompt once, padded gives each a row; auto is "
            "tree where a probe proves it on the model.",
            "choices": ["auto", "tree", "padded"],
        },
    )


@dataclass
class ScoringOptions(LayoutOptions):
    """How pairs are scored; none of it changes a result."""

    backend: Backend = field(
        default="auto",
        metadata={
            "help": "Implementation of the token statistics: naive keeps all logits, chunked a bounded part of them, "
            "triton does so with kernels of its own on a GPU; auto is triton where it runs.",
        },
    )
    logits_budget: int | None = field(
        default=None,
        metadata={"help": "Bytes for logits at a time; default 256 MiB on a CPU, 512 MiB on an accelerator."},
    )


@dataclass
class RunOptions(TrainingArguments):
    """The run: where it goes, and what differs from transformers' own defaults."""

    learning_rate: float = field(
        default=5e-6, metadata={"help": "The initial learning rate. The TDPO paper's is 5e-6."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the model, its checkpoints and metrics. (required)"}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hide losses that are not finite. Off: training stops there and names the rows."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: batches carry more than the model's own inputs."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Train without dropout, so that policy and reference are compared as they are."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the newest checkpoint in --output_dir, if there is one."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into --output_dir although it holds a model or checkpoints."}
    )
    max_time: str | None = field(
        default=None,
        metadata={
            "help": "Time training may take (90s, 45m, 11h30m): then it saves a checkpoint and exits with code 124."
        },
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Give callbacks such as early stopping back their state when resuming."}
    )

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "How processes share the run: ddp, fsdp2, zero2, or a YAML file of accelerate's. Starts the "
            "processes where no launcher has."
        },
    )
    num_processes: int | None = field(
        default=None,
        metadata={"help": "Processes that --accelerate_config starts on this machine; default: one for each GPU."},
    )

    def __post_init__(self) -> None:
        if self.max_time is not None:
            seconds(self.max_time)
        if self.accelerate_config != os.environ.get(APPLIED):
            raise UserError(
                "--accelerate_config acts before options are read: give it on the command line, not in a --config file "
                "or from Python"
            )
        if self.num_processes is not None and self.accelerate_config is None:
            raise UserError(
                "--num_processes says how many processes --accelerate_config starts; it has no effect alone"
            )
        if self.remove_unused_columns:
            raise UserError("--remove_unused_columns cannot be on: it would remove the pairs' own columns")
        check_at_least(
            self, 1, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"
        )
        check_at_least(self, 0, "learning_rate", "num_train_epochs")
        if self.bf16_full_eval or self.fp16_full_eval:
            raise UserError("--bf16_full_eval and --fp16_full_eval cast the policy and not the reference; use --bf16")
        if self.label_smoothing_factor:
            raise UserError("--label_smoothing_factor has no effect on these losses; leave it at 0")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise UserError(f"--train_sampling_strategy {self.train_sampling_strategy}: there are random, sequential")
        if self.torch_compile:
            raise UserError(
                "--torch_compile is not supported: it compiles a model's own forward, and the step runs body, head and "
                "loss inside it instead"
            )
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
        given = self.accelerator_config
        if given.split_batches or given.dispatch_batches or not given.even_batches:  # type: ignore[union-attr]
            raise UserError(
                "--accelerator_config: batches are shared out by tdpo; split, dispatch and even have no use"
            )
        zero = getattr(self.deepspeed_plugin, "zero_stage", None)
        if zero == 3 or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
            raise UserError("DeepSpeed ZeRO stage 3 is not supported; --accelerate_config zero2 or fsdp2 is")


@dataclass
class TDPOConfig(ObjectiveOptions, PairOptions, ScoringOptions, RunOptions):
    """Arguments of tdpo.TDPOTrainer: all of ``transformers.TrainingArguments`` and the fields below.

    Args:
        objective: ``"dpo"``, ``"tdpo1"`` or ``"tdpo2"``.
        beta: Strength of the tie to the reference.
        alpha: Weight of the sequential-KL difference in ``tdpo2`` (None: 0.5); an error with any other objective.
        max_length: Longest sequence in tokens.
        max_prompt_length: What is left of the prompt of a longer pair.
        dataset_format: Format of the rows, ``"auto"`` to tell it from the columns.
        reference: Where the reference's hidden states come from.
    """

    reference: str = field(
        default="auto",
        metadata={"help": "Where the reference comes from: frozen is a second model.", "choices": ["auto", "frozen"]},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_at_least(self, 1, "logits_budget")
        self.build_objective()
        self.lengths()


@dataclass
class SFTConfig(LengthOptions, LayoutOptions, RunOptions):
    """Arguments of tdpo.SFTTrainer: all of ``transformers.TrainingArguments`` and the fields below."""

    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        self.lengths()

    def lengths(self) -> Lengths:
        """Truncation as these options describe it: half of an overlong example may be its prompt."""
        return Lengths(self.max_length, self.max_length // 2, self.truncation_mode, self.on_overlong)  # type: ignore[arg-type]


def check_at_least(options: Any, least: float, *names: str) -> None:
    """Refuses fields below a value; None is no value.

    Raises:
        UserError: naming the field.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name} must be at least {least:g}, got {value}")


def check_choices(options: Any) -> None:
    """Refuses a value outside a field's choices, also where no command line has parsed it.

    Raises:
        UserError: naming the field and its choices.
    """
    for name, spec in options.__dataclass_fields__.items():
        choices = spec.metadata.get("choices")
        value = getattr(options, name)
        if choices and isinstance(value, str) and value not in choices:
            raise UserError(f"--{name} {value}: there are {', '.join(map(str, choices))}")


def seconds(text: str) -> float:
    """A duration: seconds, or numbers with units.

    Example:
        >>> seconds("90"), seconds("1h30m"), seconds("1.5h")
        (90.0, 5400.0, 5400.0)

    Raises:
        UserError: for anything else, and for no time at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if "".join(number + unit for number, unit in parts) == text and parts:
        total = sum(float(number) * UNITS[unit] for number, unit in parts)
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        total = float(text)
    else:
        total = 0.0
    if total <= 0:
        raise UserError(f"--max_time {text}: expected seconds or a duration such as 90s, 45m, 11h30m or 2d")
    return total
