"""Options of the objective and of scoring, and all the arguments of each trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tdpo import objectives
from tdpo.config.checks import check_at_least, check_choices, option
from tdpo.config.data import UNLIMITED, FormatOptions, LengthOptions, PairOptions
from tdpo.config.run import RunOptions
from tdpo.config.tokens import Lengths
from tdpo.errors import UserError

CACHE_HELP = (
    "Folder with the reference's hidden states; filled where it is empty, refused where it belongs to other weights, "
    "tokens or settings."
)
CACHE_DTYPE = {
    "help": "Dtype of the cached hidden states; auto is that of the reference, which loses nothing.",
    "choices": ["auto", "float32", "bfloat16", "float16"],
}


@dataclass
class ObjectiveOptions:
    """The objective and its parameters."""

    objective: str = option("tdpo2", "Preference objective.", list(objectives.OBJECTIVES))
    beta: float = option(0.1, "Strength of the tie to the reference, in every objective. The paper's is 0.1.")
    alpha: float | None = option(
        None, "Weight of the sequential-KL difference in tdpo2, 0.5 by default. Others have none."
    )

    def build_objective(self) -> objectives.Objective:
        """Builds the objective of these options.

        Raises:
            UserError: for an unknown name or a parameter the objective does not have.
        """
        return objectives.build(self.objective, beta=self.beta, alpha=self.alpha)


@dataclass
class LayoutOptions:
    """How sequences are packed into rows; it does not change a result."""

    layout: str = option(
        "auto",
        "tree packs sequences into shared rows and runs a prompt once, padded gives each a row; auto is "
        "tree where a probe proves it on the model.",
        ["auto", "tree", "padded"],
    )


@dataclass
class ScoringOptions(LayoutOptions):
    """How pairs are scored; it does not change a result."""

    backend: Literal["auto", "naive", "chunked", "triton"] = option(
        "auto",
        "Implementation of the token statistics: naive keeps all logits, chunked a bounded part of them, "
        "triton does so with kernels of its own on a GPU; auto is triton where it runs.",
    )
    logits_budget: int | None = option(
        None, "Bytes for logits at a time; default 256 MiB on a CPU, 512 MiB on an accelerator."
    )


@dataclass
class TDPOConfig(ObjectiveOptions, PairOptions, ScoringOptions, RunOptions):
    """Arguments of tdpo.TDPOTrainer: all of ``transformers.TrainingArguments`` and the fields below.

    Args:
        objective: ``"dpo"``, ``"tdpo1"`` or ``"tdpo2"``.
        beta: Strength of the tie to the reference.
        alpha: Weight of the sequential-KL difference in ``tdpo2`` (None: 0.5); an error with any other objective.
        max_length: Longest sequence in tokens.
        max_prompt_length: What is left of the prompt of a longer pair.
        dataset_format: Format of the rows, ``"auto"`` to infer it from the columns.
        columns: Columns under other names.
        ignore_columns: Columns to leave out.
        reference: Form of the reference: ``"frozen"``, ``"adapter_off"``, ``"cached"`` or
            ``"auto"``, which says its choice and the reason in a log line.
        reference_cache: Folder of the cache.
        reference_cache_dtype: Dtype of the states in it; ``"auto"`` is that of the reference.
        sync_ref_model: Whether the frozen reference follows the policy, as in TR-DPO (arXiv 2404.09656).
        ref_model_mixup_alpha: The policy's share when it does; the rest is the reference's own.
        ref_model_sync_steps: After how many optimizer steps it does.
    """

    reference: str = option(
        "auto",
        "Form of the reference: frozen is a second model, adapter_off the policy without its adapter, "
        "cached hidden states on disk; auto is adapter_off under a new adapter, cached with --reference_cache, "
        "frozen elsewhere.",
        ["auto", "frozen", "adapter_off", "cached"],
    )
    reference_cache: str | None = option(
        None, f"{CACHE_HELP} Default with --reference cached: reference-cache in --output_dir."
    )
    reference_cache_dtype: str = field(default="auto", metadata=CACHE_DTYPE)
    sync_ref_model: bool = option(False, "Let the frozen reference follow the policy in steps (TR-DPO).")
    ref_model_mixup_alpha: float = option(
        0.6, "How far it follows, under --sync_ref_model: this share of the policy, the rest stays; 1 copies."
    )
    ref_model_sync_steps: int = option(512, "After how many optimizer steps it follows, under --sync_ref_model.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        self._check_following()
        self.rendering()
        if self.reference in ("frozen", "adapter_off") and self.reference_cache:
            raise UserError(f"--reference {self.reference} and --reference_cache contradict each other")
        if self.reference_cache and Path(self.reference_cache).resolve() == Path(str(self.output_dir)).resolve():
            raise UserError("--reference_cache and --output_dir are one folder; give the cache one of its own")
        if self.reference_cache_dtype != "auto" and self.reference != "cached" and not self.reference_cache:
            raise UserError("--reference_cache_dtype has no effect without --reference cached or --reference_cache")
        check_at_least(self, 1, "logits_budget")
        self.build_objective()
        self.lengths()
        self.row_spec()

    def _check_following(self) -> None:
        fields = type(self).__dataclass_fields__
        names = ("ref_model_mixup_alpha", "ref_model_sync_steps")
        given = [name for name in names if getattr(self, name) != fields[name].default]
        if given and not self.sync_ref_model:
            raise UserError(f"--{given[0]} has no effect without --sync_ref_model")
        check_at_least(self, 1, "ref_model_sync_steps")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise UserError(f"--ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}")
        fixed = "--reference_cache" if self.reference_cache else f"--reference {self.reference}"
        if self.sync_ref_model and (self.reference_cache or self.reference in ("cached", "adapter_off")):
            raise UserError(f"--sync_ref_model moves the reference, and {fixed} is one that cannot move")
        if self.sync_ref_model and self.auto_find_batch_size:
            raise UserError(
                "--sync_ref_model and --auto_find_batch_size contradict each other: the reference moves before memory "
                "runs out. Set --per_device_train_batch_size and --gradient_accumulation_steps"
            )


@dataclass
class SFTConfig(FormatOptions, LengthOptions, LayoutOptions, RunOptions):
    """Arguments of tdpo.SFTTrainer: all of ``transformers.TrainingArguments`` and the fields below."""

    learning_rate: float = option(2e-5, "The initial learning rate.")
    train_on: str = option(
        "every_turn",
        "Which assistant turns of a conversation are learnt: all of them, or the last alone.",
        ["every_turn", "last_turn"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        self.lengths()
        self.rendering()
        self.row_spec()

    def lengths(self) -> Lengths:
        """Returns the truncation of these options: half of an overlong example may be its prompt."""
        longest = UNLIMITED if self.max_length is None else self.max_length
        return Lengths(longest, max(longest // 2, 1), self.truncation_mode, self.on_overlong)  # type: ignore[arg-type]
