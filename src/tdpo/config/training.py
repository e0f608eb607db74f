"""Options of the objective and of scoring, and all the arguments of each trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tdpo import objectives
from tdpo.config.checks import check_used, check_values, documented, option
from tdpo.config.data import UNLIMITED, FormatOptions, LengthOptions, PairOptions
from tdpo.config.run import RunOptions
from tdpo.config.tokens import Lengths
from tdpo.errors import UserError

CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16")


def _with_parameters(options: type) -> type:
    """Adds an option for every parameter of the registered objectives, with the help of those that have it."""
    helps: dict[str, dict[str, list[str]]] = {}
    for name, objective in objectives.OBJECTIVES.items():
        for parameter in fields(objective):
            default = "" if parameter.default is None else f" {parameter.default} by default."
            helps.setdefault(parameter.name, {}).setdefault(f"{parameter.metadata['help']}{default}", []).append(name)
            options.__annotations__[parameter.name] = f"{str(parameter.type).removesuffix(' | None')} | None"
            setattr(options, parameter.name, parameter.metadata.get("choices"))
    for name, texts in helps.items():
        text = " ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
        setattr(options, name, option(None, text, getattr(options, name)))
    return options


@dataclass
@_with_parameters
class ObjectiveOptions:
    """The objective and its parameters. None is the objective's own default; a parameter it lacks is an error."""

    if TYPE_CHECKING:  # of the fields that _with_parameters adds, those that editors should complete
        beta: float | None = None
        alpha: float | None = None
    objective: str | None = option(
        objectives.DEFAULT,
        f"Preference objective: {', '.join(objectives.OBJECTIVES)}, or module:Class for one of your own.",
    )
    objective_args: dict[str, Any] | None = option(
        None, "Parameters of an objective of your own by name; those of the objectives above are options."
    )
    token_weights: str | None = option(
        None,
        "Weights of response tokens by position, which multiply those of the data: "
        + ", or ".join(f"{name}:A ({text})" for name, text in objectives.SCHEDULES.items()),
    )

    def build_objective(self, remembered: Mapping[str, Any] | None = None) -> objectives.Objective:
        """Builds the objective of these options.

        Args:
            remembered: Objective, parameters and token weights of a saved model, for what these options leave out.

        Raises:
            UserError: for an unknown name, or a parameter that the objective does not have or cannot have.
        """
        names = {parameter.name for objective in objectives.OBJECTIVES.values() for parameter in fields(objective)}
        given = {name: getattr(self, name) for name in sorted(names)}
        if self.token_weights is not None:
            objectives.PositionWeights.parse(self.token_weights)
        given, own = {name: value for name, value in given.items() if value is not None}, self.objective_args or {}
        if not isinstance(own, dict):
            raise UserError(f"--objective_args must map names to values, got {own!r}")
        if twice := given.keys() & own.keys():
            raise UserError(f"--{min(twice)} and --objective_args both give {min(twice)}")
        given |= own
        if self.objective is None and remembered is not None:
            self.token_weights = self.token_weights or remembered["token_weights"]
            return objectives.build(remembered["objective"], **{**remembered["parameters"], **given})
        return objectives.build(self.objective or objectives.DEFAULT, **given)


@documented
@dataclass
class LayoutOptions:
    """Layout of sequences in rows; it does not change a result.

    Attributes:
        layout: tree packs sequences into shared rows and runs a prompt once, padded gives each a row; auto is tree
            where a probe proves it on the model.
    """

    layout: str = option("auto", choices=["auto", "tree", "padded"])


@documented
@dataclass
class ScoringOptions(LayoutOptions):
    """Implementation of scoring; it does not change a result.

    Attributes:
        backend: Implementation of the token statistics: naive keeps all logits, chunked a bounded part of them, triton
            does so with kernels of its own on a GPU; auto is triton where it runs.
        logits_budget: Bytes for logits at a time; default 256 MiB on a CPU, on a GPU an eighth of its free memory, from
            64 MiB to 2 GiB.
    """

    backend: Literal["auto", "naive", "chunked", "triton"] = "auto"
    logits_budget: int | None = None


@documented
@dataclass
class TDPOConfig(ObjectiveOptions, PairOptions, ScoringOptions, RunOptions):
    """Arguments of tdpo.TDPOTrainer: all of ``transformers.TrainingArguments`` and the fields below.

    Those of the objective, the data and the layout are documented in the classes this one is made of.

    Attributes:
        reference: Form of the reference: frozen is a second model, adapter_off the policy without its adapter, cached
            hidden states on disk; auto is adapter_off under a new adapter, cached with --reference_cache, frozen
            elsewhere.
        reference_cache: Folder with the reference's hidden states; filled where it is empty, refused where it belongs
            to other weights, tokens or settings. Default with --reference cached: _reference-cache in --output_dir.
        reference_cache_dtype: Dtype of the cached hidden states; auto is that of the reference, which loses nothing.
        sync_ref_model: Let the frozen reference follow the policy in steps (TR-DPO, arXiv 2404.09656).
        ref_model_mixup_alpha: How far it follows, under --sync_ref_model: this share of the policy, the rest stays; 1
            copies.
        ref_model_sync_steps: After how many optimizer steps it follows, under --sync_ref_model.
    """

    reference: str = option("auto", choices=["auto", "frozen", "adapter_off", "cached"])
    reference_cache: str | None = None
    reference_cache_dtype: str = option("auto", choices=CACHE_DTYPES)
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, logits_budget=1, ref_model_sync_steps=1)
        self.rendering()
        if self.reference in ("frozen", "adapter_off") and self.reference_cache:
            raise UserError(f"--reference {self.reference} and --reference_cache contradict each other")
        if self.reference_cache and Path(self.reference_cache).resolve() == Path(str(self.output_dir)).resolve():
            raise UserError("--reference_cache and --output_dir are one folder; give the cache one of its own")
        if self.reference_cache_dtype != "auto" and self.reference != "cached" and not self.reference_cache:
            raise UserError("--reference_cache_dtype has no effect without --reference cached or --reference_cache")
        check_used(self, "sync_ref_model", "ref_model_")
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
        self.build_objective()
        self.lengths()
        self.row_spec()


@documented
@dataclass
class SFTConfig(FormatOptions, LengthOptions, LayoutOptions, RunOptions):
    """Arguments of tdpo.SFTTrainer: all of ``transformers.TrainingArguments`` and the fields below.

    Attributes:
        learning_rate: The initial learning rate.
        train_on: Which assistant turns of a conversation are learnt: all of them, or the last alone.
    """

    learning_rate: float = 2e-5
    train_on: str = option("every_turn", choices=["every_turn", "last_turn"])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self)
        self.lengths()
        self.rendering()
        self.row_spec()

    def lengths(self) -> Lengths:
        """Returns the truncation of these options: half of an overlong example may be its prompt."""
        longest = UNLIMITED if self.max_length is None else self.max_length
        return Lengths(longest, max(longest // 2, 1), self.truncation_mode, self.on_overlong)  # type: ignore[arg-type]
