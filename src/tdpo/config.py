"""Every option, once: dataclasses that the trainers take and the command line parses.

Defaults live here and nowhere else; help texts are what ``tdpo <command> --help`` prints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from tdpo import objectives
from tdpo.data.cache import PairCache
from tdpo.data.formats import AUTO, FORMATS, Format, find_format
from tdpo.data.reading import PAIRS_FROM, Reading, Side, parse_columns
from tdpo.data.sft import SFT_FORMATS
from tdpo.data.sources import Source, open_mixture, open_source
from tdpo.data.templates import TEMPLATES
from tdpo.data.tokenise import Lengths, Tokeniser
from tdpo.errors import UserError
from tdpo.models.sharding import load_whole
from tdpo.ops import Backend

DATASET_HELP = (
    "Dataset: a .jsonl, .json, .csv, .parquet or .arrow file (also .gz, .bz2, .xz, .zst), a folder, a glob, - for "
    "standard input, or a hub name."
)


CACHE_HELP = (
    "Folder with the reference's hidden states; filled where it is empty, refused where it belongs to other weights, "
    "tokens or settings."
)
CACHE_DTYPE = {
    "help": "Dtype of the cached hidden states; auto is that in which the reference gives them, which loses nothing.",
    "choices": ["auto", "float32", "bfloat16", "float16"],
}

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
        metadata={
            "help": "Attention implementation: eager, sdpa, flex_attention, flash_attention_2; default: the model's."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers that bring Python code of their own to run it."}
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "End-of-sequence token to use instead of the tokenizer's own."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template to use instead of the tokenizer's own: a Jinja file, or one of "
            f"{', '.join(TEMPLATES)}."
        },
    )


@dataclass
class ReferenceConfig:
    """Which model the policy is held against."""

    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model: a hub name or a folder; default: the policy as it is loaded."}
    )


@dataclass
class AdapterOptions:
    """Adapters: train a few new weights instead of the model's, under TRL's names."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter; the model's weights stay."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter: its change is times alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapter; takes --disable_dropout false."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get an adapter, or all-linear; default: peft's for the model."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved whole, lm_head for a trained head."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised scale: alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: magnitude and direction of weights apart."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the model in 4 bits under the adapter (QLoRA); needs bitsandbytes."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Keep the model in 8 bits under the adapter; needs bitsandbytes."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Kind of 4-bit numbers.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the constants of the 4-bit quantisation too."}
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, 1, "lora_r", "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout must be in [0, 1), got {self.lora_dropout}")
        idle = [] if self.use_peft else self._given(("lora_", "use_rslora", "use_dora"))
        if idle:
            raise UserError(f"--{idle[0]} has no effect without --use_peft")
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit contradict each other")
        idle = [] if self.load_in_4bit else self._given(("bnb_", "use_bnb"))
        if idle:
            raise UserError(f"--{idle[0]} has no effect without --load_in_4bit")

    def peft_config(self) -> Any:
        """The ``peft.LoraConfig`` these options describe, None without ``use_peft``."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        targets = self.lora_target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )

    def check_trains(self, loaded: bool) -> None:
        """Refuses what would leave nothing to train, or put one adapter on another.

        Args:
            loaded: Whether the model that is named is an adapter already.

        Raises:
            UserError: naming the options.
        """
        if loaded and self.use_peft:
            raise UserError("the model has an adapter already: leave --use_peft out to go on training it")
        if self.quantization() and not (loaded or self.use_peft):
            raise UserError("weights in 4 or 8 bits cannot be trained: add --use_peft, or go on from an adapter")

    def quantization(self) -> dict[str, Any] | None:
        """Arguments of transformers' ``BitsAndBytesConfig``, None for weights as they are."""
        if self.load_in_8bit:
            return {"load_in_8bit": True}
        if not self.load_in_4bit:
            return None
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.use_bnb_nested_quant,
        }

    def _given(self, beginnings: tuple[str, ...]) -> list[str]:
        """The options of such names that differ from their defaults."""
        fields = type(self).__dataclass_fields__
        return [n for n, f in fields.items() if n.startswith(beginnings) and getattr(self, n) != f.default]


