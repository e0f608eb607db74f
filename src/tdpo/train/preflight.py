"""Checks before the first step what would otherwise fail, or turn out to be without effect, at the end of a run."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
"""Responses looked at to find the token they end with."""
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""Metrics transformers adds to those of an evaluation."""
TOKEN_NAMES = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_arguments(args: RunOptions, held_out: bool) -> None:
    """Refuses evaluations without data, and a tracker that transformers does not know or that is not installed.

    Args:
        args: The run.
        held_out: Whether there is held-out data.

    Raises:
        UserError: naming the option, and what is missing.
    """
    strategy = IntervalStrategy(args.eval_strategy)
    if not held_out and (args.eval_on_start or strategy != IntervalStrategy.NO):
        option = "--eval_on_start" if args.eval_on_start else f"--eval_strategy {strategy.value}"
        raise UserError(
            f"{option} needs held-out data: name it with --eval_dataset_name, take a share of the training data with "
            "--test_fraction, or pass eval_dataset in Python"
        )
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--report_to: {error}") from error


def check_trainer(trainer: Any, sharded: bool) -> None:
    """Refuses a run that would fail, or turn out to be without effect, at its end; adds the end token of the responses.

    Args:
        trainer: A :class:`~tdpo.train.base.BatchMeanTrainer`.
        sharded: Whether its weights will be sharded.

    Raises:
        UserError: naming what is wrong, and what to do about it.
    """
    model, args, dataset, optimizer = trainer.model, trainer.args, trainer.train_dataset, trainer.optimizer
    processes, batch_size = args.world_size, args.per_device_train_batch_size
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process: launch with torchrun or accelerate, one process a GPU, "
            "or set CUDA_VISIBLE_DEVICES to one"
        )
    if args.auto_find_batch_size and (sharded or processes > 1):
        raise UserError(
            "--auto_find_batch_size works in one process without sharding: of several, one may run out of memory "
            "alone. Set a lower --per_device_train_batch_size and a higher --gradient_accumulation_steps, which "
            "give the same result"
        )
    if dataset is None:
        return
    if args.dataloader_drop_last and len(dataset) < batch_size * processes:
        over = f" in each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"--dataloader_drop_last would leave out all data: a batch of {batch_size}{over} takes "
            f"{batch_size * processes} rows, and there are {len(dataset)}. Leave the option out, or lower "
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
    _check_best_metric(args, trainer.eval_dataset, trainer.metric_names())
    base = model.get_base_model() if has_adapter(model) else model
    _add_end_of_responses(base, trainer.processing_class, dataset)
    repair_generation_config(base)
    for problem, attempt, hint in _attempts(trainer, base, sharded):
        try:
            attempt()
        except Exception as error:  # a class of the user's may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{problem}: {reason}{hint}") from error


def _check_best_metric(args: RunOptions, eval_dataset: Any, names: Iterable[str]) -> None:
    """Refuses a metric for the best model that no evaluation reports; ``names`` are without prefix."""
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


def _attempts(trainer: Any, base: Any, sharded: bool) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Lists what is tried before the first step: the message if it fails, the attempt, and a hint."""
    model, args, collator, tokenizer = trainer.model, trainer.args, trainer.data_collator, trainer.processing_class
    kwargs, scheduler = args.lr_scheduler_kwargs, SchedulerType(args.lr_scheduler_type)
    if trainer.lr_scheduler is None:
        optimizer = torch.optim.SGD([torch.zeros(1)])
        given = dict(kwargs) if isinstance(kwargs, dict) else None
        yield (
            f"--lr_scheduler_type {scheduler.value}",
            lambda: get_scheduler(scheduler, optimizer, 1, 10, given),
            f"; its arguments are --lr_scheduler_kwargs, now {kwargs or 'none'}",
        )
    name = getattr(collator, "__name__", type(collator).__name__)
    yield (
        f"data_collator: {name} does not make batches to train on",
        lambda: collator([trainer.train_dataset[0]])["pair_rows"],
        "; leave it out, or return what tdpo.data.dataset.Collator returns",
    )
    saved: dict[str, Callable[[str], Any]] = {"the arguments of the run": lambda _: torch.save(args, io.BytesIO())}
    if hasattr(base, "config"):
        saved["the model's config"] = base.config.save_pretrained
    if has_adapter(model):
        configs = model.peft_config.items()
        saved |= {f"the config of the adapter {adapter!r}": config.save_pretrained for adapter, config in configs}
    elif not sharded and isinstance(base, PreTrainedModel):
        skipped = base._keys_to_ignore_on_save or ()
        weights = {name: tensor for name, tensor in base.state_dict().items() if name not in skipped}
        saved["the model"] = lambda _: remove_tied_weights_from_state_dict(weights, base)
    if tokenizer is not None:
        saved[type(tokenizer).__name__] = tokenizer.save_pretrained
    with tempfile.TemporaryDirectory() as folder:
        for part, save in saved.items():
            yield f"{part} cannot be saved, so the trained model could not be", partial(save, folder), ""


def _add_end_of_responses(base: Any, processing_class: Any, dataset: Any) -> None:
    """Adds the token that the responses end with to the model's end tokens, where it is not among them."""
    items = (dataset[index] for index in range(min(len(dataset), SAMPLE)))
    fields = ("chosen_ids", "labels", "response_ids")
    responses = (next((ids for field in fields if (ids := getattr(item, field, None))), None) for item in items)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    add_end_token(base, tokenizer, [ids[-1] for ids in responses if ids])


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
