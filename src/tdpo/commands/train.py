"""``tdpo train``: aligns a model with preference pairs; and the parts of the run that ``tdpo sft`` shares."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdpo.commands.common import (
    MODEL_FILES,
    console,
    is_main_process,
    metric_table,
    quieten,
    read_datasets,
    user_errors,
)
from tdpo.commands.options import parse
from tdpo.config import AdapterOptions, EvalDataConfig, ModelConfig, ReferenceConfig, RunOptions, TDPOConfig
from tdpo.config.checks import check_values, documented
from tdpo.data.options import check_format, open_held_out, open_training
from tdpo.distributed import launch
from tdpo.errors import UserError
from tdpo.files import check_writable
from tdpo.models.load import adapter_base, load_model, same_model
from tdpo.report.show_callback import TOKEN_VIEW, ShowCallback
from tdpo.train.checkpointing import checkpoints
from tdpo.train.preflight import check_arguments
from tdpo.train.stopping import handle_signals
from tdpo.train.trainer import TDPOTrainer


@documented
@dataclass
class ShowOptions:
    """Samples and token view of a run; pairs and prompts are of the held-out data, else of the training data.

    Attributes:
        sample_prompts: Number of prompts whose most likely responses before training, at every evaluation and after
            training are shown, recorded for tdpo report and sent to trackers.
        inspect_pairs: Number of pairs of the token view (see tdpo inspect), which is written to tokens.html in the
            output folder after training and sent to trackers that keep files.
    """

    sample_prompts: int = 0
    inspect_pairs: int = 0

    def __post_init__(self) -> None:
        check_values(self, sample_prompts=0, inspect_pairs=0)


OPTIONS = (ModelConfig, ReferenceConfig, ShowOptions, AdapterOptions, EvalDataConfig, TDPOConfig)
OTHER_FILES = (
    "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template.*", "vocab.*", "merges.txt",
    "*processor_config.json", "audio_tokenizer_config.json", "objective.json", "*_results.json", "trainer_state.json",
    "run.jsonl", TOKEN_VIEW,
)  # fmt: skip
"""Files that a finished run leaves beside the model."""


def run(argv: Sequence[str]) -> None:
    """Runs the command; a reference that is the base of the policy's adapter is loaded once."""
    options, tokenizer, train, held_out = prepare_run("train", OPTIONS, argv)
    model_config, ref, shown, adapter, _, args = options
    name, quantization = ref.ref_model_name_or_path, adapter.quantization()
    base = adapter_base(model_config.model_name_or_path, model_config.model_revision)
    if base is None and adapter.use_peft:
        base = model_config.model_name_or_path
    if name and base and args.reference == "auto" and not args.reference_cache and same_model(name, base):
        args.reference, name = "adapter_off", None
    model = load_model(model_config, trainable=True, quantization=quantization)
    reference = load_model(model_config, name, quantization=quantization) if name else None
    with user_errors():
        trainer = TDPOTrainer(
            model, reference, args, None, train, held_out, tokenizer, peft_config=adapter.peft_config()
        )
    if shown.sample_prompts or shown.inspect_pairs:
        ShowCallback(trainer, tokenizer, held_out or train, shown.sample_prompts, shown.inspect_pairs)
    del model, reference  # the trainer decides what of them stays in memory
    console().print(f"objective {trainer.objective}, {trainer.layout}", soft_wrap=True)
    console().print(trainer.reference_line, soft_wrap=True)
    metrics = train_and_save(trainer)
    if metrics is not None:
        console().print(metric_table(metrics, f"held out: {len(held_out)} pairs"))