@dataclass
class SplitOptions:
    """One file for training and for evaluation: a part of its prompts is set aside."""

    test_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Set aside about this share of the prompts for evaluation; train, sft, eval and every process draw "
            "the same ones."
        },
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of --test_fraction, and of fractional weights."})

    def side(self, test: bool) -> Side | None:
        """One side of the split, or None if there is none."""
        return None if self.test_fraction is None else Side(self.test_fraction, self.split_seed, test)


@dataclass
class DataConfig(SplitOptions):
    """Which data, and how its rows are read."""

    dataset_name: str | None = field(default=None, metadata={"help": f"{DATASET_HELP} (this or --datasets)"})
    datasets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "A mixture instead of --dataset_name: name,weight=0.5,format=hh,... for each dataset, or a list of "
            "mappings in a YAML file. A weight is how often a record is seen in an epoch."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(
        default="train",
        metadata={"help": "Split to train on: of a hub dataset, or the beginning of file names in a folder."},
    )

    def __post_init__(self) -> None:
        if bool(self.dataset_name) == bool(self.datasets):
            raise UserError("give either --dataset_name or --datasets, which names several")
        self.side(True)

    def open_training(self, reading: Reading) -> Source:
        """The rows to train on, each with the way it is read.

        Args:
            reading: How rows of ``dataset_name`` become records; those of ``datasets`` have their own.
        """
        return self._open(reading, self.dataset_train_split, self.side(False))

    def _open(self, reading: Reading, split: str, side: Side | None) -> Source:
        if self.dataset_name:
            return open_source(self.dataset_name, split, self.dataset_config).read_by(replace(reading, side=side))
        return open_mixture(self.datasets, split, lambda own: replace(own, side=side), self.split_seed)


