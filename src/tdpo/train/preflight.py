"""Checks before the first step what would otherwise fail, or turn out to be without effect, later in a run.

In the order of a run: the arguments of a trainer in Python, which no command line has parsed; its rows and streams; its
options; and the trainer itself, with what it will save at its end.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, SchedulerType, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.trainer_utils import IntervalStrategy

from tdpo.config import RunOptions
from tdpo.data.sources import Source
from tdpo.errors import UserError, nearest
from tdpo.models.adapters import has_adapter
from tdpo.models.generation import add_end_token, repair_generation_config
from tdpo.models.policy import causal_lm

logger = logging.getLogger("tdpo")
RENAMED = {"tokenizer": "processing_class", "processor": "processing_class", "eval_datasets": "eval_dataset"}
UNAVAILABLE = {
    "compute_metrics": "no predictions are collected for it; the metrics of pairs are reported without it, and a "
    "subclass adds others in end_evaluation",
    "preprocess_logits_for_metrics": "logits are never kept; see compute_metrics",
    "compute_loss_func": "the loss is that of args.objective; a subclass adds a term in compute_loss",
    "force_use_ref_model": "a ref_model that is passed is always used; leave it out",
    "model_init": "the reference belongs to one model; pass model",
    "quantization_config": "load the model with it (AutoModelForCausalLM.from_pretrained(..., "
    "quantization_config=...)) and pass the model",
}
"""Arguments of TRL's and transformers' trainers that have no meaning here, and what to do instead."""
_CONVERSIONS = {
    "DataFrame": "datasets.Dataset.from_pandas(...) of it",
    "DataLoader": "its dataset; batches are made by the trainer",
}
SAMPLE = 1000
"""Responses looked at to find the token they end with."""
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""Metrics transformers adds to those of an evaluation."""
TOKEN_NAMES = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_call(
    options: type[RunOptions],
    args: Any,
    processing_class: Any,
    unknown: Mapping[str, Any],
    known: Iterable[str],
    **models: Any,
) -> None:
    """Refuses arguments of a wrong type, and those that a trainer does not have; TRL's with what to use instead.

    Args:
        options: The class that ``args`` has to be of.
        args: The options.
        processing_class: The tokenizer or processor.
        unknown: Keyword arguments that are not the trainer's.
        known: The trainer's arguments.
        models: The models by the names of their arguments.

    Raises:
        UserError: naming the first one, and what to pass.
    """
    for name, value in unknown.items():
        if name not in UNAVAILABLE or value is not None:
            raise UserError(_unknown_argument(name, options, known))
    if not isinstance(args, options):
        raise UserError(
            f"args is a {type(args).__module__}.{type(args).__name__}: pass a tdpo.{options.__name__}, which has every "
            "field of transformers.TrainingArguments under the same name"
        )
    if isinstance(processing_class, str | Path):
        raise UserError(
            f"processing_class is the text {str(processing_class)!r}: pass the tokenizer itself, "
            f"AutoTokenizer.from_pretrained({str(processing_class)!r})"
        )
    for name, model in models.items():
        if not isinstance(model, str | nn.Module | None):
            raise UserError(f"{name} is of type {type(model).__name__}: pass a causal language model, or its name")


def _unknown_argument(name: str, options: type[RunOptions], known: Iterable[str]) -> str:
    """Describes an argument that a trainer does not have, and what to use instead."""
    from tdpo.counterparts import OPTIONS, Counterpart, hint

    fields, kind = options.__dataclass_fields__, options.__name__
    if name in UNAVAILABLE:
        return f"{name} is not available: {UNAVAILABLE[name]}"
    if name in RENAMED:
        return f"{name} is called {RENAMED[name]}: pass {RENAMED[name]}=..."
    if name in fields:
        return f"{name} is a field of {kind}: pass args={kind}({name}=...)"
    option = OPTIONS.get(name, Counterpart()).option
    place = f" It is a field of {kind}: pass args={kind}({option}=...)." if option in fields else ""
    return f"unknown argument {name!r}.{hint(name, [*known, *fields])}{place}"