def prepare_run(command: str, classes: Sequence[type], argv: Sequence[str]) -> tuple[list[Any], Any, Any, Any]:
    """Reads the options and the data of a training command; mistakes in them show before weights are loaded.

    Args:
        command: Its name.
        classes: The dataclasses of its options: of the model first; of adapter, data and run last.
        argv: Its words.

    Returns:
        The options, the tokenizer, the dataset to train on and the held-out one or None.
    """
    launch.apply(argv, command, lambda: _read_options(command, classes, argv))
    options = _read_options(command, classes, argv)
    quieten()
    model_config, (adapter, data, args) = options[0], options[-3:]
    reference = [getattr(option, "ref_model_name_or_path", None) for option in options]
    _check_output(args, model_config.model_name_or_path, model_config.tokenizer_name_or_path, *reference)
    loaded = adapter_base(model_config.model_name_or_path, model_config.model_revision) is not None
    if loaded and adapter.use_peft:
        raise UserError("the model has an adapter already: leave --use_peft out to continue training it")
    if adapter.quantization() and not (loaded or adapter.use_peft):
        raise UserError("weights in 4 or 8 bits cannot be trained: add --use_peft, or continue from an adapter")
    return options, *read_datasets(model_config, data, args)


def train_and_save(trainer: Any) -> dict[str, float] | None:
    """Trains, saves the model and the metrics, and returns those of the held-out data, None without such data."""
    args = trainer.args
    with user_errors(trainer), handle_signals(trainer.stop_request.handle):
        if args.overwrite_output_dir and is_main_process():
            _clear(Path(args.output_dir).expanduser())
        result = trainer.train()
    trainer.stop_request.raise_if_stopped(trainer.state)
    with user_errors(trainer):
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        metrics = None if trainer.eval_dataset is None else trainer.evaluate()
        if metrics is not None:
            trainer.save_metrics("eval", metrics)
            metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        trainer.save_state()
        trainer.create_model_card()  # with the metrics of the held-out data
        if args.push_to_hub and metrics is not None:
            trainer.push_to_hub(commit_message="Results on held-out data", revision=args.hub_revision)
    console().print(f"saved to {args.output_dir}", soft_wrap=True)
    return metrics


def _read_options(command: str, classes: Sequence[type], argv: Sequence[str]) -> list[Any]:
    """Parses the options and checks them against each other and the files they name, which are opened."""
    options: list[Any] = parse(command, classes, argv, required=["output_dir"])
    data, args = options[-2:]
    check_format(args)
    spec = args.row_spec()
    open_training(data, spec)
    check_arguments(args, open_held_out(data, spec) is not None)
    return options


def _check_output(args: RunOptions, *inputs: str | None) -> None:
    """Checks the output folder before anything is loaded.

    Args:
        args: The run's options.
        inputs: Models and tokenizers the run reads; none of them may be in the output folder.

    Raises:
        UserError: if it cannot be written, is an input's own folder, or holds a model that would be overwritten.
    """
    folder, resumes = Path(str(args.output_dir)).expanduser(), args.resume or args.resume_from_checkpoint
    check_writable(folder)
    read = [Path(name).expanduser().resolve() for name in inputs if name]
    if folder.resolve() in read:
        raise UserError(f"--output_dir {folder} is the folder a model is read from; it would be overwritten")
    if args.overwrite_output_dir and resumes:
        raise UserError("--resume and --overwrite_output_dir contradict each other")
    if args.overwrite_output_dir and any(folder.resolve() in path.parents for path in read):
        raise UserError(f"--overwrite_output_dir would remove a model in {folder} that this run reads")
    holds = [path for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))] + checkpoints(folder)[-1:]
    if holds and not (resumes or args.overwrite_output_dir):
        raise UserError(
            f"--output_dir {folder} already holds {', '.join(path.name for path in holds)}: --resume continues from "
            "the newest checkpoint, --overwrite_output_dir replaces"
        )
    if args.resume_from_checkpoint and not Path(args.resume_from_checkpoint).is_dir():
        raise UserError(f"--resume_from_checkpoint {args.resume_from_checkpoint}: no such folder")


def _clear(folder: Path) -> None:
    """Removes what an earlier run left, so that none of it is taken for the new run's.

    Called when data, models and options have been checked: a mistake must not cost the earlier run.
    """
    for path in [path for pattern in (*MODEL_FILES, *OTHER_FILES) for path in folder.glob(pattern)]:
        path.unlink()
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