@dataclass
class EvalDataConfig(DataConfig):
    """Training data, and held-out data beside it."""

    dataset_test_split: str = field(default="test", metadata={"help": "Split of --eval_dataset_name to evaluate on."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out data, named as --dataset_name; it is evaluated at the end of training at least."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_dataset_name and self.test_fraction is not None:
            raise UserError("--eval_dataset_name and --test_fraction contradict each other: both name held-out data")

    def open_held_out(self, reading: Reading) -> Source | None:
        """The rows to evaluate on: of ``eval_dataset_name``, or those that ``test_fraction`` sets aside; or None."""
        if self.eval_dataset_name:
            return open_source(self.eval_dataset_name, self.dataset_test_split, self.dataset_config).read_by(reading)
        return None if self.test_fraction is None else self._open(reading, self.dataset_train_split, self.side(True))

    def check_reading(self, reading: Reading) -> None:
        """Refuses options of a single dataset's format beside ``datasets``, which have their own.

        Raises:
            UserError: naming them.
        """
        given = reading.given() + [name for name in ("format", "columns") if getattr(reading, name) not in (AUTO, ())]
        if self.datasets and not self.eval_dataset_name and given:
            names = ", ".join("--dataset_format" if name == "format" else f"--{name}" for name in given)
            raise UserError(f"{names} and --datasets contradict each other: each of --datasets has fields of its own")


@dataclass
class FormatOptions:
    """How rows become records."""

    dataset_format: str = field(
        default=AUTO,
        metadata={
            "help": f"Format of the rows: {', '.join(FORMATS)}, or module:function, a Python function from a row to "
            "one of these, to several or to None; auto tells it from the columns."
        },
    )
    columns: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Columns under other names: prompt=question,chosen=good,... or JSON."}
    )
    pairs_from: str | None = field(
        default=None,
        metadata={
            "help": "Pairs of several answers to a prompt: all whose scores differ (default; in sft the best one), the "
            "best with the worst, or all that differ by --min_margin.",
            "choices": list(PAIRS_FROM),
        },
    )
    min_margin: float | None = field(
        default=None, metadata={"help": "Least difference of scores under --pairs_from margin."}
    )
    min_score_ratio: float | None = field(
        default=None, metadata={"help": "Least ratio of scores in the format shp, 2 by default."}
    )

    def reading(self) -> Reading:
        """How rows are read as these options describe it.

        Raises:
            UserError: for an unknown format and options that contradict.
        """
        return Reading(
            self.dataset_format,
            parse_columns(self.columns),
            self.pairs_from,  # type: ignore[arg-type]
            self.min_margin,
            self.min_score_ratio,
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
class PairOptions(FormatOptions, LengthOptions):
    """How preference rows are read and cut."""

    max_prompt_length: int = field(
        default=256, metadata={"help": "Longest prompt in tokens once a pair has to be cut to --max_length."}
    )
    cache_dataset: bool = field(
        default=True, metadata={"help": "Keep tokenised pairs on disk, so that the next run need not tokenise them."}
    )
    dataset_num_proc: int = field(
        default=1,
        metadata={
            "help": "Processes that tokenise a dataset; each takes seconds to start, so several pay for hundreds "
            "of thousands of pairs."
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for tokenised pairs; default $TDPO_CACHE, or else ~/.cache/tdpo."}
    )

    def pair_cache(self) -> PairCache | None:
        """Where tokenised pairs are kept, or None if they are not to be."""
        return PairCache(self.cache_dir) if self.cache_dataset else None

    def tokeniser(self, tokenizer: Any) -> Tokeniser:
        """The tokenizer under these options.

        Raises:
            UserError: if it has no end-of-sequence token, or the options do not go together.
        """
        check_at_least(self, 1, "dataset_num_proc")
        return Tokeniser(tokenizer, self.lengths(), processes=self.dataset_num_proc)

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
            "help": "How processes share the run: ddp, fsdp2, zero2, zero3, or a YAML file of accelerate's. Starts the "
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
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
        given = self.accelerator_config
        if given.split_batches or given.dispatch_batches or not given.even_batches:  # type: ignore[union-attr]
            raise UserError(
                "--accelerator_config: batches are shared out by tdpo; split, dispatch and even have no use"
            )
        load_whole()


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
        columns: Columns under other names.
        reference: What gives the reference's hidden states: ``"frozen"``, ``"adapter_off"``, ``"cached"`` or
            ``"auto"``, which says its choice and the reason in a log line.
        reference_cache: Folder of the cache.
        reference_cache_dtype: Dtype of the states in it; ``"auto"`` is that in which the reference gives them.
    """

    reference: str = field(
        default="auto",
        metadata={
            "help": "What gives the reference: frozen is a second model, adapter_off the policy without its adapter, "
            "cached hidden states on disk; auto is adapter_off under a new adapter, cached with --reference_cache, "
            "frozen elsewhere.",
            "choices": ["auto", "frozen", "adapter_off", "cached"],
        },
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": f"{CACHE_HELP} Default with --reference cached: reference-cache in --output_dir."},
    )
    reference_cache_dtype: str = field(default="auto", metadata=CACHE_DTYPE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if self.reference in ("frozen", "adapter_off") and self.reference_cache:
            raise UserError(f"--reference {self.reference} and --reference_cache contradict each other")
        if self.reference_cache and Path(self.reference_cache).resolve() == Path(str(self.output_dir)).resolve():
            raise UserError("--reference_cache and --output_dir are one folder; give the cache one of its own")
        if self.reference_cache_dtype != "auto" and self.reference != "cached" and not self.reference_cache:
            raise UserError("--reference_cache_dtype has no effect without --reference cached or --reference_cache")
        check_at_least(self, 1, "logits_budget")
        self.build_objective()
        self.lengths()
        check_format(self, FORMATS)


@dataclass
class SFTConfig(FormatOptions, LengthOptions, LayoutOptions, RunOptions):
    """Arguments of tdpo.SFTTrainer: all of ``transformers.TrainingArguments`` and the fields below."""

    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        self.lengths()
        check_format(self, SFT_FORMATS)

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


def check_format(options: FormatOptions, formats: Mapping[str, Format]) -> None:
    """Refuses an unknown format, and options that contradict each other, before any data is read.

    Raises:
        UserError: naming the option.
    """
    if options.dataset_format != AUTO:
        find_format(options.dataset_format, formats)
    options.reading()


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
