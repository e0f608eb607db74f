"""Checks before the first step what would otherwise fail, or prove to be without effect, at the end of a run."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, SchedulerType, TrainerCallback, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.trainer_utils import IntervalStrategy
from typing_extensions import override

from tdpo.config import RunOptions
from tdpo.errors import UserError, nearest
from tdpo.models.adapters import has_adapter
from tdpo.models.generation import add_end_token, repair_generation_config
from tdpo.models.policy import causal_lm

SAMPLE = 1000
"""Responses that are enough to see the token they end with."""
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What transformers adds to the metrics of an evaluation."""
TOKEN_NAMES = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_trains(model: Any, optimizer: Any, args: RunOptions, items: int, processes: int) -> None:
    """Refuses a run that would end without having trained anything.

    Args:
        model: The model, in its adapter.
        optimizer: The user's own, or None.
        args: The run.
        items: Rows to train on.
        processes: How many processes share them.

    Raises:
        UserError: naming what is too large or missing.
    """
    per_round = args.per_device_train_batch_size * processes
    if args.dataloader_drop_last and items < per_round:
        over = f" in each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"--dataloader_drop_last would leave out all data: a batch of {args.per_device_train_batch_size}{over} "
            f"takes {per_round} rows, and there are {items}. Leave the option out, or lower "
            "--per_device_train_batch_size"
        )
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise UserError(
            "no parameter of the model takes a gradient (requires_grad is False everywhere), so nothing would be "
            "trained; an adapter is loaded for training with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    if optimizer is not None and trained.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
        raise UserError(
            "optimizers: the optimizer has no parameter of the model that is trained; make it from the parameters of "
            "the model you pass, after its adapter is put on"
        )


def check_processes(args: RunOptions, sharded: bool) -> None:
    """Refuses several GPUs in one process, and a search for a batch size where processes could find different ones.

    Raises:
        UserError: saying how to launch instead.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process: launch with torchrun or accelerate, one process a GPU, "
            "or set CUDA_VISIBLE_DEVICES to one"
        )
    if args.auto_find_batch_size and (sharded or args.world_size > 1):
        raise UserError(
            "--auto_find_batch_size works in one process with whole weights: of several, one may run out of memory "
            "alone. Set a lower --per_device_train_batch_size and a higher --gradient_accumulation_steps, which "
            "give the same result"
        )


def check_training(trainer: Any, sharded: bool) -> None:
    """Runs all checks of a trainer that is about to train.

    Args:
        trainer: A :class:`~tdpo.train.base.BatchMeanTrainer` with a training dataset.
        sharded: Whether its weights will be sharded.

    Raises:
        UserError: for what would fail, or prove to be without effect, at the end of the run.
    """
    model, args, dataset = trainer.model, trainer.args, trainer.train_dataset
    check_trains(model, trainer.optimizer, args, len(dataset), args.world_size)
    if trainer.lr_scheduler is None:
        check_schedule(args)
    check_collator(trainer.data_collator, dataset)
    check_evaluation(args, trainer.eval_dataset, trainer.metric_names())
    add_end_of_responses(model, trainer.processing_class, dataset)
    check_saving(model, trainer.processing_class, args, whole=not sharded)


def check_reporting(args: RunOptions) -> None:
    """Refuses a tracker that transformers does not know, or whose package is not installed.

    Raises:
        UserError: naming what is missing.
    """
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--report_to: {error}") from error


def check_schedule(args: RunOptions) -> None:
    """Refuses arguments that the learning rate's schedule does not take, and a schedule that lacks some.

    Raises:
        UserError: with what is wrong about them.
    """
    optimizer, kwargs = torch.optim.SGD([torch.zeros(1)]), args.lr_scheduler_kwargs
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, dict(kwargs) if isinstance(kwargs, dict) else None)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value}: {error}; its arguments are "
            f"--lr_scheduler_kwargs, now {kwargs or 'none'}"
        ) from error


def check_collator(collator: Any, dataset: Any) -> None:
    """Refuses a data collator whose batches are not those that are trained on.

    Raises:
        UserError: naming its type.
    """
    reason = "its batches have no 'pair_rows'"
    try:
        if "pair_rows" in collator([dataset[0]]):
            return
    except Exception as error:  # whatever a collator for other rows may raise
        reason = f"{type(error).__name__}: {error}"
    raise UserError(
        f"data_collator: {getattr(collator, '__name__', type(collator).__name__)} does not make batches to train on "
        f"({reason}); leave it out, or return what tdpo.data.dataset.Collator returns"
    )


def check_evaluation(args: RunOptions, eval_dataset: Any, names: Iterable[str]) -> None:
    """Refuses a metric for the best model that no evaluation reports.

    Args:
        args: The run.
        eval_dataset: Held-out data, several by name, or None.
        names: Metrics an evaluation reports, without prefix.

    Raises:
        UserError: naming the option.
    """
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == IntervalStrategy.NO:
        return
    sets = [f"eval_{name}" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["eval"]
    reported = [f"{prefix}_{name}" for prefix in sets for name in (*names, *TIMINGS)]
    if (wanted if wanted.startswith("eval_") else f"eval_{wanted}") not in reported:
        shown = [name for name in reported if not name.endswith(TIMINGS)]
        known = shown if wanted.startswith("eval_") else [name.removeprefix("eval_") for name in shown]
        raise UserError(
            f"--metric_for_best_model {wanted}: no such metric.{nearest(wanted, known)} There are {', '.join(shown)}"
        )


def check_held_out(args: RunOptions, given: bool) -> None:
    """Refuses an evaluation during training that has no data.

    Raises:
        UserError: naming what asks for it, and where the data would be named.
    """
    asks = "--eval_on_start" if args.eval_on_start else f"--eval_strategy {IntervalStrategy(args.eval_strategy).value}"
    if not given and (args.eval_on_start or args.eval_strategy != IntervalStrategy.NO):
        raise UserError(
            f"{asks} needs held-out data: name it with --eval_dataset_name, take a share of the training data with "
            "--test_fraction, or pass eval_dataset in Python"
        )


def check_saving(model: Any, processing_class: Any, args: RunOptions, whole: bool) -> None:
    """Saves everything but weights to a temporary folder and repairs a generation config that contradicts itself.

    Args:
        model: The model, in its adapter.
        processing_class: The tokenizer, a processor, or None.
        args: The run, which is saved too.
        whole: Whether this process holds all weights, so that their names can be looked at.

    Raises:
        UserError: naming what cannot be saved, and why.
    """
    base = model.get_base_model() if has_adapter(model) else model
    repair_generation_config(base)
    with tempfile.TemporaryDirectory() as folder:
        for what, save in _parts(model, base, processing_class, args, whole):
            try:
                save(folder)
            except Exception as error:  # a class of the user's may raise anything; it would be raised at the end
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"{what} cannot be saved, so the trained model could not be: {reason}") from error


def _parts(
    model: Any, base: Any, processing_class: Any, args: RunOptions, whole: bool
) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Lists what a checkpoint consists of beside its weights, with the function that saves each to a folder."""
    if hasattr(base, "config"):
        yield "the model's config", base.config.save_pretrained
    if has_adapter(model):
        for name, config in model.peft_config.items():
            yield f"the config of the adapter {name!r}", config.save_pretrained
    elif whole and isinstance(base, PreTrainedModel):
        skipped = base._keys_to_ignore_on_save or ()
        saved = {name: tensor for name, tensor in base.state_dict().items() if name not in skipped}
        yield "the model", lambda folder: remove_tied_weights_from_state_dict(saved, base)
    if processing_class is not None:
        yield type(processing_class).__name__, processing_class.save_pretrained
    yield "the arguments of the run", lambda folder: torch.save(args, io.BytesIO())


def add_end_of_responses(model: Any, processing_class: Any, dataset: Any) -> None:
    """Adds the token that the responses end with to the model's end tokens, where it is not among them."""
    base = model.get_base_model() if has_adapter(model) else model
    items = (dataset[index] for index in range(min(len(dataset), SAMPLE)))
    names = ("chosen_ids", "labels", "response_ids")
    learnt = (next((ids for name in names if (ids := getattr(item, name, None))), None) for item in items)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    add_end_token(base, tokenizer, [ids[-1] for ids in learnt if ids])


class VocabularyCallback(TrainerCallback):
    """Undoes what the Trainer copies from a tokenizer with more tokens than the model.

    The Trainer writes the tokenizer's special tokens into the model's configs. A padding token without a row there
    would make a saved model that cannot be loaded.
    """

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        lm = causal_lm(model)
        text = lm.config.get_text_config()
        for config in (lm.config, text, getattr(lm, "generation_config", None)):
            for name in TOKEN_NAMES:
                found = getattr(config, name, None)
                if isinstance(found, int) and found >= text.vocab_size:
                    setattr(config, name, None)
                elif isinstance(found, list):
                    setattr(config, name, [token for token in found if token < text.vocab_size] or None)
