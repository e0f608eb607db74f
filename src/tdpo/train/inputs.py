"""Checks the arguments of a trainer in Python, where no command line has parsed them, and reads streams."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tdpo.config import RunOptions
from tdpo.data.sources import Source
from tdpo.errors import UserError

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


Prepared = TypeVar("Prepared", bound=Sized)


def check_keywords(unknown: Mapping[str, Any], options: type[RunOptions], known: Iterable[str]) -> None:
    """Refuses keyword arguments that a trainer does not have; those of TRL's by name, with what to use instead.

    Args:
        unknown: What was given.
        options: The class of ``args``, whose fields are not arguments of the trainer.
        known: The trainer's arguments.

    Raises:
        UserError: naming the first one.
    """
    for name, value in unknown.items():
        if name in UNAVAILABLE:
            if value is not None:
                raise UserError(f"{name} is not available: {UNAVAILABLE[name]}")
        elif name in RENAMED:
            raise UserError(f"{name} is called {RENAMED[name]}: pass {RENAMED[name]}=...")
        elif name in options.__dataclass_fields__:
            raise UserError(f"{name} is a field of {options.__name__}: pass args={options.__name__}({name}=...)")
        else:
            from tdpo.counterparts import OPTIONS, Counterpart, hint

            fields, option = options.__dataclass_fields__, OPTIONS.get(name, Counterpart()).option
            place = f" It is a field of {options.__name__}: pass args={options.__name__}({option}=...)."
            advice = hint(name, [*known, *fields])
            raise UserError(f"unknown argument {name!r}.{advice}{place if option in fields else ''}")


def check_types(options: type[RunOptions], args: Any, processing_class: Any, **models: Any) -> None:
    """Refuses arguments of a wrong type.

    Args:
        options: The class that ``args`` has to be of.
        args: The options.
        processing_class: The tokenizer or processor.
        models: The models by the names of their arguments.

    Raises:
        UserError: naming the argument, its type and what to pass.
    """
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


def check_rows(data: Any, name: str) -> None:
    """Refuses values that are not rows of a dataset.

    Args:
        data: The rows, or what was passed in their place.
        name: Its argument, ``train_dataset`` or ``eval_dataset``.

    Raises:
        UserError: naming the type and what to pass.
    """
    kind = type(data).__name__
    if isinstance(data, str | Path):
        raise UserError(
            f"{name} is the text {str(data)!r}: pass the rows themselves, such as a datasets.Dataset, or "
            f"tdpo.data.sources.open_source({str(data)!r}, 'train'), which reads what --dataset_name reads"
        )
    if isinstance(data, Mapping) and kind.endswith("DatasetDict"):
        raise UserError(
            f"{name} is a {kind} of the splits {', '.join(data)}: pass one of them, such as "
            f"data[{next(iter(data), 'train')!r}]"
        )
    if isinstance(data, Mapping):
        raise UserError(
            f"{name} is of type {kind}, with the keys {', '.join(map(str, data))}: pass a list of rows; "
            "datasets.Dataset.from_dict(...) makes rows of columns"
        )
    if kind in _CONVERSIONS:
        raise UserError(f"{name} is a {kind}: pass {_CONVERSIONS[kind]}")
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise UserError(f"{name} is of type {kind}: pass rows, such as a datasets.Dataset or a list of dictionaries")


def prepare_training(data: Any, args: RunOptions, prepare: Callable[[Any], Prepared]) -> Prepared:
    """Prepares the rows to train on; of a stream, those that ``args.max_steps`` optimizer steps need.

    Args:
        data: Rows, or a stream of them: what has no length, such as an ``IterableDataset`` or a generator.
        args: The run.
        prepare: Makes a dataset of rows.

    Raises:
        UserError: for a stream without ``max_steps``, and for values that are not rows.
    """
    check_rows(data, "train_dataset")
    if isinstance(data, Source) or hasattr(data, "__len__"):
        return prepare(data)
    if args.max_steps <= 0:
        raise UserError(
            f"train_dataset is a stream of unknown length ({type(data).__name__}): set max_steps, or pass rows with a "
            "length, such as a list or a datasets.Dataset"
        )
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    needed, stream = args.max_steps * per_step, iter(data)
    rows = list(islice(stream, needed))
    dataset = prepare(rows)
    while len(dataset) < needed and (more := list(islice(stream, needed - len(dataset)))):  # rows may be dropped
        rows += more
        dataset = prepare(rows)
    logger.warning(
        "train_dataset is a stream: %d rows were read, for %d steps of %d", len(rows), args.max_steps, per_step
    )
    return dataset


def prepare_held_out(data: Any, prepare: Callable[[Any, str], Prepared]) -> Prepared | dict[str, Prepared] | None:
    """Prepares the rows to evaluate on, or several datasets by name (a ``DatasetDict`` is that too).

    Args:
        data: Rows, a mapping of names to rows, or None.
        prepare: Makes a dataset of rows and their name.

    Raises:
        UserError: for values that are not rows.
    """
    if data is None:
        return None
    several = isinstance(data, Mapping)
    prepared = {}
    for name, rows in data.items() if several else [("eval", data)]:
        argument = f"eval_dataset[{name!r}]" if several else "eval_dataset"
        check_rows(rows, argument)
        if not (isinstance(rows, Source) or hasattr(rows, "__len__")):
            logger.warning(
                "%s is a stream of unknown length (%s) and is read to its end", argument, type(rows).__name__
            )
        prepared[name] = prepare(rows, name)
    return prepared if several else prepared["eval"]