def prepare_rows(
    data: Any, argument: str, prepare: Callable[[Any, str], Any], args: RunOptions | None = None, name: str = ""
) -> Any:
    """Makes a dataset of rows, or of each dataset in a mapping to evaluate on; None stays None.

    Args:
        data: Rows, a stream of them (what has no length, such as an ``IterableDataset`` or a generator), or None.
        argument: The name of the argument: ``train_dataset`` or ``eval_dataset``.
        prepare: Makes a dataset of rows and their name.
        args: The run, if it trains on the rows: of a stream, its ``max_steps`` optimizer steps decide how many.
        name: What messages call the rows; by default ``train`` or ``eval``.

    Raises:
        UserError: for values that are not rows, naming the type and what to pass; for a stream without ``max_steps``.
    """
    if data is None:
        return None
    if argument == "eval_dataset" and isinstance(data, Mapping):
        return {key: prepare_rows(rows, f"{argument}[{key!r}]", prepare, name=key) for key, rows in data.items()}
    kind, name = type(data).__name__, name or argument.removesuffix("_dataset")
    iterable = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if isinstance(data, str | Path | Mapping) or kind in _CONVERSIONS or not iterable:
        raise UserError(_not_rows(data, argument))
    if isinstance(data, Source) or hasattr(data, "__len__"):
        return prepare(data, name)
    if args is None:
        logger.warning("%s is a stream of unknown length (%s) and is read to its end", argument, kind)
        return prepare(data, name)
    if args.max_steps <= 0:
        raise UserError(
            f"{argument} is a stream of unknown length ({kind}): set max_steps, or pass rows with a length, such as a "
            "list or a datasets.Dataset"
        )
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    stream, needed = iter(data), args.max_steps * per_step
    rows = list(islice(stream, needed))
    dataset = prepare(rows, name)
    while len(dataset) < needed and (more := list(islice(stream, needed - len(dataset)))):  # rows may be dropped
        rows += more
        dataset = prepare(rows, name)
    logger.warning(
        "%s is a stream: %d rows were read, for %d steps of %d", argument, len(rows), args.max_steps, per_step
    )
    return dataset


def _not_rows(data: Any, argument: str) -> str:
    """Describes values that are not rows of a dataset, and what to pass."""
    kind = type(data).__name__
    if isinstance(data, str | Path):
        return (
            f"{argument} is the text {str(data)!r}: pass the rows themselves, such as a datasets.Dataset, or "
            f"tdpo.data.sources.open_source({str(data)!r}, 'train'), which reads what --dataset_name reads"
        )
    if isinstance(data, Mapping) and kind.endswith("DatasetDict"):
        first = next(iter(data), "train")
        return f"{argument} is a {kind} of the splits {', '.join(data)}: pass one of them, such as data[{first!r}]"
    if isinstance(data, Mapping):
        return (
            f"{argument} is of type {kind}, with the keys {', '.join(map(str, data))}: pass a list of rows; "
            "datasets.Dataset.from_dict(...) makes rows of columns"
        )
    if kind in _CONVERSIONS:
        return f"{argument} is a {kind}: pass {_CONVERSIONS[kind]}"
    return f"{argument} is of type {kind}: pass rows, such as a datasets.Dataset or a list of dictionaries"


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
    if args.metric_for_best_model is not None and args.eval_strategy != IntervalStrategy.NO:
        _check_best_metric(args.metric_for_best_model, trainer.eval_dataset, trainer.metric_names())
    base = model.get_base_model() if has_adapter(model) else model
    items = (dataset[index] for index in range(min(len(dataset), SAMPLE)))
    fields = ("chosen_ids", "labels", "response_ids")
    responses = (next((ids for field in fields if (ids := getattr(item, field, None))), None) for item in items)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    add_end_token(base, tokenizer, [ids[-1] for ids in responses if ids])
    repair_generation_config(base)
    for problem, attempt, hint in _attempts(trainer, base, sharded):
        try:
            attempt()
        except Exception as error:  # a class of the user's may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{problem}: {reason}{hint}") from error


def _check_best_metric(wanted: str, eval_dataset: Any, names: Iterable[str]) -> None:
    """Refuses a metric for the best model that no evaluation reports; ``names`` are without prefix."""
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


def drop_unknown_tokens(model: Any) -> None:
    """Undoes what the Trainer copies from a tokenizer with more tokens than the model.

    The Trainer writes the tokenizer's special tokens into the model's configs. A padding token without a row there
    would make a saved model that cannot be loaded.
    """
    lm = causal_lm(model)
    text = lm.config.get_text_config()
    for config in (lm.config, text, getattr(lm, "generation_config", None)):
        for name in TOKEN_NAMES:
            found = getattr(config, name, None)
            if isinstance(found, int) and found >= text.vocab_size:
                setattr(config, name, None)
            elif isinstance(found, list):
                setattr(config, name, [token for token in found if token < text.vocab_size] or None)
